//! The loss of each token and its slope, the derivative with respect to the token's log-probability. Knows advantages, not rewards.
//!
//! The sum of `weight * loss` over all tokens of a step is the step's loss; the weights come from the data of the whole step
//! ([`token_weights`]), so that the way it is cut into micro-batches cannot change them.

use crate::error::{Error, Result};

/// Bound on the difference of two log-probabilities before `exp` (nats), as in verl's `core_algos.py`. Beyond it the loss is flat.
pub const MAX_LOG_RATIO: f64 = 20.0;

/// How the losses of tokens are averaged to the loss of a step. Masked and unscored completions have no tokens here.
///
/// # Source
/// TRL `GRPOTrainer`, `loss_type`; Yu et al. 2025, <https://arxiv.org/abs/2503.14476> (DAPO); Liu et al. 2025,
/// <https://arxiv.org/abs/2503.20783> (Dr. GRPO).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum LossKind {
    /// Mean over completions of the mean over each one's tokens: a token of a long completion weighs less
    Grpo,
    /// The same number as dapo. In TRL bnpo takes the mean over each micro-batch, so that its size changes the loss; here it is always
    /// the whole step
    Bnpo,
    /// Sum over all tokens / (completions * --max-completion-tokens): a token's weight depends on no length
    DrGrpo,
    /// Mean over all tokens of the step: each token weighs the same
    Dapo,
}

/// Configures the loss.
#[derive(Debug, Clone, clap::Args)]
pub struct LossConfig {
    /// How the losses of tokens are averaged over a step
    #[arg(long = "loss", value_enum, value_name = "KIND", default_value = "dapo")]
    pub kind: LossKind,
    /// Lower clip range: a token stops contributing once its probability ratio is below 1 - EPSILON
    #[arg(long, value_name = "EPSILON", default_value_t = 0.2)]
    pub epsilon: f64,
    /// Upper clip range: a token stops contributing once its probability ratio is above 1 + EPSILON [default: --epsilon]
    #[arg(long, value_name = "EPSILON")]
    pub epsilon_high: Option<f64>,
    /// Weight of the KL divergence from --reference; at 0 no reference is used
    #[arg(long, default_value_t = 0.0)]
    pub beta: f64,
    /// Give no gradient to completions that were cut off (finish_reason "length")
    #[arg(long)]
    pub mask_truncated: bool,
    /// The longest completion that `rollout` may sample, by which --loss dr_grpo divides (tokens)
    #[arg(long, value_name = "TOKENS")]
    pub max_completion_tokens: Option<usize>,
    /// Correct for rollouts of older weights by importance sampling: weight each token by its probability under the weights that the
    /// step starts with over that under the weights that sampled it, at most C, and clip the ratio to the former. Without it the ratio
    /// is to the weights that sampled the token
    #[arg(long, value_name = "C")]
    pub importance_sampling_clip_max: Option<f64>,
}

impl LossConfig {
    /// Refuses options that contradict each other or are out of range.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        let high = self.epsilon_high.unwrap_or(self.epsilon);
        if !(0.0..1.0).contains(&self.epsilon) || !(0.0..).contains(&high) || !high.is_finite() {
            return Err(Error::Usage(
                "--epsilon must be at least 0 and less than 1, and --epsilon-high at least 0".into(),
            ));
        }
        if !(0.0..).contains(&self.beta) || !self.beta.is_finite() {
            return Err(Error::Usage("--beta must be at least 0".into()));
        }
        if self.importance_sampling_clip_max.is_some_and(|most| !(most > 0.0 && most.is_finite())) {
            return Err(Error::Usage("--importance-sampling-clip-max must be above 0".into()));
        }
        if self.kind == LossKind::DrGrpo && self.max_completion_tokens.is_none_or(|tokens| tokens == 0) {
            return Err(Error::Usage("--loss dr_grpo needs --max-completion-tokens, by which it divides".into()));
        }
        Ok(())
    }
}

/// The weight of each completion's tokens in the step's loss: 1 / denominator.
///
/// `counting[i]` is the number of completion i's tokens that count: its length, or 0 where it is masked. As in TRL, `grpo` and `dr_grpo`
/// divide by masked completions too.
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

/// On which side of the clip range a token's gradient is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clipped {
    /// Not stopped: within the range, or the advantage pulls it back there.
    No,
    /// The ratio is below 1 - epsilon, and the advantage negative.
    Low,
    /// The ratio is above 1 + epsilon_high, and the advantage positive.
    High,
}

/// Log-probabilities of one token (nats).
#[derive(Debug, Clone, Copy)]
pub struct Logprobs {
    /// Under the weights in training.
    pub now: f32,
    /// Under the weights that the clipped ratio is to; `None` when these are in training, so that the ratio is 1.
    pub old: Option<f32>,
    /// Under the weights that sampled it; used with [`LossConfig::importance_sampling_clip_max`] only.
    pub sampled: f32,
    /// Under the reference; required where `beta` is not 0.
    pub reference: Option<f32>,
}

/// The weight of a token in importance sampling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Importance {
    /// Its probability when the step began over that when it was sampled, truncated.
    pub ratio: f64,
    /// Whether truncation changed it.
    pub truncated: bool,
}

/// The loss of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLoss {
    /// `beta` times `kl`, minus the surrogate.
    pub loss: f64,
    /// dloss / dlogprob.
    pub slope: f64,
    /// Estimate of the KL divergence from the reference (nats), weighted by the probability ratio; 0 without a reference.
    pub kl: f64,
    /// Whether the clip range stops the gradient.
    pub clipped: Clipped,
    /// The weight of the surrogate; `None` without importance sampling.
    pub importance: Option<Importance>,
}

impl TokenLoss {
    /// Loss and slope times the token's weight in the step's loss.
    #[must_use]
    pub fn weighted(self, weight: f64) -> Self {
        Self { loss: weight * self.loss, slope: weight * self.slope, ..self }
    }
}

/// The clipped surrogate of one token, with the KL penalty.
///
/// The penalty is weighted by the ratio, whose slope counts even where the ratio is 1: otherwise the gradient of the penalty would not
/// be that of the divergence.
///
/// With [`LossConfig::importance_sampling_clip_max`] the surrogate, but not the penalty, is weighted by the truncated ratio of the old
/// policy to the sampler, a constant. Clipping then keeps the policy near the old one, not near the sampler.
///
/// # Source
/// Schulman et al. 2017, eq. 7, <https://arxiv.org/abs/1707.06347>; k3 of <http://joschu.net/blog/kl-approx.html>; its weight is
/// that of DeepSeek-V3.2, <https://arxiv.org/abs/2512.02556>, and TRL's `use_bias_correction_kl`. The truncated ratio is TRL's
/// `vllm_importance_sampling_mode="token_truncate"`; why clipping may be around another policy than the sampler's: Hilton et al.
/// 2021, <https://arxiv.org/abs/2110.00641>.
#[must_use]
pub fn token_loss(config: &LossConfig, advantage: f64, logprobs: Logprobs) -> TokenLoss {
    let logprob = f64::from(logprobs.now);
    let difference = logprobs.old.map_or(0.0, |old| logprob - f64::from(old));
    let ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
    let (floor, ceiling) = (1.0 - config.epsilon, 1.0 + config.epsilon_high.unwrap_or(config.epsilon));
    let clipped = match advantage {
        a if a < 0.0 && ratio < floor => Clipped::Low,
        a if a > 0.0 && ratio > ceiling => Clipped::High,
        _ => Clipped::No,
    };
    let importance = importance(config, logprobs);
    let advantage = advantage * importance.map_or(1.0, |importance| importance.ratio);
    let surrogate = (ratio * advantage).min(ratio.clamp(floor, ceiling) * advantage);
    let ratio_slope = if difference.abs() > MAX_LOG_RATIO { 0.0 } else { ratio };
    let (k3, k3_slope) = logprobs.reference.map_or((0.0, 0.0), |reference| k3(f64::from(reference) - logprob));
    let (kl, kl_slope) = (ratio * k3, ratio_slope * k3 + ratio * k3_slope);
    TokenLoss {
        loss: config.beta * kl - surrogate,
        slope: config.beta * kl_slope - if clipped == Clipped::No { ratio_slope * advantage } else { 0.0 },
        kl,
        clipped,
        importance,
    }
}

/// The truncated ratio of the old policy to the sampler; `None` without importance sampling.
fn importance(config: &LossConfig, logprobs: Logprobs) -> Option<Importance> {
    let most = config.importance_sampling_clip_max?;
    let difference = f64::from(logprobs.old.unwrap_or(logprobs.now)) - f64::from(logprobs.sampled);
    let ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
    Some(Importance { ratio: ratio.min(most), truncated: ratio > most })
}

/// The k3 estimate for `difference` = log reference - log policy, and its derivative with respect to the policy's log-probability.
fn k3(difference: f64) -> (f64, f64) {
    let bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let excess = bounded.exp_m1(); // exact for the small differences of a policy near its reference
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
            importance_sampling_clip_max: None,
        }
    }

    /// A token that the old policy sampled.
    fn logprobs(now: f32, old: Option<f32>, reference: Option<f32>) -> Logprobs {
        Logprobs { now, old, sampled: old.unwrap_or(now), reference }
    }

    proptest! {
        #[test]
        fn the_slope_is_the_derivative(
            advantage in -3.0f64..3.0, logprob in -6.0f32..-0.1, old in -6.0f32..-0.1, reference in -6.0f32..-0.1,
            sampled in -6.0f32..-0.1, most in prop::option::of(0.5f64..3.0),
        ) {
            let config = LossConfig { importance_sampling_clip_max: most, ..config(LossKind::Dapo, 0.04) };
            let step = 2.0f32.powi(-10);
            let at = |now: f32| {
                token_loss(&config, advantage, Logprobs { now, old: Some(old), sampled, reference: Some(reference) })
            };
            let (below, here, above) = (at(logprob - step), at(logprob), at(logprob + step));
            prop_assume!(below.clipped == above.clipped);
            let width = f64::from(logprob + step) - f64::from(logprob - step);
            let numeric = (above.loss - below.loss) / width;
            prop_assert!((numeric - here.slope).abs() < 1e-4 * (1.0 + here.slope.abs()), "{numeric} {}", here.slope);
        }

        #[test]
        fn kl_is_never_negative(logprob in -30.0f32..0.0, reference in -30.0f32..0.0) {
            let found = token_loss(&config(LossKind::Grpo, 1.0), 0.0, logprobs(logprob, None, Some(reference)));
            prop_assert!(found.kl >= 0.0);
        }

        #[test]
        fn any_log_probabilities_give_a_finite_loss(
            now in -1e30f32..0.0, old in -1e30f32..0.0, sampled in -1e30f32..0.0, reference in -1e30f32..0.0,
        ) {
            let config = LossConfig { importance_sampling_clip_max: Some(1e30), ..config(LossKind::Grpo, 0.1) };
            let found = token_loss(&config, -1.0, Logprobs { now, old: Some(old), sampled, reference: Some(reference) });
            prop_assert!(found.loss.is_finite() && found.slope.is_finite());
        }
    }

    #[test]
    fn without_an_old_policy_the_gradient_is_the_plain_policy_gradient() {
        let found = token_loss(&config(LossKind::Dapo, 0.0), 1.5, logprobs(-3.0, None, None));
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
                let known = logprobs(policy[token].ln(), None, Some(reference[token].ln()));
                token_loss(&config, 0.0, known).slope * (f64::from(u8::from(token == moved)) - f64::from(policy[moved]))
            };
            let expected: f64 = (0..3).map(|token| f64::from(policy[token]) * slope_of(token)).sum();
            assert!((expected - (at(1e-5) - at(-1e-5)) / 2e-5).abs() < 1e-6, "{expected}");
        }
    }

    #[test]
    fn clipping_stops_the_gain_on_each_side_but_never_the_way_back() {
        let config = config(LossKind::Dapo, 0.0);
        let at = |advantage, ratio: f32| token_loss(&config, advantage, logprobs(ratio.ln() - 3.0, Some(-3.0), None));
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

    /// Whatever sampled the tokens, the weighted slopes are on average those of tokens that the policy itself sampled.
    #[test]
    fn importance_makes_good_for_another_sampler_as_far_as_it_is_not_truncated() {
        let (policy, sampler, advantages) = ([0.7f32, 0.2, 0.1], [0.3f32, 0.3, 0.4], [1.0, -2.0, 0.5]);
        let mean_slope = |most: f64, sampled_by: [f32; 3]| -> f64 {
            let config = LossConfig { importance_sampling_clip_max: Some(most), ..config(LossKind::Dapo, 0.0) };
            let slope = |token: usize| {
                let (now, sampled) = (policy[token].ln(), sampled_by[token].ln());
                token_loss(&config, advantages[token], Logprobs { now, old: None, sampled, reference: None }).slope
            };
            (0..3).map(|token| f64::from(sampled_by[token]) * slope(token)).sum()
        };
        let own = mean_slope(10.0, policy);
        assert!((own + (0.7 - 0.4 + 0.05)).abs() < 1e-6, "{own}");
        assert!((mean_slope(10.0, sampler) - own).abs() < 1e-6);
        // The first token is 7/3 times as likely as when it was sampled; half of that counts.
        let truncated = mean_slope(7.0 / 6.0, sampler);
        assert!((truncated + (0.35 - 0.4 + 0.05)).abs() < 1e-6, "{truncated}");
    }

    #[test]
    fn clipping_holds_the_policy_near_the_old_one_and_not_near_the_sampler() {
        let config = LossConfig { importance_sampling_clip_max: Some(2.5), ..config(LossKind::Dapo, 0.0) };
        let at = |now: f32| {
            let known = Logprobs { now: now - 3.0, old: Some(-3.0), sampled: 0.5f32.ln() - 3.0, reference: None };
            token_loss(&config, 1.0, known)
        };
        let near = at(1.1f32.ln());
        assert_eq!(near.clipped, Clipped::No); // though 2.2 times as likely as when it was sampled
        assert!((near.slope + 2.2).abs() < 1e-5, "{near:?}");
        let far = at(1.5f32.ln());
        assert_eq!((far.slope, far.clipped), (0.0, Clipped::High));
        assert!((far.loss + 2.56).abs() < 1e-5, "{far:?}");
        assert_eq!(far.importance.map(|importance| importance.truncated), Some(false));
        assert_eq!(config.check().map_err(|err| err.exit_code()), Ok(()));
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let config = LossConfig { importance_sampling_clip_max: Some(wrong), ..config.clone() };
            assert_eq!(config.check().map_err(|err| err.exit_code()), Err(2), "{wrong}");
        }
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
