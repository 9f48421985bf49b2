//! A scored completion as its record says, and how old the weights that sampled it may be.

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::grpo::limits::SequenceLimits;
use crate::lines::record::{Line, Record};

/// A sampled completion with its reward.
#[derive(Debug, Clone)]
pub struct ScoredCompletion {
    /// Its record.
    pub line: Line,
    /// Its place in the group.
    pub sample_index: u64,
    /// Tokens of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// Tokens as sampled, with the end token if the completion stopped.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the sampler (nats).
    pub logprobs: Vec<f32>,
    /// Total reward; `None` where it could not be scored.
    pub reward: Option<f64>,
    /// Parts of the reward by name, in the record's order.
    pub parts: Vec<(String, f64)>,
    /// Whether a length limit cut it off.
    pub truncated: bool,
    /// Sampling temperature.
    pub temperature: f32,
    /// Policy id of the weights that sampled it; `None` in records made elsewhere.
    pub policy_id: Option<String>,
    /// Step of those weights.
    pub policy_step: Option<u64>,
}

/// How old the weights that sampled a completion may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Staleness {
    /// At most this many steps older than those in training.
    Steps(u64),
    /// Any weights, also unnamed ones.
    Any,
}

impl Staleness {
    /// How many steps a run's sampler may be ahead of its trainer; 0 where any weights are accepted.
    #[must_use]
    pub fn ahead(self) -> u64 {
        match self {
            Self::Steps(steps) => steps,
            Self::Any => 0,
        }
    }
}

impl std::str::FromStr for Staleness {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "any" => Ok(Self::Any),
            _ => text.parse().map(Self::Steps).map_err(|_| "not a number of steps or \"any\"".into()),
        }
    }
}

impl ScoredCompletion {
    pub(super) fn parse(line: &Line, record: &Record<'_>, limits: SequenceLimits) -> Result<Self> {
        if !record.has("reward") {
            return Err(record.error("no field \"reward\": send the rollouts through `score`, or a program of yours"));
        }
        let parts: Option<serde_json::Map<String, serde_json::Value>> = record.get_optional("rewards")?;
        let parts = parts.into_iter().flatten().filter_map(|(name, value)| Some((name, value.as_f64()?)));
        let finish_reason: Option<String> = record.get_optional("finish_reason")?;
        let completion = Self {
            line: line.clone(),
            sample_index: need(record, "sample_index", "which of its group's samples it is, from 0 on")?,
            prompt: need(record, "prompt_token_ids", "the tokens that were sampled from")?,
            tokens: need(record, "completion_token_ids", "the tokens that were sampled")?,
            logprobs: need(record, "logprobs", "each sampled token's log-probability")?,
            reward: record.get_optional("reward")?,
            parts: parts.collect(),
            truncated: finish_reason.as_deref() == Some("length"),
            temperature: record.get_optional("temperature")?.unwrap_or(1.0),
            policy_id: record.get_optional("policy_id")?,
            policy_step: record.get_optional("policy_step")?,
        };
        completion.check(limits).map_err(|what| record.error(what))?;
        Ok(completion)
    }

    fn check(&self, limits: SequenceLimits) -> std::result::Result<(), String> {
        let (tokens, logprobs) = (self.tokens.len(), self.logprobs.len());
        if tokens != logprobs {
            return Err(format!("{tokens} completion_token_ids but {logprobs} logprobs"));
        }
        if self.prompt.is_empty() {
            return Err("prompt_token_ids is empty".into());
        }
        limits.check(&self.prompt, &self.tokens)?;
        if self.logprobs.iter().any(|logprob| !logprob.is_finite()) || self.reward.is_some_and(|r| !r.is_finite()) {
            return Err("a log-probability or the reward is not finite".into());
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(format!(
                "temperature {}: greedy completions have no distribution to train on; sample above 0",
                self.temperature
            ));
        }
        Ok(())
    }

    /// Whether the weights named `policy_id` sampled it.
    #[must_use]
    pub fn is_fresh(&self, policy_id: &str) -> bool {
        self.policy_id.as_deref() == Some(policy_id)
    }

    /// Refuses a completion sampled by weights that are too old, or unrelated, for the policy in training: its id and its step.
    ///
    /// # Errors
    /// [`Error::Record`] with both ids and the remedy.
    pub fn check_policy(&self, policy_id: &str, policy_step: u64, allowed: Staleness) -> Result<()> {
        let age = self.policy_step.and_then(|step| policy_step.checked_sub(step));
        let fits = match allowed {
            Staleness::Any => true,
            Staleness::Steps(steps) => self.is_fresh(policy_id) || age.is_some_and(|age| (1..=steps).contains(&age)),
        };
        if fits {
            return Ok(());
        }
        let sampler = self.policy_id.as_deref().unwrap_or("an unnamed policy");
        let step = self.policy_step.map_or(String::new(), |step| format!(" (step {step})"));
        let remedy = match self.policy_id {
            Some(_) => "--max-staleness allows older ones",
            None => "--max-staleness any takes records without a policy_id",
        };
        Err(self.error(format!(
            "sampled by {sampler}{step}, but the weights held are {policy_id} (step {policy_step}); {remedy}"
        )))
    }

    /// `FILE:LINE` of its record.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}:{}", self.line.path, self.line.number)
    }

    /// An error that names its line.
    pub fn error(&self, what: impl Into<String>) -> Error {
        self.line.error(what)
    }
}

pub(super) fn need<T: DeserializeOwned>(record: &Record<'_>, name: &str, what: &str) -> Result<T> {
    let found = record.get_optional(name)?;
    found.ok_or_else(|| {
        record.error(format!("no field \"{name}\", {what}: `rollout` writes it, and another sampler must"))
    })
}
