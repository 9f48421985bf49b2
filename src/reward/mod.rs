//! What a completion is worth: five rewards of its text, in two semantics, and one for answers of any form.
//!
//! | reward | most | `seed`, as the notebook's Python | `fixed`, the default |
//! |---|---|---|---|
//! | `correctness` | 2 | text after the last `<answer>` is the answer, character by character | text in the one `<answer>` is the answer, by value (`1,000` = `$1,000` = `1000.0`) |
//! | `int` | 0.5 | that text is `str.isdigit` | that text is a whole number, `-5` and `1,000` too |
//! | `strict_format` | 0.5 | `<reasoning>`, one line, `</reasoning>`, `<answer>`, one line, `</answer>`, each on its own line, and a final newline or two | the same with any number of lines in each part, each tag exactly once, final newline or not |
//! | `soft_format` | 0.5 | starts so, on one line or with white space between the parts only | the same over many lines, each tag exactly once |
//! | `xmlcount` | 0.5 | 0.125 for each tag that stands once with its newlines, less 0.001 for each code point after the answer, counted twice | the same, each tag exactly once anywhere, trailing code points counted once |
//!
//! | `math` | 1 | the answer, however it is marked and written, is the reference answer ([`math`] has the rules) | the same |
//!
//! All are 0 or the most but `xmlcount`, which has steps and no lower bound. Without an `answer` in the record `correctness` and `math` are null.
//! `math` is computed only where it is asked for.
//! Knows nothing of tokens, tensors, models.

pub mod fixed;
pub mod math;
pub mod number;
mod placebo;
pub mod python;
mod score;
pub mod seed;
mod weights;

pub use placebo::Placebo;
pub use score::{Score, Scorer};
pub use weights::{MAX_WEIGHT, Weights};

/// One of the rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reward {
    /// The extracted answer is the right one.
    Correctness,
    /// The extracted answer is a whole number.
    Int,
    /// The text has the format, line by line.
    StrictFormat,
    /// The text has the format, white space aside.
    SoftFormat,
    /// Each tag of the format for itself.
    XmlCount,
    /// The answer is the right one, however it is marked and written.
    Math,
}

impl Reward {
    /// All of them, in the order in which records hold them.
    pub const ALL: [Self; 6] =
        [Self::Correctness, Self::Int, Self::StrictFormat, Self::SoftFormat, Self::XmlCount, Self::Math];

    /// Its name in records and options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Correctness => "correctness",
            Self::Int => "int",
            Self::StrictFormat => "strict_format",
            Self::SoftFormat => "soft_format",
            Self::XmlCount => "xmlcount",
            Self::Math => "math",
        }
    }
}

/// Which reading of the rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Semantics {
    /// Bug for bug what the notebook's Python computes
    Seed,
    /// Many lines of reasoning, each tag exactly once, numbers by value, negative ones too
    Fixed,
}
