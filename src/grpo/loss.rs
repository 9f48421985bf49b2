//! The loss of each token and its slope, the derivative after the token's log-probability. Knows advantages, not rewards.
//!
//! The sum of `weight * loss` over all tokens of a step is the step's loss; the weights come from the data of the whole step
//! ([`token_weights`]), so that the way it is cut into micro-batches cannot change them.

use serde::Serialize;

use crate::error::{Error, Result};

/// Bound of |difference of log-probabilities| before `exp` [nats]; beyond it the loss is flat. As verl, `core_algos.py`.
pub const MAX_LOG_RATIO: f64 = 20.0;

/// How token losses become the step's loss. With B completions, and tokens that count t:
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LossKind {
    /// Mean over completions of the mean over tokens
    Grpo,
    /// Mean over all tokens of the step
    Bnpo,
    /// Sum over tokens / (completions * --max-completion-tokens)
    DrGrpo,
    /// Mean over all tokens of the step
    Dapo,
}

/// Numbers of the loss.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct LossConfig {
    /// How token losses are averaged over a step
    #[arg(long = "loss", value_enum, value_name = "KIND", default_value = "dapo")]
    pub kind: LossKind,
    /// Clip range below: no further gain once the probability ratio is under 1 - EPSILON
    #[arg(long, value_name = "EPSILON", default_value_t = 0.2)]
    pub epsilon: f64,
    /// Clip range above: no further gain once the ratio is over 1 + EPSILON [default: that of --epsilon]
    #[arg(long, value_name = "EPSILON")]
    pub epsilon_high: Option<f64>,
    /// Weight of the KL divergence from --reference; 0 needs no reference
    #[arg(long, default_value_t = 0.0)]
    pub beta: f64,
    /// Give completions that were cut off (finish_reason "length") no gradient
    #[arg(long)]
    pub mask_truncated: bool,
    /// What `dr_grpo` divides by, the longest completion that `rollout` was allowed [tokens]
    #[arg(long, value_name = "TOKENS")]
    pub max_completion_tokens: Option<usize>,
}

impl LossConfig {
    /// Refuses numbers that contradict each other.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        let high = self.epsilon_high.unwrap_or(self.epsilon);
        if !(0.0..1.0).contains(&self.epsilon) || !(0.0..).contains(&high) || !high.is_finite() {
            return Err(Error::Usage("--epsilon must be in 0 to 1, and --epsilon-high at least 0".into()));
        }
        if !(0.0..).contains(&self.beta) || !self.beta.is_finite() {
            return Err(Error::Usage("--beta must be at least 0".into()));
        }
        if self.kind == LossKind::DrGrpo && self.max_completion_tokens.is_none_or(|tokens| tokens == 0) {
            return Err(Error::Usage("--loss dr_grpo divides by --max-completion-tokens; give it".into()));
        }
        Ok(())
    }
}

/// The weight of each completion's tokens in the step's loss: 1 / denominator.
///
/// `counting[i]` is the number of completion i's tokens that count: its length, or 0 where it is masked. A masked completion
/// still is one of the B that `grpo` and `dr_grpo` divide by, as in TRL.
#[must_use]
pub fn token_weights(config: &LossConfig, counting: &[usize]) -> Vec<f64> {
    let completions = counting.len() as f64;
    let tokens = counting.iter().sum::<usize>().max(1) as f64;
    let weight = |length: usize| match config.kind {
        LossKind::Grpo => 1.0 / (completions * length.max(1) as f64),
        LossKind::Bnpo | LossKind::Dapo => 1.0 / tokens,
        LossKind::DrGrpo => 1.0 / (completions * config.max_completion_tokens.unwrap_or(1) as f64),
    };
    counting.iter().map(|length| weight(*length)).collect()
}

/// Which side of the clip range a token is beyond, where that stops its gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clipped {
    /// Within the range, or on the side from which the advantage pulls it back.
    No,
    /// Ratio under 1 - epsilon, and the advantage negative.
    Low,
    /// Ratio over 1 + epsilon_high, and the advantage positive.
    High,
}

/// One token's part of the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLoss {
    /// Surrogate and `beta` times `kl`.
    pub loss: f64,
    /// dloss / dlogprob.
    pub slope: f64,
    /// Estimate of the KL divergence from the reference [nats], weighted with the probability ratio; 0 without a reference.
    pub kl: f64,
    /// Whether the clip range stops the gradient.
    pub clipped: Clipped,
}

impl TokenLoss {
    /// With the token's weight in the loss.
    #[must_use]
    pub fn weighted(self, weight: f64) -> Self {
        Self { loss: weight * self.loss, slope: weight * self.slope, ..self }
    }
}

/// The clipped surrogate of one token, with the KL penalty.
///
/// `logprob` is the token's under the weights in training [nats], `old` under those that sampled it; without `old` they are the
/// same weights, and the ratio is 1 by construction. `reference` is needed where `beta` is not 0.
///
/// The penalty is weighted with the ratio, which has a slope even where it is 1: only so is the penalty's gradient that of the
/// divergence.
///
/// # Source
/// Schulman et al. 2017, eq. 7, <https://arxiv.org/abs/1707.06347>; k3 of <http://joschu.net/blog/kl-approx.html>; its weight is
/// that of DeepSeek-V3.2, <https://arxiv.org/abs/2512.02556>, and TRL's `use_bias_correction_kl`.
#[must_use]
pub fn token_loss(
    config: &LossConfig,
    advantage: f64,
    logprob: f32,
    old: Option<f32>,
    reference: Option<f32>,
) -> TokenLoss {
    let logprob = f64::from(logprob);
    let difference = old.map_or(0.0, |old| logprob - f64::from(old));
    let ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
    let (floor, ceiling) = (1.0 - config.epsilon, 1.0 + config.epsilon_high.unwrap_or(config.epsilon));
    let clipped = match advantage {
        a if a < 0.0 && ratio < floor => Clipped::Low,
        a if a > 0.0 && ratio > ceiling => Clipped::High,
        _ => Clipped::No,
    };
    let surrogate = (ratio * advantage).min(ratio.clamp(floor, ceiling) * advantage);
    let ratio_slope = if difference.abs() > MAX_LOG_RATIO { 0.0 } else { ratio };
    let (k3, k3_slope) = reference.map_or((0.0, 0.0), |reference| k3(f64::from(reference) - logprob));
    let (kl, kl_slope) = (ratio * k3, ratio_slope * k3 + ratio * k3_slope);
    TokenLoss {
        loss: config.beta * kl - surrogate,
        slope: config.beta * kl_slope - if clipped == Clipped::No { ratio_slope * advantage } else { 0.0 },
        kl,
        clipped,
    }
}

/// k3 of `difference` = log reference - log policy, and its derivative after the policy's log-probability.
fn k3(difference: f64) -> (f64, f64) {
    let bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let excess = bounded.exp_m1(); // exp - 1, without losing the small differences of a policy near its reference
    (excess - bounded, if bounded == difference { -excess } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(kind: LossKind, beta: f64) -> LossConfig {
        LossConfig {
            kind,
            epsilon: 0.2,
            epsilon_high: Some(0.28),
            beta,
            mask_truncated: false,
            max_completion_tokens: Some(10),
        }
    }

    proptest! {
        #[test]
        fn the_slope_is_the_derivative(
            advantage in -3.0f64..3.0, logprob in -6.0f32..-0.1, old in -6.0f32..-0.1, reference in -6.0f32..-0.1,
        ) {
            let config = config(LossKind::Dapo, 0.04);
            let step = 2.0f32.powi(-10);
            let at = |logprob: f32| token_loss(&config, advantage, logprob, Some(old), Some(reference));
            let (below, here, above) = (at(logprob - step), at(logprob), at(logprob + step));
            prop_assume!(below.clipped == above.clipped);
            let width = f64::from(logprob + step) - f64::from(logprob - step);
            let numeric = (above.loss - below.loss) / width;
            prop_assert!((numeric - here.slope).abs() < 1e-4 * (1.0 + here.slope.abs()), "{numeric} {}", here.slope);
        }

        #[test]
        fn kl_is_never_negative(logprob in -30.0f32..0.0, reference in -30.0f32..0.0) {
            prop_assert!(token_loss(&config(LossKind::Grpo, 1.0), 0.0, logprob, None, Some(reference)).kl >= 0.0);
        }

        #[test]
        fn any_log_probabilities_give_a_finite_loss(
            logprob in -1e30f32..0.0, old in -1e30f32..0.0, reference in -1e30f32..0.0,
        ) {
            let found = token_loss(&config(LossKind::Grpo, 0.1), -1.0, logprob, Some(old), Some(reference));
            prop_assert!(found.loss.is_finite() && found.slope.is_finite());
        }
    }

    #[test]
    fn without_an_old_policy_the_gradient_is_the_plain_policy_gradient() {
        let found = token_loss(&config(LossKind::Dapo, 0.0), 1.5, -3.0, None, None);
        assert_eq!((found.loss, found.slope, found.clipped), (-1.5, -1.5, Clipped::No));
    }

    #[test]
    fn the_expected_slope_of_the_penalty_is_the_gradient_of_the_divergence() {
        let config = config(LossKind::Dapo, 1.0);
        let (policy, reference) = ([0.7f32, 0.2, 0.1], [0.3f32, 0.3, 0.4]);
        let divergence = |logits: [f64; 3]| -> f64 {
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            let terms = logits.iter().zip(reference).map(|(logit, q)| (logit.exp() / sum, f64::from(q)));
            terms.map(|(p, q)| p * (p / q).ln()).sum()
        };
        let logits = policy.map(|p| f64::from(p).ln());
        for moved in 0..3 {
            let at = |offset: f64| {
                let mut logits = logits;
                logits[moved] += offset;
                divergence(logits)
            };
            let slope_of = |token: usize| {
                let slope = token_loss(&config, 0.0, policy[token].ln(), None, Some(reference[token].ln())).slope;
                slope * (f64::from(u8::from(token == moved)) - f64::from(policy[moved]))
            };
            let expected: f64 = (0..3).map(|token| f64::from(policy[token]) * slope_of(token)).sum();
            assert!((expected - (at(1e-5) - at(-1e-5)) / 2e-5).abs() < 1e-6, "{expected}");
        }
    }

    #[test]
    fn clipping_stops_the_gain_on_each_side_but_never_the_way_back() {
        let config = config(LossKind::Dapo, 0.0);
        let at = |advantage, ratio: f32| token_loss(&config, advantage, ratio.ln() - 3.0, Some(-3.0), None);
        let high = at(1.0, 1.5);
        assert_eq!((high.slope, high.clipped), (0.0, Clipped::High));
        assert!((high.loss + 1.28).abs() < 1e-6);
        let low = at(-1.0, 0.5);
        assert_eq!((low.slope, low.clipped), (0.0, Clipped::Low));
        assert!((low.loss - 0.8).abs() < 1e-6);
        for (advantage, ratio) in [(-1.0, 1.5), (1.0, 0.5)] {
            let back = at(advantage, ratio);
            assert_eq!(back.clipped, Clipped::No);
            assert!((back.slope + advantage * f64::from(ratio)).abs() < 1e-6);
        }
        assert_eq!(at(1.0, 1.27).clipped, Clipped::No);
    }

    #[test]
    fn weights_sum_to_what_each_loss_averages_over() {
        let lengths = [4, 1, 0, 5];
        let total = |kind| {
            let weights = token_weights(&config(kind, 0.0), &lengths);
            weights.iter().zip(lengths).map(|(weight, length)| weight * length as f64).sum::<f64>()
        };
        assert!((total(LossKind::Grpo) - 0.75).abs() < 1e-12); // three of four completions count
        assert!((total(LossKind::Bnpo) - 1.0).abs() < 1e-12);
        assert!((total(LossKind::Dapo) - 1.0).abs() < 1e-12);
        assert!((total(LossKind::DrGrpo) - 10.0 / 40.0).abs() < 1e-12);
    }

    #[test]
    fn dr_grpo_without_its_length_is_a_usage_error() {
        let mut config = config(LossKind::DrGrpo, 0.0);
        config.max_completion_tokens = None;
        assert_eq!(config.check().unwrap_err().exit_code(), 2);
    }
}
