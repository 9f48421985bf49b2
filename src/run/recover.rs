//! What a run that was killed left behind goes, so that going on makes the files that an uninterrupted run makes.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{Run, remove_if_there};
use crate::error::{Error, Result};
use crate::jsonl::Output;
use crate::record::Line;

impl Run {
    /// Brings the directory to the end of `step`, the policy's: no checkpoint, rollouts or metrics of later steps, and of the earlier
    /// checkpoints those that are kept, see [`Run::leave`].
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Record`] when the metrics are damaged.
    pub fn recover(&self, step: u64, save_every: u64) -> Result<()> {
        for path in entries(&self.checkpoints())? {
            if is_unfinished(&path) || step_of(&path).is_some_and(|found| found > step) {
                fs::remove_dir_all(&path).map_err(Error::io(&path))?;
            }
        }
        // The policy may have moved on without the time to remove what it left.
        let checkpoints = entries(&self.checkpoints())?;
        if let Some(left) = checkpoints.iter().filter_map(|path| step_of(path)).filter(|found| *found < step).max() {
            self.leave(left, save_every)?;
        }
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

    /// Removes the checkpoint of a step that the policy has left, unless it is the start or one of those to keep.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn leave(&self, step: u64, save_every: u64) -> Result<()> {
        if step.is_multiple_of(save_every) {
            return Ok(());
        }
        let path = self.checkpoint(step);
        remove_if_there(fs::remove_dir_all(&path), &path)
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    paths.map_err(Error::io(dir))
}

/// The step in the name of a checkpoint or a file of rollouts.
fn step_of(path: &Path) -> Option<u64> {
    let name = path.file_name().and_then(OsStr::to_str)?.strip_prefix("step_")?;
    name.split('.').next()?.parse().ok()
}

/// A checkpoint that was being written, see [`crate::policy::Publication`].
fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str);
    name.is_some_and(|name| name.starts_with(".step_") && name.ends_with(".tmp"))
}

/// Leaves the metrics up to `step`: those of later steps come again, a last line without its end was never whole.
fn cut_metrics(path: &Path, step: u64) -> Result<()> {
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
        run.recover(6, 2).unwrap();
        let kept = ["step_000000", "step_000002", "step_000004", "step_000006", "supervised"];
        assert_eq!(names(&run.checkpoints()), kept);
        assert_eq!(names(&dir.path().join("rollouts")), ["step_000006.jsonl.zst"]);
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
