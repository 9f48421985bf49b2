//! Folds scored rollouts, in any order and from any number of files, into counts per group.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::judge::Judge;
use super::stats::{Counts, pass_at_k, rate};
use super::summary::Summary;
use crate::error::{Error, Result};
use crate::lines::prompt::Names;
use crate::lines::record::{Line, Record};
use crate::numbers::mean::Mean;
use crate::reward::earned;
use crate::reward::number::Number;

/// The most rewards a file may name: each record's are looked up by a linear search.
const MAX_REWARDS: usize = 1000;

/// The counts so far. Memory grows with the number of groups, by each one's different answers, and by a word for each completion.
#[derive(Debug, Default)]
pub struct Fold {
    judge: Judge,
    /// In the order of their first record, so that every run sums the same doubles in the same order.
    groups: Vec<GroupCounts>,
    index: HashMap<String, usize>,
    reward: Mean,
    rewards: Vec<(String, Mean)>,
    length: Mean,
    policy_step: Uniform,
    policy_id: Uniform,
    temperature: Uniform,
}

/// The completions of one prompt at one policy step.
#[derive(Debug, Clone, Default)]
struct GroupCounts {
    completions: u32,
    /// The extracted answer, in its tags, is right.
    strict: Counts,
    /// The last number of the completion is right.
    flexible: Counts,
    /// The answer that the reward `math` finds is right.
    math: Counts,
    format: Counts,
    truncated: Counts,
    /// The place of each different answer that completions gave; equal numbers are one answer, however they are written.
    answers: HashMap<String, u32>,
    /// Of each judged completion, in the order of the records.
    votes: Vec<Vote>,
}

/// What a completion says the answer is.
#[derive(Debug, Clone, Copy)]
struct Vote {
    /// Which of the group's answers; `None` if nothing was extracted.
    answer: Option<u32>,
    is_right: bool,
}

/// A field that the summary reports if all records agree on it.
#[derive(Debug, Clone, Default, PartialEq)]
enum Uniform {
    #[default]
    Unseen,
    One(Value),
    Mixed,
}

impl Fold {
    /// Counts nothing so far.
    #[must_use]
    pub fn new(judge: Judge) -> Self {
        Self { judge, ..Self::default() }
    }

    /// Adds one scored rollout.
    ///
    /// # Errors
    /// [`Error::Record`] when the record does not identify its prompt, has no `completion`, has neither `rewards` nor `reward` where
    /// these judge, or has a field of the wrong type.
    pub fn add(&mut self, line: &Line) -> Result<()> {
        let record = line.record()?;
        let group_id = group(&record)?;
        let rewards = self.judge.rewards(&record)?;
        let judged = self.judge.judge(&record, &rewards)?;
        self.add_rewards(&record, &rewards)?;
        let length: Option<Vec<IgnoredAny>> = record.get_optional("completion_token_ids")?;
        if let Some(tokens) = length {
            self.length.add(tokens.len() as f64);
        }
        self.policy_step.see(record.get_optional("policy_step")?);
        self.policy_id.see(record.get_optional("policy_id")?);
        self.temperature.see(record.get_optional("temperature")?);

        let at = match self.index.get(&*group_id) {
            Some(at) => *at,
            None => {
                self.groups.push(GroupCounts::default());
                *self.index.entry(group_id.into_owned()).or_insert(self.groups.len() - 1)
            }
        };
        let group = &mut self.groups[at];
        group.completions += 1;
        group.strict.add(judged.strict);
        group.flexible.add(judged.flexible);
        group.math.add(judged.math);
        group.format.add(earned(&rewards, "strict_format"));
        group.truncated.add(judged.truncated);
        if let Some(is_right) = judged.strict {
            let answer = judged.extracted.map(|text| group.answer(&text));
            group.votes.push(Vote { answer, is_right });
        }
        Ok(())
    }

    /// Sums up all groups.
    ///
    /// # Errors
    /// [`Error::Data`] when nothing was added.
    pub fn finish(self) -> Result<Summary> {
        if self.groups.is_empty() {
            return Err(Error::Data("no completions to evaluate".into()));
        }
        let groups = &self.groups;
        let over_groups = |counts: fn(&GroupCounts) -> Counts| rate(groups.iter().map(counts));
        Ok(Summary {
            num_prompts: groups.len(),
            num_completions: groups.iter().map(|group| group.completions as usize).sum(),
            num_judged: groups.iter().map(|group| group.strict.total as usize).sum(),
            policy_step: self.policy_step.into_value(),
            policy_id: self.policy_id.into_value(),
            temperature: self.temperature.into_value(),
            accuracy_strict: over_groups(|group| group.strict),
            accuracy_flexible: over_groups(|group| group.flexible),
            accuracy_math: over_groups(|group| group.math),
            format_rate: over_groups(|group| group.format),
            truncation_rate: over_groups(|group| group.truncated),
            mean_length_tokens: self.length.mean(),
            reward: self.reward.mean(),
            rewards: self.rewards.into_iter().map(|(name, mean)| (name, mean.mean().into())).collect(),
            pass_at_k: mean_pass_at_k(groups),
            maj_at_k: mean_maj_at_k(groups),
        })
    }

    /// Adds the record's rewards to the means.
    fn add_rewards(&mut self, record: &Record<'_>, rewards: &Map<String, Value>) -> Result<()> {
        for (name, value) in rewards {
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
        Ok(())
    }
}

fn mean_pass_at_k(groups: &[GroupCounts]) -> Map<String, Value> {
    let judged: Vec<Counts> = groups.iter().map(|group| group.strict).filter(|counts| counts.total > 0).collect();
    let mean = |k| judged.iter().filter_map(|&counts| pass_at_k(counts, k)).sum::<f64>() / judged.len() as f64;
    powers(groups).map(|k| (k.to_string(), mean(k).into())).collect()
}

/// By the first k completions of each group: which those are is chance.
fn mean_maj_at_k(groups: &[GroupCounts]) -> Map<String, Value> {
    let judged: Vec<&[Vote]> = groups.iter().map(|group| &group.votes[..]).filter(|votes| !votes.is_empty()).collect();
    let right = |k: u32| judged.iter().filter(|votes| majority_is_right(&votes[..k as usize])).count();
    powers(groups).map(|k| (k.to_string(), (right(k) as f64 / judged.len() as f64).into())).collect()
}

/// 1, 2, 4, ... up to the smallest group's judged completions; nothing when that is 1.
fn powers(groups: &[GroupCounts]) -> impl Iterator<Item = u32> {
    let smallest = groups.iter().map(|group| group.strict.total).filter(|total| *total > 0).min().unwrap_or(0);
    (0..u32::BITS).map(|power| 1 << power).take_while(move |&k: &u32| smallest > 1 && k <= smallest)
}

/// Whether the answer that most votes are for, of equals the one that came first, is right.
fn majority_is_right(votes: &[Vote]) -> bool {
    let mut counts: HashMap<u32, usize> = HashMap::new();
    votes.iter().filter_map(|vote| vote.answer).for_each(|answer| *counts.entry(answer).or_default() += 1);
    let voting = votes.iter().rev().filter_map(|vote| Some((counts[&vote.answer?], vote.is_right)));
    voting.max_by_key(|(count, _)| *count).is_some_and(|(_, is_right)| is_right)
}

/// The key of a group: the sampler's `group_id`, else the prompt's.
fn group<'a>(record: &Record<'a>) -> Result<Cow<'a, str>> {
    record.get_written("group_id")?.map_or_else(|| prompt_key(record), Ok)
}

/// The key of a prompt, whoever sampled it: its id, else the prompt itself.
pub(super) fn prompt_key<'a>(record: &Record<'a>) -> Result<Cow<'a, str>> {
    if let Some(id) = record.get_written("prompt_id")? {
        return Ok(id);
    }
    if !["prompt", "messages", "conversations"].iter().any(|name| record.has_value(name)) {
        return Err(record.error("no field \"group_id\", \"prompt_id\" or \"prompt\" says what it completes"));
    }
    Ok(Cow::Owned(Names::new(None).name_of(record)?))
}

impl GroupCounts {
    /// The place of an answer among those of the group.
    fn answer(&mut self, text: &str) -> u32 {
        let key = Number::parse(text).map_or_else(|| format!("\"{}", text.trim()), |number| number.canonical());
        let next = self.answers.len() as u32;
        *self.answers.entry(key).or_insert(next)
    }
}

impl Counts {
    /// Counts one sample; `None` means that it was not judged.
    pub(super) fn add(&mut self, passed: Option<bool>) {
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
