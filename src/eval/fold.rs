//! The fold: scored rollouts in any order, from any number of files, into counts a group.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::stats::Counts;
use super::summary::Summary;
use crate::error::{Error, Result};
use crate::lines::prompt::{self, Names};
use crate::lines::record::{Line, Record};
use crate::numbers::mean::Mean;
use crate::reward::number::Number;

/// The most rewards by name: each record's are looked up among them one by one.
const MAX_REWARDS: usize = 1000;

/// What has been seen so far; its size grows with the number of groups, not of completions.
#[derive(Debug, Default)]
pub struct Fold {
    /// In the order of their first record, so that sums over them are the same doubles in every run.
    groups: Vec<Group>,
    index: HashMap<String, usize>,
    reward: Mean,
    rewards: Vec<(String, Mean)>,
    length: Mean,
    policy_step: Uniform,
    policy_id: Uniform,
    temperature: Uniform,
}

/// The completions of one prompt at one policy step.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Group {
    pub completions: u32,
    /// The extracted answer, in its tags, is right.
    pub strict: Counts,
    /// The last number of the completion is right.
    pub flexible: Counts,
    pub format: Counts,
    pub truncated: Counts,
}

/// A field that is reported when all records agree on it.
#[derive(Debug, Clone, Default, PartialEq)]
enum Uniform {
    #[default]
    Unseen,
    One(Value),
    Mixed,
}

impl Fold {
    /// Adds one scored rollout.
    ///
    /// # Errors
    /// [`Error::Record`] when nothing tells its prompt, it has no `completion`, neither `rewards` nor `reward`, or a field is not of
    /// its type.
    pub fn add(&mut self, line: &Line) -> Result<()> {
        let record = line.record()?;
        let group_id = group(&record)?;
        let rewards: Option<Map<String, Value>> = record.get_optional("rewards")?;
        if rewards.is_none() && !record.has("reward") {
            return Err(record.error("no field \"rewards\" and no \"reward\": run score first"));
        }
        let rewards = rewards.unwrap_or_default();
        let earned = self.add_rewards(&record, &rewards)?;
        let length: Option<Vec<IgnoredAny>> = record.get_optional("completion_token_ids")?;
        if let Some(tokens) = length {
            self.length.add(tokens.len() as f64);
        }
        self.policy_step.see(record.get_optional("policy_step")?);
        self.policy_id.see(record.get_optional("policy_id")?);
        self.temperature.see(record.get_optional("temperature")?);
        let finish_reason = record.get_text("finish_reason")?;
        let strict = earned("correctness").or_else(|| earned("math"));
        let flexible = is_flexibly_correct(&record, strict)?;

        let at = match self.index.get(&*group_id) {
            Some(at) => *at,
            None => {
                self.groups.push(Group::default());
                *self.index.entry(group_id.into_owned()).or_insert(self.groups.len() - 1)
            }
        };
        let group = &mut self.groups[at];
        group.completions += 1;
        group.strict.add(strict);
        group.flexible.add(flexible);
        group.format.add(earned("strict_format"));
        group.truncated.add(finish_reason.map(|reason| reason == "length"));
        Ok(())
    }

    /// The totals.
    ///
    /// # Errors
    /// [`Error::Data`] when nothing was added.
    pub fn finish(self) -> Result<Summary> {
        if self.groups.is_empty() {
            return Err(Error::Data("no completions to evaluate".into()));
        }
        let mut summary = Summary::of_groups(&self.groups);
        summary.policy_step = self.policy_step.into_value();
        summary.policy_id = self.policy_id.into_value();
        summary.temperature = self.temperature.into_value();
        summary.mean_length_tokens = self.length.mean();
        summary.reward = self.reward.mean();
        summary.rewards = self.rewards.into_iter().map(|(name, mean)| (name, mean.mean().into())).collect();
        Ok(summary)
    }

    /// Adds to the means; returns whether a reward of this record was earned, `None` where it is missing or null.
    fn add_rewards<'r>(
        &mut self,
        record: &Record<'_>,
        rewards: &'r Map<String, Value>,
    ) -> Result<impl Fn(&str) -> Option<bool> + use<'r>> {
        for (name, value) in rewards {
            if !value.is_number() && !value.is_null() {
                return Err(record.error(format!("field \"rewards\": \"{name}\" is neither a number nor null")));
            }
            let mean = match self.rewards.iter().position(|(other, _)| other == name) {
                Some(at) => &mut self.rewards[at].1,
                None if self.rewards.len() == MAX_REWARDS => {
                    return Err(record.error(format!("field \"rewards\": more than {MAX_REWARDS} names so far")));
                }
                None => {
                    self.rewards.push((name.clone(), Mean::default()));
                    &mut self.rewards.last_mut().expect("just pushed").1
                }
            };
            if let Some(value) = value.as_f64() {
                mean.add(value);
            }
        }
        if let Some(reward) = record.get_optional("reward")? {
            self.reward.add(reward);
        }
        Ok(|name: &str| rewards.get(name).and_then(Value::as_f64).map(|value| value > 0.0))
    }
}

/// What tells the completions of one prompt from others: the sampler's group, or where it names none the prompt's id, or the prompt.
fn group<'a>(record: &Record<'a>) -> Result<Cow<'a, str>> {
    for name in ["group_id", "prompt_id"] {
        if let Some(id) = record.get_written(name)? {
            return Ok(id);
        }
    }
    if !["prompt", "messages", "conversations"].iter().any(|name| record.has_value(name)) {
        return Err(record.error("no field \"group_id\", \"prompt_id\" or \"prompt\" says what it completes"));
    }
    Ok(Cow::Owned(Names::new(None).name_of(record)?))
}

/// Whether the last number of the completion is the answer; where the answer is no number, what `strict` says.
fn is_flexibly_correct(record: &Record<'_>, strict: Option<bool>) -> Result<Option<bool>> {
    let completion = prompt::completion(record)?.ok_or_else(|| record.error("no field \"completion\""))?;
    let Some(answer) = record.answer()? else {
        return Ok(None);
    };
    Ok(match Number::parse(&answer) {
        Some(answer) => Some(Number::last_in(&completion) == Some(answer)),
        None => strict,
    })
}

impl Counts {
    /// Counts one sample; `None` was not judged.
    fn add(&mut self, passed: Option<bool>) {
        self.total += u32::from(passed.is_some());
        self.passed += u32::from(passed == Some(true));
    }
}

impl Uniform {
    fn see(&mut self, value: Option<Value>) {
        let value = value.unwrap_or(Value::Null);
        match self {
            Self::Unseen => *self = Self::One(value),
            Self::One(known) if *known != value => *self = Self::Mixed,
            _ => {}
        }
    }

    /// The value if there is one, else null.
    fn into_value(self) -> Value {
        match self {
            Self::One(value) => value,
            Self::Unseen => Value::Null,
            Self::Mixed => Value::String("mixed".into()),
        }
    }
}
