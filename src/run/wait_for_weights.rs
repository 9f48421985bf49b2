//! Lets the sampler wait for the next weights, but not for a trainer that is gone.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Lock, Role, Run, TopUps, look_again};
use crate::error::{Error, Result};
use crate::lines::jsonl::stdout_is_closed;
use crate::process::cancel::Stop;

/// Shortest and longest time between two looks for the weights; in between, a fraction of the wait so far.
const LOOK: Duration = Duration::from_micros(500);
const LAST_LOOK: Duration = Duration::from_millis(10);

/// Time between two looks at the trainer while waiting.
const PROBE: Duration = Duration::from_millis(100);

/// After a wait this long the user is told why, and a trainer that has not started by then is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for weights, and watches the trainer meanwhile.
pub struct TrainerWatch<'a> {
    run: &'a Run,
    say: &'a dyn Fn(&str),
    stop: &'a Stop,
    began: Instant,
    /// Whether its weights are.
    needed: bool,
    seen: bool,
    waited: Duration,
}

impl<'a> TrainerWatch<'a> {
    /// Watches the trainer of a run. `say` is told about long waits, and `stop` ends them. Unless its weights are `needed`, the run may
    /// have no trainer.
    #[must_use]
    pub fn of(run: &'a Run, say: &'a dyn Fn(&str), stop: &'a Stop, needed: bool) -> Self {
        Self { run, say, stop, began: Instant::now(), needed, seen: false, waited: Duration::ZERO }
    }

    /// Time spent waiting so far.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Checks that the trainer is there.
    ///
    /// # Errors
    /// [`Error::Abandoned`] when it is gone or the pipe to it is broken, [`Error::Run`] when it did not start in time; that of the stop.
    pub fn check(&mut self) -> Result<()> {
        self.stop.check()?;
        if stdout_is_closed() {
            return Err(Error::Abandoned);
        }
        if Lock::is_held(self.run, Role::Train)? {
            self.seen = true;
        } else if self.seen {
            return Err(Error::Abandoned);
        } else if self.needed && self.began.elapsed() >= PATIENCE {
            return Err(Error::run(self.run.dir(), "no trainer: start grpo-step --follow at the end of the pipe"));
        }
        Ok(())
    }

    /// Waits until the trainer has removed weights of `step`, and wishes for it, that a killed run left.
    ///
    /// # Errors
    /// As [`TrainerWatch::check`].
    pub fn wait_for_start(&mut self, step: u64) -> Result<()> {
        let (place, dir) = (self.run.live(step), self.run.dir().display());
        let reason = || format!("waiting for grpo-step --follow {dir} to start, and to remove {}", place.display());
        let top_ups = TopUps::of(self.run);
        self.wait(&reason, &|| !place.exists() && top_ups.asked(step - 1).is_none())
    }

    /// Waits for the weights of a step, and returns their directory.
    ///
    /// # Errors
    /// As [`TrainerWatch::check`].
    pub fn wait_for_weights(&mut self, step: u64) -> Result<PathBuf> {
        let place = self.run.live(step);
        let reason = || {
            format!(
                "waiting for the weights of step {step}: all rollouts before them are written, so the trainer is still at work, or \
                 a stage in between buffers its output or lost records"
            )
        };
        self.wait(&reason, &|| place.exists())?;
        Ok(place)
    }

    /// Waits until the trainer has taken a step, of which `sampled` groups are written, or asks for more of them: returns how many, in
    /// all, from the weights of `step`.
    ///
    /// # Errors
    /// As [`TrainerWatch::check`].
    pub fn wait_for_top_up(&mut self, step: u64, sampled: usize) -> Result<Option<usize>> {
        let (next, top_ups) = (self.run.live(step + 1), TopUps::of(self.run));
        let asked = || top_ups.asked(step).filter(|asked| *asked > sampled);
        let reason = || {
            format!(
                "waiting for the trainer to take {sampled} groups or to ask for more: all their rollouts are written, so it is still \
                 at work, or a stage in between buffers its output or lost records"
            )
        };
        self.wait(&reason, &|| next.exists() || asked().is_some())?;
        Ok(asked())
    }

    fn wait(&mut self, reason: &dyn Fn() -> String, is_over: &dyn Fn() -> bool) -> Result<()> {
        let began = Instant::now();
        let (mut probed, mut explained) = (None::<Instant>, false);
        let is_over = || {
            look_again(self.run.dir());
            look_again(&self.run.live_link());
            is_over()
        };
        while !is_over() {
            if probed.is_none_or(|probed| probed.elapsed() >= PROBE) {
                self.check()?;
                probed = Some(Instant::now());
            }
            if !explained && began.elapsed() >= PATIENCE {
                (self.say)(&reason());
                explained = true;
            }
            sleep((began.elapsed() / 64).clamp(LOOK, LAST_LOOK));
        }
        self.waited += began.elapsed();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_come_end_the_wait_and_a_trainer_that_goes_ends_it_in_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let silent = |words: &str| panic!("said {words}");
        let stop = Stop::default();
        let mut trainer = TrainerWatch::of(&run, &silent, &stop, true);
        trainer.wait_for_start(1).unwrap();
        let lock = Lock::take(&run, Role::Train).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sleep(Duration::from_millis(20));
                std::fs::create_dir_all(run.live(1)).unwrap();
            });
            assert_eq!(trainer.wait_for_weights(1).unwrap(), run.live(1));
        });
        assert!(trainer.waited() >= Duration::from_millis(10));
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                sleep(Duration::from_millis(20));
                drop(lock);
            });
            assert!(matches!(trainer.wait_for_weights(2), Err(Error::Abandoned)));
        });
        assert!(began.elapsed() < Duration::from_secs(2));
    }
}
