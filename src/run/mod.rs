//! The directory of a run: the paths in it, and the rename that makes a step final.
//!
//! The trainer of a run holds its [`Lock`] and hands weights to the sampler through [`LiveWeights`], for which the sampler waits with
//! [`TrainerWatch`]. While they work, each notices through [`PeerWatch`] that the other is gone.

mod fork;
mod gpu_handover;
mod held_out;
mod live_weights;
mod lock;
mod newest_checkpoint;
mod peer_watch;
pub mod recipe;
pub mod record_order;
mod recover;
mod sampler_host;
mod status;
mod top_up;
mod wait_for_weights;

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::checkpoint::{OLDER, STATE, entries, sync};
use crate::error::{Error, Result};

pub use fork::fork;
pub use gpu_handover::HandoverOffers;
pub use held_out::HELD_OUT;
pub use live_weights::LiveWeights;
pub use lock::{Lock, PeerState, Role};
pub use peer_watch::PeerWatch;
pub use recover::Retention;
pub use sampler_host::sampler_elsewhere;
pub use top_up::TopUps;
pub use wait_for_weights::TrainerWatch;

/// The directory of a run.
#[derive(Debug, Clone)]
pub struct Run {
    dir: PathBuf,
}

impl Run {
    /// The run in `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }

    /// The directory itself.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The prompts, in the order of training.
    #[must_use]
    pub fn prompts(&self) -> PathBuf {
        self.dir.join("prompts.jsonl")
    }

    /// The metrics: one line per optimizer step.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.dir.join("metrics.jsonl")
    }

    /// The rollouts that a step was trained on.
    #[must_use]
    pub fn rollouts(&self, step: u64) -> PathBuf {
        self.rollouts_dir().join(format!("{}.jsonl.zst", step_name(step)))
    }

    /// The directory of the rollouts.
    #[must_use]
    pub fn rollouts_dir(&self) -> PathBuf {
        self.dir.join("rollouts")
    }

    /// The steps whose rollouts are there, in ascending order.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn steps_with_rollouts(&self) -> Result<Vec<u64>> {
        let dir = self.rollouts_dir();
        let files = if dir.exists() { entries(&dir)? } else { Vec::new() };
        let whole = files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "zst"));
        let mut steps: Vec<u64> = whole.filter_map(|path| step_of(path)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The checkpoints that training made, by name, the oldest first.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn trained_checkpoints(&self) -> Result<Vec<String>> {
        let dir = self.checkpoints();
        let all = if dir.exists() { entries(&dir)? } else { Vec::new() };
        let mut steps: Vec<u64> =
            all.iter().filter(|path| path.join(STATE).is_file()).filter_map(|path| step_of(path)).collect();
        steps.sort_unstable();
        Ok(steps.into_iter().map(step_name).collect())
    }

    /// The directory of the evaluations.
    #[must_use]
    pub fn evaluations(&self) -> PathBuf {
        self.dir.join("eval")
    }

    /// The events that TensorBoard reads.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.dir.join("tensorboard/events.out.tfevents")
    }

    /// The checkpoint of a step.
    #[must_use]
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(step_name(step))
    }

    /// The weights of an earlier step in the checkpoint of a step, see [`Run::oldest_weights`].
    #[must_use]
    pub fn older(&self, step: u64, earlier: u64) -> PathBuf {
        self.checkpoint(step).join(OLDER).join(step_name(earlier))
    }

    /// The earliest step whose weights the checkpoint of a step holds: its own, unless it holds older ones.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn oldest_weights(&self, step: u64) -> Result<u64> {
        let dir = self.checkpoint(step).join(OLDER);
        let older = if dir.exists() { entries(&dir)? } else { Vec::new() };
        Ok(older.iter().filter_map(|path| step_of(path)).fold(step, u64::min))
    }

    /// The weights of a recent step, for the sampler.
    #[must_use]
    pub fn live(&self, step: u64) -> PathBuf {
        self.live_link().join(step_name(step))
    }

    /// The checkpoint that the link `policy` points to, by its own path: the link may move.
    ///
    /// # Errors
    /// [`Error::Run`] when there is none.
    pub fn policy(&self) -> Result<PathBuf> {
        look_again(&self.dir);
        match fs::read_link(self.policy_link()) {
            Ok(target) => Ok(self.dir.join(target)),
            Err(err) => Err(Error::run(&self.dir, format!("no link `policy` to a checkpoint: {err}"))),
        }
    }

    /// Makes a step final: from here on, and after a crash, its checkpoint is the policy.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn point_policy_at(&self, step: u64) -> Result<()> {
        let unfinished = self.dir.join(".policy");
        remove_if_there(fs::remove_file(&unfinished), &unfinished)?;
        let target = Path::new("checkpoints").join(step_name(step));
        std::os::unix::fs::symlink(target, &unfinished).map_err(Error::io(&unfinished))?;
        fs::rename(&unfinished, self.policy_link()).map_err(Error::io(self.policy_link()))?;
        sync(&self.dir)
    }

    fn policy_link(&self) -> PathBuf {
        self.dir.join("policy")
    }

    fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    fn live_link(&self) -> PathBuf {
        self.dir.join("live")
    }
}

/// The step in the name of a checkpoint or of a file of rollouts.
fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name().and_then(OsStr::to_str)?.strip_prefix("step_")?;
    name.split('.').next()?.parse().ok()
}

/// The name of a step's directories and files.
fn step_name(step: u64) -> String {
    format!("step_{step:06}")
}

/// Makes the next look into a directory on a network file system see what other machines have done there. NFS believes for up to a minute
/// that a name is still there, or still is not, unless somebody opens the directory.
fn look_again(dir: &Path) {
    let _ = fs::File::open(dir); // that there is none is for the look to find
}

/// Accepts that what should be removed is not there.
fn remove_if_there(removed: std::io::Result<()>, path: &Path) -> Result<()> {
    match removed {
        Err(err) if err.kind() != ErrorKind::NotFound => Err(Error::io(path)(err)),
        _ => Ok(()),
    }
}

/// The prompts that a step of so many groups has to itself: with dynamic sampling it may take up to a multiple of them. Those that it does
/// not need are passed over, so that where a step begins depends on no other.
#[must_use]
pub fn prompts_per_step(groups: usize, dynamic_sampling: Option<u64>) -> usize {
    let budget = dynamic_sampling.unwrap_or(1);
    usize::try_from(budget).unwrap_or(usize::MAX).saturating_mul(groups)
}

/// The most steps that sampling may be ahead of training.
pub const MAX_STEPS_AHEAD: u64 = 100;

/// The step whose weights sample the rollouts of the step after `step`, when sampling may be `ahead` steps ahead of training; without
/// being ahead, `step` itself. `oldest` is the step of the oldest weights that exist.
///
/// Later weights are not used even where they exist already, so that timing and interruptions do not change a run.
#[must_use]
pub fn sampled_from(step: u64, ahead: u64, oldest: u64) -> u64 {
    step.saturating_sub(ahead).max(oldest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_is_sampled_from_does_not_depend_on_where_a_run_went_on() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        for (ahead, start) in [(0, 0), (1, 0), (3, 0), (3, 7)] {
            let undisturbed = |step| sampled_from(step, ahead, start);
            for reached in start..start + 9 {
                fs::create_dir_all(run.checkpoint(reached)).unwrap();
                for earlier in undisturbed(reached)..reached {
                    fs::create_dir_all(run.older(reached, earlier)).unwrap();
                }
                let oldest = run.oldest_weights(reached).unwrap();
                for step in reached..reached + 6 {
                    assert_eq!(
                        sampled_from(step, ahead, oldest),
                        undisturbed(step),
                        "{ahead} {start} {reached} {step}"
                    );
                }
                fs::remove_dir_all(run.checkpoint(reached)).unwrap();
            }
        }
    }

    #[test]
    fn the_policy_is_a_checkpoint_by_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let message = run.policy().unwrap_err().to_string();
        assert!(message.contains("no link `policy` to a checkpoint: "), "{message}");
        for step in [7, 8] {
            run.point_policy_at(step).unwrap();
            assert_eq!(run.policy().unwrap(), run.checkpoint(step));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
