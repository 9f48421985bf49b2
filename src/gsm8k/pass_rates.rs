//! Reads from scored rollouts how often each problem was solved, to select those that a group of completions can learn from.
//!
//! A group whose completions are all right or all wrong has no advantage. With a pass rate of p, the variance of a completion's success is
//! p (1 - p): the expected square of its advantage before scaling, and largest for problems that are solved half of the time.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::lines::jsonl::Input;
use crate::lines::record::Line;
use crate::reward::{has_verdict, is_right};

/// How often each problem was solved, by its `prompt_id`.
#[derive(Debug, Default)]
pub struct PassRates {
    counts: HashMap<String, Counts>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    right: u64,
    all: u64,
}

/// How many problems were not selected, and why.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Problems without a completion.
    pub unmeasured: usize,
    /// Problems that no completion solved.
    pub never: usize,
    /// Problems that every completion solved.
    pub always: usize,
}

impl PassRates {
    /// Reads files of scored rollouts; a directory stands for its files.
    ///
    /// # Errors
    /// [`Error::Record`] for a record without a `prompt_id`, or with neither `rewards.correctness` nor `rewards.math`; [`Error::Data`] when
    /// there are no records; [`Error::Io`].
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut rates = Self::default();
        for path in paths {
            for file in files(path)? {
                for line in Input::open(&file)? {
                    rates.add(&line?)?;
                }
            }
        }
        match rates.counts.is_empty() {
            true => Err(Error::Data("--pass-rates: no rollouts to measure problems by".into())),
            false => Ok(rates),
        }
    }

    fn add(&mut self, line: &Line) -> Result<()> {
        let record = line.record()?;
        let rewards: Map<String, Value> = record.get_optional("rewards")?.unwrap_or_default();
        if !has_verdict(&rewards) {
            return Err(record.error("no \"rewards\" with correctness or math: run score first"));
        }
        let Some(is_right) = is_right(&rewards) else { return Ok(()) }; // null: the prompt had no answer
        let counts = self.counts.entry(record.get("prompt_id")?).or_default();
        counts.right += u64::from(is_right);
        counts.all += 1;
        Ok(())
    }

    /// The variance p (1 - p) of each problem, 0 for those that are left out.
    pub fn variances(&self, prompt_ids: impl Iterator<Item = String>) -> (Vec<f64>, LeftOut) {
        let mut left_out = LeftOut::default();
        let mut variance = |id: String| {
            let Counts { right, all } = self.counts.get(&id).copied().unwrap_or_default();
            let reason = match (right, all) {
                (_, 0) => &mut left_out.unmeasured,
                (0, _) => &mut left_out.never,
                _ if right == all => &mut left_out.always,
                _ => return right as f64 / all as f64 * ((all - right) as f64 / all as f64),
            };
            *reason += 1;
            0.0
        };
        (prompt_ids.map(&mut variance).collect(), left_out)
    }
}

/// A file, or the files of a directory by name.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let entries = fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut files: Vec<PathBuf> = entries.map_err(Error::io(path))?;
    files.retain(|file| file.is_file());
    files.sort();
    Ok(files)
}
