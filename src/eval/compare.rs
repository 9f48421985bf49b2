//! Compares evaluations before and after training in one table.

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::stats::Rate;
use super::summary::Summary;
use crate::error::{Error, Result};

/// Pairs of evaluations of the same prompts, before and after training.
#[derive(Debug, Clone)]
pub struct Comparison(Vec<[Summary; 2]>);

impl Comparison {
    /// Reads summaries as [`Summary::to_json`] writes them: BEFORE and AFTER of one pair, then of the next.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Data`] when a file holds no summary, or the two of a pair were not measured alike.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let pairs = files.chunks_exact(2).map(|pair| read_pair(&pair[0], &pair[1]));
        pairs.collect::<Result<_>>().map(Self)
    }
}

fn read_pair(before: &Path, after: &Path) -> Result<[Summary; 2]> {
    let pair = [Summary::read(before)?, Summary::read(after)?];
    let measured = |summary: &Summary| (summary.num_prompts, summary.num_completions, summary.temperature.clone());
    if measured(&pair[0]) != measured(&pair[1]) {
        let (before, after) = (before.display(), after.display());
        let what = "differ in their number of prompts, number of completions or temperature";
        return Err(Error::Data(format!("{before} and {after} {what}; compare evaluations that were made alike")));
    }
    Ok(pair)
}

/// How the completions were drawn.
fn kind(temperature: &Value) -> String {
    match temperature.as_f64() {
        Some(0.0) => "greedy".into(),
        Some(1.0) | None => "sampled".into(),
        Some(temperature) => format!("sampled at {temperature}"),
    }
}

impl Display for Comparison {
    /// A header and a line per rate, aligned; the last line has no line end.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let prompts = self.0.first().map_or(0, |[before, _]| before.num_prompts);
        write!(out, "{:<34} {:>10} {:>10}", format!("{prompts} held-out problems"), "before", "after")?;
        for [before, after] in &self.0 {
            let kind = kind(&before.temperature);
            let rates = [
                ("accuracy strict", before.accuracy_strict, after.accuracy_strict),
                ("accuracy flexible", before.accuracy_flexible, after.accuracy_flexible),
                ("format rate", before.format_rate, after.format_rate),
                ("truncation rate", before.truncation_rate, after.truncation_rate),
            ];
            for (name, before, after) in rates {
                let name = format!("{kind}: {name}");
                write!(out, "\n{name:<34} {:>10} {:>10}", percent(before), percent(after))?;
            }
        }
        Ok(())
    }
}

fn percent(rate: Option<Rate>) -> String {
    rate.map_or("-".into(), |rate| format!("{:.1} %", 100.0 * rate.value))
}
