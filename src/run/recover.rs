//! Removes what a killed run left behind, so that resuming makes the same files as an uninterrupted run.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::{Run, step_of};
use crate::checkpoint::entries;
use crate::error::{Error, Result};
use crate::lines::jsonl::Output;
use crate::lines::record::Line;

impl Run {
    /// Brings the directory to the end of `step`, the policy's: removes checkpoints, rollouts and metrics of later steps, and the earlier
    /// checkpoints that are not kept, see [`Run::remove_unkept`].
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Record`] when the metrics are damaged.
    pub fn recover(&self, step: u64, keep: Retention) -> Result<()> {
        for path in entries(&self.checkpoints())? {
            if is_unfinished(&path) || step_of(&path).is_some_and(|found| found > step) {
                fs::remove_dir_all(&path).map_err(Error::io(&path))?;
            }
        }
        self.remove_unkept(step, keep)?; // the run may have been killed before it did so
        let rollouts = self.rollouts_dir();
        fs::create_dir_all(&rollouts).map_err(Error::io(&rollouts))?;
        for path in entries(&rollouts)? {
            let unfinished = path.extension().is_some_and(|extension| extension == "tmp");
            if unfinished || step_of(&path).is_some_and(|found| found > step) {
                fs::remove_file(&path).map_err(Error::io(&path))?;
            }
        }
        cut_metrics(&self.metrics(), step)
    }

    /// Removes the earlier checkpoints that are not kept once the policy is at `step`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove_unkept(&self, step: u64, keep: Retention) -> Result<()> {
        let older = |found: &u64| *found < step && !keep.holds(*found, step);
        for found in entries(&self.checkpoints())?.iter().filter_map(|path| step_of(path)).filter(older) {
            let path = self.checkpoint(found);
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
        Ok(())
    }
}

/// Which checkpoints a run writes and keeps, besides its start.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Steps between the checkpoints that are kept.
    pub every: u64,
    /// How many are kept: the newest ones, the policy's included.
    pub count: u64,
}

impl Retention {
    /// Whether the checkpoint of `step` is kept when the policy is at a later one. This depends on the two steps alone, so that what is
    /// left does not depend on where a run was interrupted.
    fn holds(self, step: u64, policy: u64) -> bool {
        let between = (policy - 1) / self.every - step / self.every;
        step == 0 || step.is_multiple_of(self.every) && between + 1 < self.count
    }
}

/// A checkpoint that was not finished, see [`crate::checkpoint::Publication`].
fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str);
    name.is_some_and(|name| name.starts_with(".step_") && name.ends_with(".tmp"))
}

/// Removes metrics after `step`, which will be written again, and a last line that is incomplete.
pub(super) fn cut_metrics(path: &Path, step: u64) -> Result<()> {
    let text = match fs::read(path) {
        Err(err) if err.kind() == ErrorKind::NotFound => return Ok(()),
        read => read.map_err(Error::io(path))?,
    };
    let whole = text.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let mut kept = Vec::new();
    for (before, bytes) in whole.enumerate() {
        let line = Line {
            path: path.display().to_string().into(),
            number: before + 1,
            text: String::from_utf8_lossy(bytes).into_owned(),
        };
        if line.record()?.get::<u64>("policy_step")? <= step {
            kept.extend_from_slice(bytes);
        }
    }
    if kept == text {
        return Ok(());
    }
    let mut out = Output::create(Some(path))?;
    out.write_lines(&kept)?;
    out.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = entries(dir).unwrap().iter().map(|path| path.display().to_string()).collect();
        names.sort();
        names.iter().map(|name| name.rsplit('/').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn what_is_ahead_of_the_policy_goes_and_what_it_should_have_left() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        for step in [0, 2, 4, 5, 6, 7] {
            fs::create_dir_all(run.checkpoint(step)).unwrap();
        }
        fs::create_dir(run.checkpoints().join(".step_000008.tmp")).unwrap();
        fs::create_dir(run.checkpoints().join("supervised")).unwrap();
        fs::create_dir(dir.path().join("rollouts")).unwrap();
        for name in ["step_000006.jsonl.zst", "step_000007.jsonl.zst", "step_000008.jsonl.tmp"] {
            fs::write(dir.path().join("rollouts").join(name), "").unwrap();
        }
        run.recover(6, Retention { every: 2, count: 3 }).unwrap();
        let kept = ["step_000000", "step_000002", "step_000004", "step_000006", "supervised"];
        assert_eq!(names(&run.checkpoints()), kept);
        assert_eq!(names(&dir.path().join("rollouts")), ["step_000006.jsonl.zst"]);
    }

    #[test]
    fn the_start_and_the_youngest_are_kept() {
        let kept = |policy: u64, count| {
            let keep = Retention { every: 3, count };
            (0..policy).filter(|step| keep.holds(*step, policy)).collect::<Vec<_>>()
        };
        assert_eq!(kept(9, 3), [0, 3, 6]);
        assert_eq!(kept(10, 3), [0, 6, 9]);
        assert_eq!(kept(12, 2), [0, 9]);
        assert_eq!(kept(1, 2), [0]);
        assert_eq!(kept(100, 1000).len(), 34);
    }

    #[test]
    fn metrics_end_with_the_policys_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        cut_metrics(&path, 3).unwrap();
        assert!(!path.exists());
        let line = |step: u64| format!("{{\"policy_step\":{step}}}\n");
        let cut = |text: String| {
            fs::write(&path, text).unwrap();
            cut_metrics(&path, 2).map(|()| fs::read_to_string(&path).unwrap())
        };
        let want = line(1) + &line(2);
        assert_eq!(cut(want.clone()).unwrap(), want);
        assert_eq!(cut(want.clone() + &line(3)).unwrap(), want);
        assert_eq!(cut(want.clone() + "{\"policy_st").unwrap(), want);
        assert_eq!(cut(want.clone() + line(3).trim_end()).unwrap(), want);
        assert_eq!(cut("x\n".to_owned() + &want).unwrap_err().exit_code(), 3);
        assert_eq!(cut(line(2).trim_end().to_owned()).unwrap(), "");
    }
}
