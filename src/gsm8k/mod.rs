//! Turns GSM8K rows, read or generated, into prompts. Text only: knows no tokens, tensors or models.

pub mod columns;
pub mod demonstration;
pub mod draw;
pub mod generate;
pub mod lm_eval;
pub mod order;
mod parquet;
pub mod pass_rates;
mod people;
pub mod prompt;
mod python_random;
pub mod run;
pub mod source;
mod things;
mod wording;

use serde_json::value::RawValue;

/// A question with its worked answer.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its position in the split as published, counted from 0.
    pub index: usize,
    /// The question.
    pub question: String,
    /// Reasoning, `####`, and the answer.
    pub answer: String,
    /// Rows with the same number ask in the same way: with the same first word or, if generated, for the same steps.
    pub wording: u64,
    /// The row's other fields, unchanged.
    pub extra: Vec<(String, Box<RawValue>)>,
}

impl Row {
    /// A row of a file; its first word gives its wording.
    #[must_use]
    pub fn new(index: usize, question: String, answer: String) -> Self {
        let first = question.split_whitespace().next().unwrap_or_default();
        let hash = blake3::hash(first.as_bytes());
        let wording = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"));
        Self { index, question, answer, wording, extra: Vec::new() }
    }
}

/// A part of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Split {
    /// Training rows, without those held out for validation
    Train,
    /// Test rows: use them once, at the end
    Test,
    /// The training rows that --holdout holds out
    Validation,
}

impl Split {
    /// The published split with these rows, as in file names and prompt ids: validation rows come from `train`.
    #[must_use]
    pub fn published(self) -> &'static str {
        match self {
            Self::Train | Self::Validation => "train",
            Self::Test => "test",
        }
    }
}

/// The text after the first `####`, up to a second one, stripped; `None` without one.
///
/// # Source
/// Python's `text.split("####")[1].strip()`.
#[must_use]
pub fn final_answer(text: &str) -> Option<&str> {
    text.split("####").nth(1).map(strip)
}

/// Python's `str.strip`: Unicode white space, and the four separators that Unicode does not count as such.
fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_what_python_makes_of_it() {
        assert_eq!(final_answer("It is 3.\n#### 3"), Some("3"));
        assert_eq!(final_answer("x ####\u{a0} 1,000 \x1f\n"), Some("1,000"));
        assert_eq!(final_answer("a #### 1 #### 2"), Some("1"));
        assert_eq!(final_answer("a ######## 2"), Some(""));
        assert_eq!(final_answer("##### 2"), Some("# 2"));
        assert_eq!(final_answer("no marks ### 2"), None);
    }
}
