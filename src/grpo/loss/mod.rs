//! The loss of each token and its slope, the derivative with respect to the token's log-probability. Knows advantages, not rewards.
//!
//! The sum of `weight * loss` over all tokens of a step is the step's loss; the weights come from the data of the whole step
//! ([`token_weights`]), so that the way it is cut into micro-batches cannot change them.

mod config;
mod importance;
mod kind;
mod kl;
mod sequence;
mod surrogate;
#[cfg(test)]
mod tests;

pub use config::LossConfig;
pub use importance::{Importance, ImportanceMode};
pub use kind::{LossKind, RatioLevel};
pub use kl::KlEstimator;
pub use sequence::{Known, SequenceLoss, Survey, TokenLoss};
pub use surrogate::Clipped;

use kind::{Average, Objective};

/// Bound on the difference of two log-probabilities before `exp` (nats), as in verl's `core_algos.py`. Beyond it the loss is flat.
pub const MAX_LOG_RATIO: f64 = 20.0;

/// The weight of each completion's tokens in the step's loss: 1 / denominator.
///
/// `counting[i]` is the number of completion i's tokens that count: its length, or 0 where it is masked. As in TRL, the means over
/// completions divide by masked completions too.
#[must_use]
pub fn token_weights(config: &LossConfig, counting: &[usize]) -> Vec<f64> {
    let completions = counting.len() as f64;
    let tokens = counting.iter().sum::<usize>().max(1) as f64;
    let (average, ..) = config.kind.parts();
    let weight = |length: usize| match average {
        Average::OverCompletions => 1.0 / (completions * length.max(1) as f64),
        Average::OverTokens => 1.0 / tokens,
        Average::OverLongest => 1.0 / (completions * config.max_completion_tokens.unwrap_or(1) as f64),
        Average::OfSums => 1.0 / completions,
    };
    counting.iter().map(|length| weight(*length)).collect()
}
