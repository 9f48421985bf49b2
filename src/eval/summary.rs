//! What a fold came to, as JSON and as a table to read.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;
use serde_json::{Map, Value};

use super::fold::Group;
use super::stats::{Counts, Rate, pass_at_k, rate};

/// The numbers of a set of scored rollouts; what could not be computed is `None`, null in JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Groups: prompts, once for each policy step they were sampled at.
    pub num_prompts: usize,
    /// Completions of all prompts.
    pub num_completions: usize,
    /// Completions whose `correctness`, or without it `math`, is known.
    pub num_judged: usize,
    /// The policy step of all records; `"mixed"` where they differ, null where none has it. So the next two.
    pub policy_step: Value,
    /// The policy's id.
    pub policy_id: Value,
    /// Sampling temperature; 0 is greedy.
    pub temperature: Value,
    /// Fraction with `rewards.correctness`, or without it `math`, above 0.
    pub accuracy_strict: Option<Rate>,
    /// Fraction whose last number is the answer, tags or not.
    pub accuracy_flexible: Option<Rate>,
    /// Fraction with `rewards.strict_format` above 0.
    pub format_rate: Option<Rate>,
    /// Fraction that ended by `finish_reason` `length`.
    pub truncation_rate: Option<Rate>,
    /// Mean length of a completion [tokens], the end token included.
    pub mean_length_tokens: Option<f64>,
    /// Mean of `reward` where it is not null.
    pub reward: Option<f64>,
    /// Mean of each of `rewards` where it is not null.
    pub rewards: Map<String, Value>,
    /// Mean over prompts of pass@k by strict accuracy, k = 1, 2, 4, ... up to the smallest group's judged completions; empty when that is 1.
    pub pass_at_k: Map<String, Value>,
}

impl Summary {
    /// One line of JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data serialises")
    }

    /// What groups alone say; the rest is empty.
    pub(super) fn of_groups(groups: &[Group]) -> Self {
        let of = |part: fn(&Group) -> Counts| rate(groups.iter().map(part));
        Self {
            num_prompts: groups.len(),
            num_completions: groups.iter().map(|group| group.completions as usize).sum(),
            num_judged: groups.iter().map(|group| group.strict.total as usize).sum(),
            policy_step: Value::Null,
            policy_id: Value::Null,
            temperature: Value::Null,
            accuracy_strict: of(|group| group.strict),
            accuracy_flexible: of(|group| group.flexible),
            format_rate: of(|group| group.format),
            truncation_rate: of(|group| group.truncated),
            mean_length_tokens: None,
            reward: None,
            rewards: Map::new(),
            pass_at_k: mean_pass_at_k(groups),
        }
    }
}

fn mean_pass_at_k(groups: &[Group]) -> Map<String, Value> {
    let judged: Vec<Counts> = groups.iter().map(|group| group.strict).filter(|counts| counts.total > 0).collect();
    let smallest = judged.iter().map(|counts| counts.total).min().unwrap_or(0);
    let powers = (0..u32::BITS).map(|power| 1 << power).take_while(|&k: &u32| smallest > 1 && k <= smallest);
    let mean = |k| judged.iter().filter_map(|&counts| pass_at_k(counts, k)).sum::<f64>() / judged.len() as f64;
    powers.map(|k| (k.to_string(), mean(k).into())).collect()
}

impl Display for Summary {
    /// Lines of a name and its values, aligned; the last has no line end.
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
        for (k, value) in &self.pass_at_k {
            write!(out, "\n{:<20}{:>7.1}%", format!("pass@{k}"), value.as_f64().unwrap_or(0.0) * 100.0)?;
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
