//! Lets the trainer ask the sampler for more groups of a step, through a file beside the live weights.

use std::fs;
use std::path::PathBuf;

use super::Run;
use super::gpu_handover::write_whole;
use crate::error::Result;

const NAME: &str = "top_up";

/// Where a run's trainer asks for groups.
pub struct TopUps {
    place: PathBuf,
}

impl TopUps {
    /// Those of this run.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        Self { place: run.live_link() }
    }

    /// Asks for so many groups, in all, that are sampled from the weights of `step`.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn ask(&self, step: u64, groups: usize) -> Result<()> {
        write_whole(&self.place, NAME, format!("{step} {groups}").as_bytes())
    }

    /// How many groups were last asked for from the weights of `step`.
    #[must_use]
    pub fn asked(&self, step: u64) -> Option<usize> {
        let text = fs::read_to_string(self.place.join(NAME)).ok()?;
        let (of, groups) = text.split_once(' ')?;
        (of.parse() == Ok(step)).then(|| groups.parse().ok()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::super::LiveWeights;
    use super::*;

    #[test]
    fn what_is_asked_for_counts_for_its_step_and_for_its_trainer() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let top_ups = TopUps::of(&run);
        assert_eq!(top_ups.asked(3), None);
        let live = LiveWeights::create(&run, 0, 0, None, &|_| ()).unwrap();
        top_ups.ask(3, 12).unwrap();
        top_ups.ask(3, 14).unwrap();
        assert_eq!((top_ups.asked(3), top_ups.asked(4)), (Some(14), None));
        drop(live);
        let _next = LiveWeights::create(&run, 0, 0, None, &|_| ()).unwrap();
        assert_eq!(top_ups.asked(3), None);
    }
}
