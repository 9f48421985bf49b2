//! The distribution that tokens are sampled from: what the CPU's sampler and the GPU's kernels both implement.

use crate::error::{Error, Result};

/// The distribution that tokens are sampled from. Definitions are those of transformers, and so is the order: repetition penalty,
/// temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Sample among this many of the likeliest tokens; 0 is off.
    pub top_k: usize,
    /// Sample among the likeliest tokens whose probabilities together reach this sum; 1 is off.
    pub top_p: f32,
    /// Sample among tokens at least this fraction as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Divides positive logits and multiplies negative ones of tokens that already occur in the prompt or the completion; 1 is off.
    pub repetition_penalty: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// Refuses numbers that define no distribution.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the number that is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = if !(self.temperature == 0.0 || (1e-4..=1e4).contains(&self.temperature)) {
            "temperature is neither 0 nor from 0.0001 to 10000"
        } else if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            "top-p is not above 0 and at most 1"
        } else if !(0.0..=1.0).contains(&self.min_p) {
            "min-p is not from 0 to 1"
        } else if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            "repetition-penalty is not above 0"
        } else {
            return Ok(());
        };
        Err(Error::Usage(wrong.into()))
    }
}
