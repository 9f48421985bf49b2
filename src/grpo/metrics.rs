//! One line of metrics an optimizer step, under TRL's names where they mean the same.

use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::grpo::groups::Group;

/// A metric's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metric {
    /// A count.
    Count(u64),
    /// A measure; written with f32's digits, which is what it is worth.
    Real(f64),
    /// A word.
    Word(&'static str),
}

/// Names and values, in the order they were added.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(Vec<(String, Metric)>);

impl Metrics {
    /// Adds a count.
    pub fn count(&mut self, name: &str, value: u64) {
        self.0.push((name.to_owned(), Metric::Count(value)));
    }

    /// Adds a measure.
    pub fn real(&mut self, name: &str, value: f64) {
        self.0.push((name.to_owned(), Metric::Real(value)));
    }

    /// Adds a word.
    pub fn word(&mut self, name: &str, value: &'static str) {
        self.0.push((name.to_owned(), Metric::Word(value)));
    }

    /// The number under a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(other, _)| other == name).and_then(|(_, metric)| match metric {
            Metric::Count(count) => Some(*count as f64),
            Metric::Real(real) => Some(*real),
            Metric::Word(_) => None,
        })
    }

    /// The few numbers that tell a watcher how it goes.
    #[must_use]
    pub fn brief(&self) -> String {
        let shown = ["step", "loss", "grad_norm", "reward", "entropy"];
        let words = shown.iter().filter_map(|name| self.get(name).map(|value| format!("{name} {}", value as f32)));
        words.collect::<Vec<_>>().join(", ")
    }

    /// One line of JSON, without its end.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("names, numbers and words serialise")
    }
}

impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, metric) in &self.0 {
            match metric {
                Metric::Count(count) => map.serialize_entry(name, count)?,
                Metric::Real(real) => map.serialize_entry(name, &(*real as f32))?,
                Metric::Word(word) => map.serialize_entry(name, word)?,
            }
        }
        map.end()
    }
}

/// Running mean, with the extremes; all 0 while nothing was added.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mean {
    sum: f64,
    /// Numbers added.
    pub count: u64,
    /// Largest number.
    pub max: f64,
    /// Smallest number.
    pub min: f64,
}

impl Mean {
    /// Adds one number.
    pub fn add(&mut self, value: f64) {
        self.max = if self.count == 0 { value } else { self.max.max(value) };
        self.min = if self.count == 0 { value } else { self.min.min(value) };
        self.sum += value;
        self.count += 1;
    }

    /// The mean.
    #[must_use]
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }
}

impl FromIterator<f64> for Mean {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut mean = Self::default();
        values.into_iter().for_each(|value| mean.add(value));
        mean
    }
}

/// Adds the lengths of completions [tokens] and the fraction of them that were cut off.
pub fn completions(metrics: &mut Metrics, groups: &[Group]) {
    let all = || groups.iter().flat_map(|group| &group.completions);
    let lengths: Mean = all().map(|completion| completion.tokens.len() as f64).collect();
    let ended = all().filter(|completion| !completion.truncated);
    let ended: Mean = ended.map(|completion| completion.tokens.len() as f64).collect();
    let cut_off: Mean = all().map(|completion| f64::from(completion.truncated)).collect();
    metrics.real("completions/mean_length", lengths.mean());
    metrics.real("completions/min_length", lengths.min);
    metrics.real("completions/max_length", lengths.max);
    metrics.real("completions/mean_terminated_length", ended.mean());
    metrics.real("completions/clipped_ratio", cut_off.mean());
}

/// Adds how much older than those of `step` the weights are that sampled the completions [steps].
pub fn staleness(metrics: &mut Metrics, groups: &[Group], step: u64) {
    let all = groups.iter().flat_map(|group| &group.completions);
    let ages = all.filter_map(|completion| step.checked_sub(completion.policy_step?));
    let ages: Mean = ages.map(|age| age as f64).collect();
    metrics.real("sampling/staleness/mean", ages.mean());
    metrics.real("sampling/staleness/max", ages.max);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_short_numbers_in_the_order_they_came() {
        let mut metrics = Metrics::default();
        metrics.count("step", 3);
        metrics.real("loss", 0.1 + 0.2);
        metrics.real("learning_rate", 1e-3);
        assert_eq!(metrics.to_json(), br#"{"step":3,"loss":0.3,"learning_rate":0.001}"#);
    }

    #[test]
    fn a_mean_of_nothing_is_zero_and_extremes_may_be_negative() {
        assert_eq!(Mean::default().mean(), 0.0);
        let mean: Mean = [-3.0, -1.0].into_iter().collect();
        assert_eq!((mean.mean(), mean.min, mean.max), (-2.0, -3.0, -1.0));
    }
}
