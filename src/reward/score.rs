//! Adds `rewards`, `reward` and `extracted` to a rollout record.

use std::sync::Arc;

use serde::de::IgnoredAny;
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::command::Workers;
use super::reading::Reading;
use super::{Lengths, MATH, Reward, RewardWeights, Semantics};
use crate::error::Result;
use crate::lines::prompt;
use crate::lines::record::Line;

/// How to score completions.
#[derive(Debug, Clone)]
pub struct Scorer {
    /// Which version of the rewards.
    pub semantics: Semantics,
    /// Which rewards, and how much each counts.
    pub weights: RewardWeights,
    /// What is long; `length` and `soft_overlong` cannot be computed without it.
    pub lengths: Option<Lengths>,
    /// A program whose rewards count as much as it says.
    pub command: Option<Arc<Workers>>,
}

/// The score of one completion.
#[derive(Debug, Clone)]
pub struct Score<'a> {
    /// Each reward without its weight; `None` if it could not be computed.
    pub rewards: Vec<(&'static Reward, Option<f64>)>,
    /// The weighted sum; `None` if a reward with a nonzero weight could not be computed.
    pub reward: Option<f64>,
    /// The answer in the completion that `correctness` and `int` look at, or that `math` looks at if it is asked for without them.
    pub extracted: Option<&'a str>,
}

impl Scorer {
    /// Scores a text of so many tokens; without `answer`, `correctness`, `math` and `similarity` cannot be computed.
    #[must_use]
    pub fn score<'a>(&self, completion: &'a str, answer: Option<&'a str>, tokens: Option<usize>) -> Score<'a> {
        let mut reading = Reading::new(self.semantics, completion, answer);
        (reading.tokens, reading.lengths) = (tokens, self.lengths);
        let value = |&(reward, weight): &(&'static Reward, f64)| (reward.value(self.semantics, &reading), weight);
        let values: Vec<_> = self.weights.iter().map(value).collect();
        let terms = values.iter().filter(|(_, weight)| *weight != 0.0);
        // Starting from +0 keeps an empty sum, and a sum of negative zeros, from being written as -0.
        let mut terms = terms.map(|(value, weight)| value.map(|value| weight * value));
        let reward = terms.try_fold(0.0, |sum, term| term.map(|term| sum + term));
        let rewards = self.weights.iter().zip(values).map(|((reward, _), (value, _))| (*reward, value)).collect();
        let by_math_alone = self.weights.has(MATH) && !self.weights.has("correctness") && !self.weights.has("int");
        let extracted = if by_math_alone { reading.math_answer() } else { reading.extracted };
        Score { rewards, reward, extracted }
    }

    /// Scores a rollout: appends its line of JSON to `json` with the fields added, or replaced in place.
    ///
    /// # Errors
    /// [`crate::Error::Record`] if the line is not an object, or `completion` or `answer` is not a string; those of [`Workers::ask`].
    pub fn score_line(&self, line: &Line, json: &mut Vec<u8>) -> Result<()> {
        let mut record = line.record()?;
        let completion = prompt::completion(&record)?.ok_or_else(|| record.error("no field \"completion\""))?;
        let answer = record.answer()?;
        let tokens: Option<Vec<IgnoredAny>> = match self.lengths {
            Some(_) => record.get_optional("completion_token_ids")?,
            None => None,
        };
        let score = self.score(&completion, answer.as_deref(), tokens.map(|tokens| tokens.len()));
        let more = self.command.as_ref().map_or(Ok(Vec::new()), |command| command.ask(line))?;
        if let Some((name, _)) = more.iter().find(|(name, _)| self.weights.has(name)) {
            return Err(record.error(format!("the command and score both have a reward \"{name}\"")));
        }
        let sum = |sum: f64, (_, value): &(String, Option<f64>)| value.map(|value| sum + value);
        record.set("rewards", &Values(&score.rewards, &more));
        record.set("reward", &score.reward.and_then(|reward| more.iter().try_fold(reward, sum)));
        record.set("extracted", &score.extracted);
        record.write_json(json);
        Ok(())
    }
}

/// Rewards as a JSON object.
struct Values<'a>(&'a [(&'static Reward, Option<f64>)], &'a [(String, Option<f64>)]);

impl Serialize for Values<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len() + self.1.len()))?;
        for (reward, value) in self.0 {
            map.serialize_entry(reward.name, value)?;
        }
        for (name, value) in self.1 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}
