//! Judges completions as lm-evaluation-harness's tasks `gsm8k` and `gsm8k_cot` do: where a completion ends, the answers that its two
//! filters find, and exact match.
//!
//! Nothing is improved: the answer of "The answer is 18" is 1 to `gsm8k_cot`, because its pattern wants one more character.
//!
//! # Source
//! lm-evaluation-harness 0.4.13, `lm_eval/tasks/gsm8k/*.yaml`, version 3.0 of both tasks.

use std::sync::LazyLock;

use regex::Regex;

/// A task of lm-evaluation-harness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LmEvalTask {
    /// Five examples from the train split, drawn anew for each question
    Gsm8k,
    /// The eight examples of the chain-of-thought paper
    #[value(name = "gsm8k_cot")]
    Gsm8kCot,
}
use LmEvalTask::{Gsm8k, Gsm8kCot};

static STRICT: LazyLock<Regex> = LazyLock::new(|| pattern(r"#### (\-?[0-9\.\,]+)"));
static STRICT_COT: LazyLock<Regex> = LazyLock::new(|| pattern(r"The answer is (\-?[0-9\.\,]+)."));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the pattern is a literal")
}

/// What the harness finds in a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LmEvalReading<'a> {
    /// The completion up to its first stop sequence.
    pub text: &'a str,
    /// The answer that `strict-match` finds, `None` for the harness's `[invalid]`.
    pub strict: Option<&'a str>,
    /// The answer that `flexible-extract` finds.
    pub flexible: Option<&'a str>,
}

impl LmEvalTask {
    /// The sequences before which the harness ends a completion.
    fn until(self) -> [&'static str; 3] {
        match self {
            Gsm8k => ["Question:", "</s>", "<|im_end|>"],
            Gsm8kCot => ["Q:", "</s>", "<|im_end|>"],
        }
    }

    /// Reads a completion.
    #[must_use]
    pub fn read(self, completion: &str) -> LmEvalReading<'_> {
        let text = self.until().iter().fold(completion, |text, stop| text.split(stop).next().unwrap_or(text));
        let strict = if self == Gsm8k { &STRICT } else { &STRICT_COT };
        LmEvalReading {
            text,
            strict: strict.captures(text).and_then(|found| found.get(1)).map(|found| found.as_str()),
            flexible: FLEXIBLE.find_iter(text).last().map(|found| found.as_str()),
        }
    }
}

/// Whether an extracted answer is the reference to the harness: the same text but for case, commas, dollar signs, a final full stop and
/// all that stands before the last `#### `.
#[must_use]
pub fn is_exact_match(extracted: Option<&str>, reference: &str) -> bool {
    extracted.is_some_and(|extracted| normal(extracted) == normal(reference))
}

fn normal(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rsplit("#### ").next().unwrap_or(&text);
    text.strip_suffix('.').unwrap_or(text).to_lowercase()
}
