//! The line of metrics of an optimizer step. Names are TRL's where the meaning is.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;

use crate::grpo::groups::Group;
use crate::numbers::mean::Mean;

/// A metric's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metric {
    /// A count.
    Count(u64),
    /// A measurement, written with the digits of an f32.
    Real(f64),
    /// A word.
    Word(&'static str),
}

/// Metrics by name, in the order they were added.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(Vec<(String, Metric)>);

impl Metrics {
    /// Adds a count.
    pub fn count(&mut self, name: &str, value: u64) {
        self.0.push((name.to_owned(), Metric::Count(value)));
    }

    /// Adds a measurement.
    pub fn real(&mut self, name: &str, value: f64) {
        self.0.push((name.to_owned(), Metric::Real(value)));
    }

    /// Adds a word.
    pub fn word(&mut self, name: &str, value: &'static str) {
        self.0.push((name.to_owned(), Metric::Word(value)));
    }

    /// The number of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(other, _)| other == name).and_then(|(_, metric)| match metric {
            Metric::Count(count) => Some(*count as f64),
            Metric::Real(real) => Some(*real),
            Metric::Word(_) => None,
        })
    }

    /// All names, in the order they were added.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// The main numbers, for a line of progress.
    #[must_use]
    pub fn brief(&self) -> String {
        let shown = ["step", "loss", "grad_norm", "reward", "entropy"];
        let words = shown.iter().filter_map(|name| self.get(name).map(|value| format!("{name} {}", value as f32)));
        words.collect::<Vec<_>>().join(", ")
    }

    /// One line of JSON, without the line end.
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

/// A value in a line of metrics that is read back.
#[derive(Debug, Clone, PartialEq)]
pub enum Read<'a> {
    /// A count or a measurement.
    Number(f64),
    /// A word.
    Word(Cow<'a, str>),
}

/// Reads a line of metrics: passes each name with its value to `see`, in their order. Null and values that no metric has are left out.
///
/// # Errors
/// That of JSON when the line is not an object.
pub fn read(line: &str, see: &mut dyn FnMut(&str, Read<'_>)) -> serde_json::Result<()> {
    let mut json = serde_json::Deserializer::from_str(line);
    json.deserialize_map(Each(see))?;
    json.end()
}

struct Each<'s>(&'s mut dyn FnMut(&str, Read<'_>));

#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for Each<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((Text(name), value)) = map.next_entry::<Text<'de>, &'de RawValue>()? {
            let value = value.get();
            if value.starts_with(|first: char| first == '-' || first.is_ascii_digit()) {
                value.parse().into_iter().for_each(|number| (self.0)(&name, Read::Number(number)));
            } else if value.starts_with('"') {
                let Text(word) = serde_json::from_str(value).map_err(serde::de::Error::custom)?;
                (self.0)(&name, Read::Word(word));
            }
        }
        Ok(())
    }
}

/// Adds the lengths of completions (tokens) and the fraction that was cut off.
pub fn completions(metrics: &mut Metrics, groups: &[Group]) {
    let all = || groups.iter().flat_map(|group| &group.completions);
    let lengths: Mean = all().map(|completion| completion.tokens.len() as f64).collect();
    let ended = all().filter(|completion| !completion.truncated);
    let ended: Mean = ended.map(|completion| completion.tokens.len() as f64).collect();
    let cut_off: Mean = all().map(|completion| f64::from(completion.truncated)).collect();
    metrics.real("completions/mean_length", lengths.mean().unwrap_or(0.0));
    metrics.real("completions/min_length", lengths.min);
    metrics.real("completions/max_length", lengths.max);
    metrics.real("completions/mean_terminated_length", ended.mean().unwrap_or(0.0));
    metrics.real("completions/min_terminated_length", ended.min);
    metrics.real("completions/max_terminated_length", ended.max);
    metrics.real("completions/clipped_ratio", cut_off.mean().unwrap_or(0.0));
}

/// Adds how much older than those of `step` the weights are that sampled the completions (steps).
pub fn staleness(metrics: &mut Metrics, groups: &[Group], step: u64) {
    let all = groups.iter().flat_map(|group| &group.completions);
    let ages = all.filter_map(|completion| step.checked_sub(completion.policy_step?));
    let ages: Mean = ages.map(|age| age as f64).collect();
    metrics.real("sampling/staleness/mean", ages.mean().unwrap_or(0.0));
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
    fn a_line_is_read_back_without_what_no_metric_is() {
        let mut seen = Vec::new();
        let line = r#"{"step":3,"loss":-1.5e-3,"grad_norm":null,"x":[1],"h\u0065alth":"no_signal","y":true}"#;
        read(line, &mut |name, value| seen.push(format!("{name} {value:?}"))).unwrap();
        assert_eq!(seen, ["step Number(3.0)", "loss Number(-0.0015)", "health Word(\"no_signal\")"]);
        assert!(read(r#"{"step":3,"lo"#, &mut |_, _| ()).is_err() && read("[1]", &mut |_, _| ()).is_err());
    }
}
