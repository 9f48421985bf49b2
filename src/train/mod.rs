//! Trains a policy: steps of group relative policy optimisation (GRPO) or of supervised training, for one call or for a whole run.

pub mod adapter;
pub mod backend;
pub mod config;
pub mod device;
pub mod dynamic;
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
    /// Items that this step would have taken.
    pub due: usize,
}

/// Passes `size` items at a time to `step`, and as many as `more` then says; without a size, all of them at once.
///
/// A step never takes fewer: an input may end early because the stage before it died, and a step on half a batch cannot be undone.
///
/// # Errors
/// Those of the items, of `more` and of `step`; [`Error::Data`] when there are items, but too few for one step.
pub fn in_steps<T>(
    items: impl Iterator<Item = Result<T>>,
    size: Option<usize>,
    more: &mut dyn FnMut(&[T]) -> Result<usize>,
    step: &mut dyn FnMut(&[T]) -> Result<()>,
) -> Result<Taken> {
    let size_or_all = size.unwrap_or(usize::MAX);
    let (mut steps, mut batch, mut due) = (0, Vec::new(), size_or_all);
    for item in items {
        batch.push(item?);
        if batch.len() < due {
            continue;
        }
        due += more(&batch)?;
        if batch.len() == due {
            step(&batch)?;
            steps += 1;
            batch.clear();
            due = size_or_all;
        }
    }
    match (size, batch.len()) {
        (_, 0) => Ok(Taken { steps, left_over: 0, due }),
        (None, _) => step(&batch).map(|()| Taken { steps: 1, left_over: 0, due }),
        (Some(_), found) if steps == 0 => {
            Err(Error::Data(format!("the input ended after {found} of the {due} that a step takes")))
        }
        (Some(_), left_over) => Ok(Taken { steps, left_over, due }),
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
        let taken = in_steps((0..count).map(Ok), size, &mut |_| Ok(0), &mut |batch| {
            seen.push(batch.len());
            Ok(())
        });
        (taken, seen)
    }

    #[test]
    fn steps_are_full_or_not_made() {
        let (taken, seen) = sizes(7, Some(3));
        assert_eq!((taken.unwrap(), seen), (Taken { steps: 2, left_over: 1, due: 3 }, vec![3, 3]));
        let (taken, seen) = sizes(2, Some(3));
        let error = taken.unwrap_err();
        assert_eq!((error.exit_code(), seen.len()), (3, 0));
        assert_eq!(error.to_string(), "the input ended after 2 of the 3 that a step takes");
        assert_eq!(sizes(7, None).1, [7]);
        let mut seen = Vec::new();
        let until_a_multiple_of_3 = &mut |batch: &[u32]| Ok((3 - batch[batch.len() - 1] as usize % 3) % 3);
        let taken = in_steps((1..=11).map(Ok), Some(2), until_a_multiple_of_3, &mut |batch| {
            seen.push(batch.len());
            Ok(())
        });
        assert_eq!((taken.unwrap(), seen), (Taken { steps: 3, left_over: 2, due: 3 }, vec![3, 3, 3]));
        assert_eq!(sizes(0, None).0.unwrap().steps, 0);
    }
}
