//! Judges completions: by their rewards and their text, or as lm-evaluation-harness does.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::lines::prompt;
use crate::lines::record::Record;
use crate::reward::lm_eval::{LmEvalTask, is_exact_match};
use crate::reward::number::Number;
use crate::reward::{is_right, math};

/// Who says whether a completion is right.
#[derive(Debug, Clone, Copy, Default)]
pub enum Judge {
    /// Its rewards, which `score` gave it.
    #[default]
    Rewards,
    /// The filters of a task of lm-evaluation-harness. No rewards are needed.
    LmEval(LmEvalTask),
}

impl From<Option<LmEvalTask>> for Judge {
    fn from(task: Option<LmEvalTask>) -> Self {
        task.map_or(Self::Rewards, Self::LmEval)
    }
}

/// A completion, judged in several ways; `None` where the record does not tell.
#[derive(Debug)]
pub(super) struct Judgement<'a> {
    /// Whether the marked answer is right.
    pub strict: Option<bool>,
    /// Whether the last number is right, marked or not.
    pub flexible: Option<bool>,
    /// Whether the answer that the reward `math` finds is right.
    pub math: Option<bool>,
    /// The marked answer.
    pub extracted: Option<Cow<'a, str>>,
    /// Whether it ended at its longest.
    pub truncated: Option<bool>,
}

impl Judge {
    /// The record's rewards by name; none where it has but a `reward`, or needs none.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when a reward is no number, or there is none and rewards judge.
    pub(super) fn rewards(self, record: &Record<'_>) -> Result<Map<String, Value>> {
        let rewards: Option<Map<String, Value>> = record.get_optional("rewards")?;
        if rewards.is_none() && !record.has("reward") && matches!(self, Self::Rewards) {
            return Err(record.error("no field \"rewards\" and no \"reward\": run score first"));
        }
        let rewards = rewards.unwrap_or_default();
        match rewards.iter().find(|(_, value)| !value.is_number() && !value.is_null()) {
            Some((name, _)) => Err(record.error(format!("field \"rewards\": \"{name}\" is neither a number nor null"))),
            None => Ok(rewards),
        }
    }

    /// # Errors
    /// [`crate::Error::Record`] when the record has no `completion`, or a field of the wrong type.
    pub(super) fn judge<'a>(self, record: &Record<'a>, rewards: &Map<String, Value>) -> Result<Judgement<'a>> {
        let completion = prompt::completion(record)?.ok_or_else(|| record.error("no field \"completion\""))?;
        let answer = record.answer()?;
        let finish_reason = record.get_text("finish_reason")?;
        let truncated = finish_reason.map(|reason| reason == "length");
        let is_math = |text: &str| answer.as_deref().map(|answer| math::is_correct(math::extract(text), answer));
        match self {
            Self::Rewards => {
                let strict = is_right(rewards);
                let flexible = answer.as_deref().and_then(|answer| match Number::parse(answer) {
                    Some(number) => Some(Number::last_in(&completion) == Some(number)),
                    None => strict, // a last number cannot be what is no number
                });
                let extracted = record.get_text("extracted")?;
                Ok(Judgement { strict, flexible, math: is_math(&completion), extracted, truncated })
            }
            Self::LmEval(task) => {
                let found = task.read(&completion);
                let is_exact = |one: Option<&str>| answer.as_deref().map(|answer| is_exact_match(one, answer));
                let was_cut = found.text.len() < completion.len();
                Ok(Judgement {
                    strict: is_exact(found.strict),
                    flexible: is_exact(found.flexible),
                    math: is_math(found.text),
                    extracted: found.strict.map(|text| Cow::Owned(text.to_owned())),
                    truncated: truncated.map(|truncated| truncated && !was_cut),
                })
            }
        }
    }
}
