//! Reads sampled groups of a run's steps: prompts and completions with rewards, advantages, and the log-probability of each token.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Map, Value};

use super::plot::number;
use crate::error::Result;
use crate::grpo::advantage::{ScaleRewards, advantages};
use crate::lines::jsonl::Input;
use crate::lines::prompt;
use crate::lines::record::{Line, Record};
use crate::run::Run;
use crate::tokenizer::Tokenizer;

/// Steps that are shown if none are asked for.
const STEPS: usize = 6;

/// Groups that are shown of a step: its first.
const GROUPS: usize = 4;

/// The advantage at which the colour is strongest.
const STRONG: f64 = 2.0;

/// Log-probabilities (nats) that divide tokens by how surprising they were: probabilities of 90 %, 50 %, 10 % and 1 %.
const SURPRISE: [f64; 4] = [-0.105, -0.693, -2.303, -4.605];

/// A step with some of its groups.
#[derive(Debug, Serialize)]
pub struct Step {
    step: u64,
    /// How many groups the step has.
    num_groups: usize,
    reward: String,
    groups: Vec<Group>,
}

/// A prompt and its completions.
#[derive(Debug, Serialize)]
struct Group {
    prompt: Vec<Message>,
    question: String,
    answer: Option<String>,
    reward: String,
    completions: Vec<Completion>,
}

#[derive(Debug, Serialize)]
struct Message {
    role: String,
    content: String,
}

#[derive(Debug, Serialize)]
struct Completion {
    reward: String,
    /// Each part of the reward by name.
    parts: Vec<(String, String)>,
    advantage: String,
    /// `good`, `bad` or empty, for an advantage above, below or of 0.
    tone: &'static str,
    /// How strong its colour is (percent).
    strength: u32,
    extracted: Option<String>,
    is_truncated: bool,
    num_tokens: usize,
    /// Empty where the tokens' texts are not known.
    tokens: Vec<Token>,
    text: String,
}

#[derive(Debug, Serialize)]
struct Token {
    text: String,
    /// Log-probability and probability, as text.
    title: String,
    /// How surprising it was, from 0 on.
    surprise: usize,
}

/// The steps to show of those that there are: the ones asked for, else some that are spread over the run, with its first and its last.
#[must_use]
pub fn choose(there: &[u64], asked: &[u64]) -> Vec<u64> {
    if !asked.is_empty() {
        return there.iter().copied().filter(|step| asked.contains(step)).collect();
    }
    let last = there.len().saturating_sub(1);
    let mut places: Vec<usize> = (0..STEPS).map(|at| (at * last + (STEPS - 1) / 2) / (STEPS - 1)).collect();
    places.dedup();
    places.into_iter().filter_map(|place| there.get(place).copied()).collect()
}

/// Reads a step of a run. Advantages are those of `scale`. Only the groups that are shown are held.
///
/// # Errors
/// [`crate::Error::Io`], and [`crate::Error::Record`] when a record is damaged.
pub fn read(run: &Run, step: u64, scale: ScaleRewards, tokenizer: Option<&Tokenizer>) -> Result<Step> {
    let (mut rewards, mut kept): (Vec<Vec<Option<f64>>>, Vec<Vec<Line>>) = (Vec::new(), Vec::new());
    let mut current = String::new();
    for line in Input::open(&run.rollouts(step))? {
        let line = line?;
        let record = line.record()?;
        let group = record.get_written("group_id")?.unwrap_or_default();
        if rewards.is_empty() || group != current {
            current = group.into_owned();
            rewards.push(Vec::new());
            kept.push(Vec::new());
        }
        rewards.last_mut().expect("just pushed").push(record.get_optional("reward")?);
        if rewards.len() <= GROUPS {
            kept.last_mut().expect("just pushed").push(line);
        }
    }
    let found = advantages(&rewards, scale, false);
    let shown = kept.iter().take(GROUPS).enumerate();
    let groups = shown.map(|(at, lines)| group(lines, &found.groups[at], tokenizer)).collect::<Result<_>>()?;
    Ok(Step { step, num_groups: rewards.len(), reward: number(found.reward_mean), groups })
}

fn group(lines: &[Line], advantages: &[f64], tokenizer: Option<&Tokenizer>) -> Result<Group> {
    let first = lines.first().expect("a group begins with a record").record()?;
    let prompt = messages(first.get_optional("prompt")?.unwrap_or_default());
    let question = prompt.last().map(|message| message.content.clone()).unwrap_or_default();
    let answer = first.answer()?.map(|answer| answer.into_owned());
    let (mut sum, mut count, mut completions) = (0.0, 0.0, Vec::new());
    for (line, advantage) in lines.iter().zip(advantages) {
        let record = line.record()?;
        if let Some(reward) = record.get_optional::<f64>("reward")? {
            (sum, count) = (sum + reward, count + 1.0);
        }
        completions.push(completion(&record, *advantage, tokenizer)?);
    }
    let reward = if count > 0.0 { number(sum / count) } else { "null".into() };
    Ok(Group { prompt, question, answer, reward, completions })
}

/// A text is one message of the user.
fn messages(prompt: Value) -> Vec<Message> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let message = |value: &Value| Message {
        role: value.get("role").map(text).unwrap_or_default(),
        content: value.get("content").map(text).unwrap_or_default(),
    };
    match prompt {
        Value::Null => Vec::new(),
        Value::Array(messages) => messages.iter().map(message).collect(),
        other => vec![Message { role: "user".into(), content: text(&other) }],
    }
}

fn completion(record: &Record<'_>, advantage: f64, tokenizer: Option<&Tokenizer>) -> Result<Completion> {
    let reward: Option<f64> = record.get_optional("reward")?;
    let parts: Map<String, Value> = record.get_optional("rewards")?.unwrap_or_default();
    let words = |value: &Value| value.as_f64().map_or_else(|| value.to_string(), number);
    let ids: Vec<u32> = record.get_optional("completion_token_ids")?.unwrap_or_default();
    let logprobs: Vec<f64> = record.get_optional("logprobs")?.unwrap_or_default();
    let pieces = match tokenizer {
        Some(tokenizer) if ids.len() == logprobs.len() => tokenizer.pieces(&ids)?,
        _ => Vec::new(),
    };
    let finish_reason = record.get_text("finish_reason")?;
    Ok(Completion {
        reward: reward.map_or("null".into(), number),
        parts: parts.iter().map(|(name, value)| (name.clone(), words(value))).collect(),
        advantage: signed(advantage),
        tone: if advantage > 0.0 {
            "good"
        } else if advantage < 0.0 {
            "bad"
        } else {
            ""
        },
        strength: (100.0 * (advantage.abs() / STRONG).min(1.0)).round() as u32,
        extracted: record.get_text("extracted")?.map(|text| text.into_owned()),
        is_truncated: finish_reason.as_deref() == Some("length"),
        num_tokens: ids.len(),
        tokens: pieces.into_iter().zip(&logprobs).map(|(text, logprob)| token(text, *logprob)).collect(),
        text: prompt::completion(record)?.map(|text| text.into_owned()).unwrap_or_default(),
    })
}

fn token(text: String, logprob: f64) -> Token {
    let mut title = String::new();
    write!(title, "{logprob:.3} nats, {:.1} %", 100.0 * logprob.exp()).expect("a string takes all");
    Token { text, title, surprise: SURPRISE.iter().filter(|limit| logprob < **limit).count() }
}

fn signed(value: f64) -> String {
    if value == 0.0 { "0".into() } else { format!("{value:+.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_shown_are_spread_from_the_first_to_the_last() {
        let all: Vec<u64> = (1..=150).collect();
        assert_eq!(choose(&all, &[]), [1, 31, 61, 90, 120, 150]);
        assert_eq!(choose(&all, &[7, 151, 3]), [3, 7]);
        assert_eq!(choose(&[4, 5], &[]), [4, 5]);
        assert_eq!(choose(&[4], &[]), [4]);
        assert!(choose(&[], &[]).is_empty());
    }

    #[test]
    fn tokens_are_told_apart_by_how_likely_they_were() {
        let surprise = |logprob| token(String::new(), logprob).surprise;
        assert_eq!([0.0, -0.5, -1.0, -3.0, -9.0].map(surprise), [0, 1, 2, 3, 4]);
        assert_eq!(token("x".into(), -0.5).title, "-0.500 nats, 60.7 %");
    }

    #[test]
    fn a_prompt_may_be_a_text_or_messages() {
        let of = |value| messages(value).into_iter().map(|one| (one.role, one.content)).collect::<Vec<_>>();
        assert_eq!(of("hi".into()), [("user".to_owned(), "hi".to_owned())]);
        let parts = serde_json::json!([{"role": "system", "content": "be"}, {"role": "user", "content": [1]}]);
        assert_eq!(of(parts)[1], ("user".to_owned(), "[1]".to_owned()));
        assert!(of(Value::Null).is_empty());
    }
}
