//! Reads from a record's rewards what they say of its completion.

use serde_json::{Map, Value};

/// The rewards that tell whether the answer is right; the first that has a number decides.
const VERDICTS: [&str; 2] = ["correctness", "math"];

/// Whether a reward was earned; `None` when it is missing or null.
#[must_use]
pub fn earned(rewards: &Map<String, Value>, name: &str) -> Option<bool> {
    rewards.get(name).and_then(Value::as_f64).map(|value| value > 0.0)
}

/// Whether the answer is right; `None` when no reward tells.
#[must_use]
pub fn is_right(rewards: &Map<String, Value>) -> Option<bool> {
    VERDICTS.iter().find_map(|name| earned(rewards, name))
}

/// Whether a reward would tell, if the prompt had an answer.
#[must_use]
pub fn has_verdict(rewards: &Map<String, Value>) -> bool {
    VERDICTS.iter().any(|name| rewards.contains_key(*name))
}
