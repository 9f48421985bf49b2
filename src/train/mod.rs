//! Trains a policy: steps of group relative policy optimisation (GRPO) or of supervised training, for one call or for a whole run.

pub mod adapter;
pub mod backend;
pub mod config;
pub mod device;
mod events;
pub mod gpu;
pub mod grpo_step;
mod identity;
mod live;
pub mod microbatch;
pub mod once;
pub mod ranks;
pub mod resident;
mod step_line;
mod step_writer;
pub mod supervised;
pub mod trainer;
mod verbose;
mod work;

use crate::error::{Error, Result};
use crate::grpo::limits::SequenceLimits;
use crate::model::Config;

/// The command that trains, as it names itself to the user.
pub const COMMAND: &str = "grpo-step";

/// How much of an input was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Steps made.
    pub steps: usize,
    /// Items at the end, too few for a step.
    pub left_over: usize,
}

/// Passes `size` items at a time to `step`; without a size, all of them at once.
///
/// A step never takes fewer: an input may end early because the stage before it died, and a step on half a batch cannot be undone.
///
/// # Errors
/// Those of the items and of `step`; [`Error::Data`] when there are items, but too few for one step.
pub fn in_steps<T>(
    items: impl Iterator<Item = Result<T>>,
    size: Option<usize>,
    step: &mut dyn FnMut(&[T]) -> Result<()>,
) -> Result<Taken> {
    let size_or_all = size.unwrap_or(usize::MAX);
    let (mut steps, mut batch) = (0, Vec::new());
    for item in items {
        batch.push(item?);
        if batch.len() == size_or_all {
            step(&batch)?;
            steps += 1;
            batch.clear();
        }
    }
    match (size, batch.len()) {
        (_, 0) => Ok(Taken { steps, left_over: 0 }),
        (None, _) => step(&batch).map(|()| Taken { steps: 1, left_over: 0 }),
        (Some(size), found) if steps == 0 => {
            Err(Error::Data(format!("the input ended after {found} of the {size} that a step takes")))
        }
        (Some(_), left_over) => Ok(Taken { steps, left_over }),
    }
}

impl From<&Config> for SequenceLimits {
    fn from(config: &Config) -> Self {
        Self { vocab_size: config.vocab_size, positions: config.positions() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(count: u32, size: Option<usize>) -> (Result<Taken>, Vec<usize>) {
        let mut seen = Vec::new();
        let taken = in_steps((0..count).map(Ok), size, &mut |batch| {
            seen.push(batch.len());
            Ok(())
        });
        (taken, seen)
    }

    #[test]
    fn steps_are_full_or_not_made() {
        let (taken, seen) = sizes(7, Some(3));
        assert_eq!((taken.unwrap(), seen), (Taken { steps: 2, left_over: 1 }, vec![3, 3]));
        let (taken, seen) = sizes(2, Some(3));
        let error = taken.unwrap_err();
        assert_eq!((error.exit_code(), seen.len()), (3, 0));
        assert_eq!(error.to_string(), "the input ended after 2 of the 3 that a step takes");
        assert_eq!(sizes(7, None).1, [7]);
        assert_eq!(sizes(0, None).0.unwrap().steps, 0);
    }
}
