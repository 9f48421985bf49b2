//! What rewards read of a completion, found once for all of them.

use std::cell::OnceCell;

use super::fixed::Tagged;
use super::{Lengths, Semantics, math, seed};

/// A completion as its rewards see it.
#[derive(Debug)]
pub struct Reading<'a> {
    /// All of it.
    pub text: &'a str,
    /// Where its tags stand.
    pub tagged: Tagged<'a>,
    /// The answer that `correctness` and `int` look at.
    pub extracted: Option<&'a str>,
    /// The reference answer of the record.
    pub answer: Option<&'a str>,
    /// How many tokens it has.
    pub tokens: Option<usize>,
    /// What is long.
    pub lengths: Option<Lengths>,
    math_answer: OnceCell<Option<&'a str>>,
}

impl<'a> Reading<'a> {
    pub fn new(semantics: Semantics, text: &'a str, answer: Option<&'a str>) -> Self {
        let tagged = Tagged::new(text);
        let extracted = match semantics {
            Semantics::Seed => Some(seed::extract(text)),
            Semantics::Fixed => tagged.extract(),
        };
        Self { text, tagged, extracted, answer, tokens: None, lengths: None, math_answer: OnceCell::new() }
    }

    /// The answer that `math` looks at; found when it is first asked for.
    pub fn math_answer(&self) -> Option<&'a str> {
        *self.math_answer.get_or_init(|| math::extract(self.text))
    }
}
