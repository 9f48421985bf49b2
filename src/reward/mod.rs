//! What a completion is worth: the notebooks' five rewards of its text, in two semantics, and others on request.
//!
//! | reward | most | `seed`, as the notebook's Python | `fixed`, the default |
//! |---|---|---|---|
//! | `correctness` | 2 | the text after the last `<answer>` equals the answer, character by character | the text in the one `<answer>` equals the answer by value (`1,000` = `$1,000` = `1000.0`) |
//! | `int` | 0.5 | that text is `str.isdigit` | that text is a whole number; `-5` and `1,000` are |
//! | `strict_format` | 0.5 | `<reasoning>`, one line, `</reasoning>`, `<answer>`, one line, `</answer>`, each on its own line, and a final newline or two | the same with any number of lines in each part, each tag exactly once, final newline or not |
//! | `soft_format` | 0.5 | begins with both parts, on one line or with nothing but white space between them | the same over many lines, each tag exactly once |
//! | `xmlcount` | 0.5 | 0.125 for each tag that occurs once with its newlines, minus 0.001 for each code point after the answer, counted twice | the same, each tag exactly once anywhere, trailing code points counted once |
//! | `math` | 1 | the answer, however it is marked and written, equals the reference answer ([`math`] has the rules) | the same |
//! | `similarity` | 1 | the longest common subsequence of words with the answer (ROUGE-L) | the same |
//! | `repetition` | 0 | minus the share of phrases of three words that occurred before | the same |
//! | `length` | 0 | minus the share of the longest completion's tokens | the same |
//! | `soft_overlong` | 0 | minus how far it is into the last tokens before the longest (DAPO) | the same |
//!
//! The first six are 0 or their most, except `xmlcount`, which has steps and no lower bound. Without an `answer` in the record, `correctness`,
//! `math` and `similarity` are null. To add a reward, add a row to [`REWARDS`].
//!
//! Knows nothing of tensors and models, and of tokens only their number.

mod command;
mod earned;
pub mod fixed;
pub mod lm_eval;
pub mod math;
pub mod number;
mod placebo;
pub mod python;
mod reading;
mod score;
pub mod seed;
pub mod text;
mod weights;

pub use command::Workers;
pub use earned::{earned, has_verdict, is_right};
pub use placebo::Placebo;
use reading::Reading;
pub use score::{Score, Scorer};
pub use text::Lengths;
pub use weights::{MAX_WEIGHT, RewardWeights};

/// What one reward gives a completion; `None` when the record lacks what it needs.
type Value = fn(&Reading<'_>) -> Option<f64>;

/// A reward: a row of [`REWARDS`].
#[derive(Debug)]
pub struct Reward {
    /// Its name in records and options.
    pub name: &'static str,
    /// The most it gives.
    pub most: f64,
    /// Whether it counts, with weight 1, when no weights are given.
    pub by_default: bool,
    seed: Value,
    fixed: Value,
}

/// All rewards, in the order of the five functions of the notebook.
pub static REWARDS: [Reward; 10] = [
    Reward {
        name: "correctness",
        most: 2.0,
        by_default: true,
        seed: |it| it.answer.map(|answer| all(2.0, it.extracted == Some(answer))),
        fixed: |it| it.answer.map(|answer| all(2.0, fixed::is_correct(it.extracted, answer))),
    },
    Reward {
        name: "int",
        most: 0.5,
        by_default: true,
        seed: |it| Some(all(0.5, it.extracted.is_some_and(python::is_digit))),
        fixed: |it| Some(all(0.5, fixed::is_integer(it.extracted))),
    },
    Reward {
        name: "strict_format",
        most: 0.5,
        by_default: true,
        seed: |it| Some(all(0.5, seed::is_strict_format(it.text))),
        fixed: |it| Some(all(0.5, it.tagged.is_strict_format())),
    },
    Reward {
        name: "soft_format",
        most: 0.5,
        by_default: true,
        seed: |it| Some(all(0.5, seed::is_soft_format(it.text))),
        fixed: |it| Some(all(0.5, it.tagged.is_soft_format())),
    },
    Reward {
        name: "xmlcount",
        most: 0.5,
        by_default: true,
        seed: |it| Some(seed::count_xml(it.text)),
        fixed: |it| Some(it.tagged.count_xml()),
    },
    on_request(MATH, 1.0, |it| it.answer.map(|answer| all(1.0, math::is_correct(it.math_answer(), answer)))),
    on_request("similarity", 1.0, |it| it.answer.map(|answer| text::similarity(it.text, answer))),
    on_request("repetition", 0.0, |it| Some(text::repetition(it.text))),
    on_request(LENGTH, 0.0, |it| Some(text::length(it.tokens?, it.lengths?))),
    on_request(SOFT_OVERLONG, 0.0, |it| Some(text::soft_overlong(it.tokens?, it.lengths?))),
];

/// A reward that counts only when it is asked for, and is the same in both semantics.
const fn on_request(name: &'static str, most: f64, value: Value) -> Reward {
    Reward { name, most, by_default: false, seed: value, fixed: value }
}

/// The reward for answers of any form.
const MATH: &str = "math";
/// The rewards that need to know what is long.
const LENGTH: &str = "length";
const SOFT_OVERLONG: &str = "soft_overlong";

/// All of a reward or nothing.
fn all(most: f64, earned: bool) -> f64 {
    if earned { most } else { 0.0 }
}

impl Reward {
    /// The reward of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        REWARDS.iter().find(|reward| reward.name == name)
    }

    fn value(&self, semantics: Semantics, reading: &Reading<'_>) -> Option<f64> {
        match semantics {
            Semantics::Seed => (self.seed)(reading),
            Semantics::Fixed => (self.fixed)(reading),
        }
    }
}

/// Which version of the rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Semantics {
    /// Bug for bug what the notebook's Python computes
    Seed,
    /// Many lines of reasoning, each tag exactly once, numbers by value, negative ones too
    Fixed,
}
