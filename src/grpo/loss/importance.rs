//! Importance sampling: what a token counts for weights that differ from those that sampled it.

use super::{LossConfig, MAX_LOG_RATIO};

/// What becomes of weights out of bounds, and whose they are.
///
/// # Source
/// TRL's `vllm_importance_sampling_mode`; Yao et al. 2025, <https://fengyao.notion.site/off-policy-rl> (truncated), and Team Ling et al.
/// 2025, <https://arxiv.org/abs/2510.18855> (masked).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum ImportanceMode {
    /// A token counts for the bound
    TokenTruncate,
    /// A token counts for nothing
    TokenMask,
    /// All tokens of a completion count for the bound
    SequenceTruncate,
    /// All tokens of a completion count for nothing
    SequenceMask,
}

impl ImportanceMode {
    /// Whether the weight is the product over a completion's tokens.
    pub(super) fn is_of_sequences(self) -> bool {
        matches!(self, Self::SequenceTruncate | Self::SequenceMask)
    }

    fn masks(self) -> bool {
        matches!(self, Self::TokenMask | Self::SequenceMask)
    }
}

/// The weight of a token in importance sampling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Importance {
    /// Its probability, or the completion's, when the step began over that when it was sampled, within bounds; 0 if it is masked.
    pub ratio: f64,
    /// Whether it was out of bounds.
    pub truncated: bool,
}

impl Importance {
    /// The weight for this difference of log-probabilities; `None` without importance sampling.
    pub(super) fn of(config: &LossConfig, difference: f64) -> Option<Self> {
        let most = config.importance_sampling_clip_max?;
        let least = config.importance_sampling_clip_min.unwrap_or(0.0);
        let ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
        let truncated = ratio > most || ratio < least;
        let bounded = if truncated && config.importance_sampling_mode.masks() { 0.0 } else { ratio.clamp(least, most) };
        Some(Self { ratio: bounded, truncated })
    }
}
