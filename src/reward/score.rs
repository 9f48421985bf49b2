//! From a rollout record to the same record with `rewards`, `reward` and `extracted`.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{Reward, Semantics, Weights, fixed, math, seed};
use crate::error::Result;
use crate::lines::prompt;
use crate::lines::record::Line;

/// How completions are scored.
#[derive(Debug, Clone)]
pub struct Scorer {
    /// Which reading of the rewards.
    pub semantics: Semantics,
    /// Which rewards, and how much each counts.
    pub weights: Weights,
}

/// What one completion got.
#[derive(Debug, Clone, PartialEq)]
pub struct Score<'a> {
    /// Each reward without its weight; `None` when it could not be computed.
    pub rewards: Vec<(Reward, Option<f64>)>,
    /// Their weighted sum; `None` when one of those with a weight other than 0 could not be computed.
    pub reward: Option<f64>,
    /// The answer found in the completion: what `correctness` and `int` look at, or `math` when neither of them is asked for.
    pub extracted: Option<&'a str>,
}

impl Scorer {
    /// Scores a text; without `answer` `correctness` and `math` cannot be computed.
    #[must_use]
    pub fn score<'a>(&self, completion: &'a str, answer: Option<&str>) -> Score<'a> {
        let (mut extracted, mut values) = match self.semantics {
            Semantics::Seed => seed_values(completion, answer),
            Semantics::Fixed => fixed_values(completion, answer),
        };
        if self.weights.has(Reward::Math) {
            let found = math::extract(completion);
            values[Reward::Math as usize] = answer.map(|answer| either(math::is_correct(found, answer), 1.0));
            if !self.weights.has(Reward::Correctness) && !self.weights.has(Reward::Int) {
                extracted = found;
            }
        }
        let rewards: Vec<_> = self.weights.iter().map(|(reward, _)| (reward, values[reward as usize])).collect();
        let terms = self.weights.iter().filter(|(_, weight)| *weight != 0.0);
        // Adding to +0 keeps a sum of nothing, and of negative zeros, from being written as -0.
        let mut terms = terms.map(|(reward, weight)| values[reward as usize].map(|value| weight * value));
        let reward = terms.try_fold(0.0, |sum, term| term.map(|term| sum + term));
        Score { rewards, reward, extracted }
    }

    /// Scores a rollout: appends its line of JSON with the fields added, or replaced where they stood.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when it is no object, or `completion` or `answer` is not a string.
    pub fn score_line(&self, line: &Line, json: &mut Vec<u8>) -> Result<()> {
        let mut record = line.record()?;
        let completion = prompt::completion(&record)?.ok_or_else(|| record.error("no field \"completion\""))?;
        let answer = record.answer()?;
        let score = self.score(&completion, answer.as_deref());
        record.set("rewards", &Values(&score.rewards));
        record.set("reward", &score.reward);
        record.set("extracted", &score.extracted);
        record.write_json(json);
        Ok(())
    }
}

/// The values in the order of [`Reward::ALL`]; that of `math` is filled in where it is asked for.
type RewardValues = [Option<f64>; 6];

fn seed_values<'a>(completion: &'a str, answer: Option<&str>) -> (Option<&'a str>, RewardValues) {
    let extracted = seed::extract(completion);
    let values = [
        answer.map(|answer| either(extracted == answer, 2.0)),
        Some(either(super::python::is_digit(extracted), 0.5)),
        Some(either(seed::is_strict_format(completion), 0.5)),
        Some(either(seed::is_soft_format(completion), 0.5)),
        Some(seed::count_xml(completion)),
        None,
    ];
    (Some(extracted), values)
}

fn fixed_values<'a>(completion: &'a str, answer: Option<&str>) -> (Option<&'a str>, RewardValues) {
    let tagged = fixed::Tagged::new(completion);
    let extracted = tagged.extract();
    let values = [
        answer.map(|answer| either(fixed::is_correct(extracted, answer), 2.0)),
        Some(either(fixed::is_integer(extracted), 0.5)),
        Some(either(tagged.is_strict_format(), 0.5)),
        Some(either(tagged.is_soft_format(), 0.5)),
        Some(tagged.count_xml()),
        None,
    ];
    (extracted, values)
}

fn either(earned: bool, value: f64) -> f64 {
    if earned { value } else { 0.0 }
}

/// Rewards as a JSON object.
struct Values<'a>(&'a [(Reward, Option<f64>)]);

impl Serialize for Values<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (reward, value) in self.0 {
            map.serialize_entry(reward.name(), value)?;
        }
        map.end()
    }
}
