//! Finds by trial the factor that keeps f16 gradients in range.

use serde::{Deserialize, Serialize};

/// Updates in a row after which a larger factor is tried.
const GROWTH_INTERVAL: u32 = 2000;

/// The largest factor, as in Apex: thousands of updates with zero gradients must not make it useless.
const LARGEST: u32 = 1 << 24;

/// The factor that the loss is multiplied by while its gradients are in f16, whose range is 6e-8 to 65,504: slopes are about 1 divided
/// by the tokens of a step. An update whose gradients overflow is skipped, and the next one tries half the factor.
///
/// # Source
/// Micikevicius et al. 2018, section 3.2, <https://arxiv.org/abs/1710.03740>, with the numbers of `torch.amp.GradScaler`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LossScale {
    /// A power of two, at least 1.
    pub factor: u32,
    /// Updates made since the factor changed.
    pub good_updates: u32,
    /// Updates skipped since the start of the run.
    pub skipped_updates: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { factor: 1 << 16, good_updates: 0, skipped_updates: 0 }
    }
}

impl LossScale {
    /// The scale after an update.
    #[must_use]
    pub fn after_update(self) -> Self {
        match self.good_updates + 1 {
            GROWTH_INTERVAL => Self { factor: (2 * self.factor).min(LARGEST), good_updates: 0, ..self },
            good_updates => Self { good_updates, ..self },
        }
    }

    /// The scale after an overflow; `None` if the gradients overflow without any.
    #[must_use]
    pub fn after_overflow(self) -> Option<Self> {
        let skipped_updates = self.skipped_updates + 1;
        (self.factor > 1).then_some(Self { factor: self.factor / 2, good_updates: 0, skipped_updates })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn updated(scale: LossScale, times: u32) -> LossScale {
        (0..times).fold(scale, |scale, _| scale.after_update())
    }

    #[test]
    fn it_doubles_after_2000_updates_in_a_row_up_to_the_largest() {
        let start = LossScale::default();
        assert_eq!(updated(start, 1999).factor, 65_536);
        assert_eq!(updated(start, 2000), LossScale { factor: 131_072, good_updates: 0, skipped_updates: 0 });
        let interrupted = updated(updated(start, 1999).after_overflow().unwrap(), 1999);
        assert_eq!(interrupted, LossScale { factor: 32_768, good_updates: 1999, skipped_updates: 1 });
        assert_eq!(updated(start, 20_000).factor, 1 << 24);
    }

    #[test]
    fn it_halves_with_each_overflow_down_to_1() {
        let mut scale = LossScale::default();
        for halvings in 1..=16 {
            scale = scale.after_overflow().unwrap();
            assert_eq!((scale.factor, scale.skipped_updates), (65_536 >> halvings, halvings));
        }
        assert_eq!(scale.after_overflow(), None);
    }
}
