//! The summary of an evaluation, as JSON and as a table.

use std::fmt::{self, Display, Formatter};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::stats::Rate;
use crate::error::{Error, Result};

/// The summary of a set of scored rollouts. A number that cannot be computed is `None`, and null in JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of groups: prompts, counted once for each policy step that sampled them.
    pub num_prompts: usize,
    /// Completions of all prompts.
    pub num_completions: usize,
    /// Completions whose `correctness`, or without it `math`, is known.
    pub num_judged: usize,
    /// The policy step of all records: `"mixed"` if they differ, null if none has one. The same holds for the next two.
    pub policy_step: Value,
    /// The policy's id.
    pub policy_id: Value,
    /// Sampling temperature; 0 is greedy.
    pub temperature: Value,
    /// Fraction with `rewards.correctness`, or without it `math`, above 0, or that the judge's strict filter finds right.
    pub accuracy_strict: Option<Rate>,
    /// Fraction whose last number is the answer, tags or not.
    pub accuracy_flexible: Option<Rate>,
    /// Fraction whose answer, as the reward `math` finds it, is right.
    #[serde(default)]
    pub accuracy_math: Option<Rate>,
    /// Fraction with `rewards.strict_format` above 0.
    pub format_rate: Option<Rate>,
    /// Fraction whose `finish_reason` is `length`.
    pub truncation_rate: Option<Rate>,
    /// Mean length of a completion (tokens), including the end token.
    pub mean_length_tokens: Option<f64>,
    /// Mean of `reward` where it is not null.
    pub reward: Option<f64>,
    /// Mean of each entry of `rewards` where it is not null.
    pub rewards: Map<String, Value>,
    /// Mean over prompts of pass@k by strict accuracy, k = 1, 2, 4, ... up to the smallest group's judged completions; empty when that is 1.
    pub pass_at_k: Map<String, Value>,
    /// Mean over prompts of whether the answer that most of k completions extracted is right, for the same k.
    #[serde(default)]
    pub maj_at_k: Map<String, Value>,
}

impl Summary {
    /// Reads what [`Summary::to_json`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Data`] when the file holds no summary.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io(path))?;
        serde_json::from_slice(&text)
            .map_err(|err| Error::Data(format!("{}: not what `evaluate --json` writes: {err}", path.display())))
    }

    /// One line of JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data serialises")
    }
}

impl Display for Summary {
    /// Aligned lines of a name and its values, without a final line end.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "{:<20}{:>8}", "prompts", self.num_prompts)?;
        write!(out, "{:<20}{:>8}", "completions", self.num_completions)?;
        if self.num_judged < self.num_completions {
            write!(out, "   {} judged", self.num_judged)?;
        }
        for (name, value) in [("policy step", &self.policy_step), ("temperature", &self.temperature)] {
            match value {
                Value::Null => {}
                Value::String(text) => write!(out, "\n{name:<20}{text:>8}")?,
                value => write!(out, "\n{name:<20}{:>8}", value.to_string())?,
            }
        }
        let rates = [
            ("accuracy, strict", self.accuracy_strict),
            ("accuracy, flexible", self.accuracy_flexible),
            ("accuracy, math", self.accuracy_math),
            ("format", self.format_rate),
            ("truncated", self.truncation_rate),
        ];
        for (name, rate) in rates {
            match rate {
                Some(Rate { value, low, high }) => {
                    let [value, low, high] = [value, low, high].map(|part| part * 100.0);
                    write!(out, "\n{name:<20}{value:>7.1}%   95 % interval {low:.1} to {high:.1} %")?;
                }
                None => write!(out, "\n{name:<20}{:>8}", "-")?,
            }
        }
        for (name, means) in [("pass", &self.pass_at_k), ("maj", &self.maj_at_k)] {
            for (k, value) in means {
                write!(out, "\n{:<20}{:>7.1}%", format!("{name}@{k}"), value.as_f64().unwrap_or(0.0) * 100.0)?;
            }
        }
        write_mean(out, "length [tokens]", self.mean_length_tokens)?;
        write_mean(out, "reward", self.reward)?;
        for (name, value) in &self.rewards {
            write_mean(out, &format!("  {name}"), value.as_f64())?;
        }
        Ok(())
    }
}

fn write_mean(out: &mut Formatter<'_>, name: &str, mean: Option<f64>) -> fmt::Result {
    match mean {
        Some(mean) => write!(out, "\n{name:<20}{mean:>8.3}"),
        None => write!(out, "\n{name:<20}{:>8}", "-"),
    }
}
