//! The loss of each token and its slope, the derivative with respect to the token's log-probability. Knows advantages, not rewards.
//!
//! The sum of `weight * loss` over all tokens of a step is the step's loss; the weights come from the data of the whole step
//! ([`token_weights`]), so that the way it is cut into micro-batches cannot change them.

mod importance;
mod kl;
mod sequence;
mod surrogate;

pub use importance::{Importance, ImportanceMode};
pub use kl::KlEstimator;
pub use sequence::{Known, SequenceLoss, Survey, TokenLoss};
pub use surrogate::Clipped;

use crate::error::{Error, Result};

/// Bound on the difference of two log-probabilities before `exp` (nats), as in verl's `core_algos.py`. Beyond it the loss is flat.
pub const MAX_LOG_RATIO: f64 = 20.0;

/// What a token's loss is, and how the losses of tokens are averaged to the loss of a step. Masked and unscored completions have no
/// tokens here.
///
/// # Source
/// TRL `GRPOTrainer`, `loss_type`; Shao et al. 2024, <https://arxiv.org/abs/2402.03300> (GRPO); Liu et al. 2025,
/// <https://arxiv.org/abs/2503.20783> (Dr. GRPO); Yu et al. 2025, <https://arxiv.org/abs/2503.14476> (DAPO); MiniMax 2025,
/// <https://arxiv.org/abs/2506.13585> (CISPO); Gao et al. 2025, <https://arxiv.org/abs/2511.20347> (SAPO); Zheng et al. 2025,
/// <https://arxiv.org/abs/2507.18071> (GSPO); LUSPO, <https://arxiv.org/abs/2602.05261>.
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
    /// As dapo, but the ratio is a constant weight of the token's log-probability, at most --epsilon-high: no token loses its gradient
    Cispo,
    /// As grpo, but the gain fades smoothly as the ratio leaves 1, instead of being clipped
    Sapo,
    /// As grpo, with one ratio for the whole completion: the geometric mean of its tokens'
    Gspo,
    /// As gspo, but a completion weighs as much as it has tokens
    Luspo,
}

/// How the losses of tokens are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Average {
    /// Over a completion's tokens, then over completions.
    OverCompletions,
    /// Over all tokens.
    OverTokens,
    /// Over completions of the longest length.
    OverLongest,
    /// Over completions, of the sums over their tokens.
    OfSums,
}

/// What rises with the probability of a token of positive advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Objective {
    /// The ratio, until it leaves the clip range.
    Clipped,
    /// The log-probability, times the truncated ratio.
    WeightedLogprob,
    /// A sigmoid of the ratio.
    Soft,
}

/// Whose probability ratio weighs a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum RatioLevel {
    /// The token's own
    Token,
    /// The geometric mean over the completion's tokens: one number, whose gradient reaches all of them (GSPO)
    Sequence,
    /// The same number, with the gradient of each token for itself (GSPO-token)
    SequenceToken,
}

impl LossKind {
    /// How it averages, what it averages, and whose ratio that depends on.
    fn parts(self) -> (Average, Objective, RatioLevel) {
        use {Average::*, Objective::*, RatioLevel::*};
        match self {
            Self::Grpo => (OverCompletions, Clipped, Token),
            Self::Bnpo | Self::Dapo => (OverTokens, Clipped, Token),
            Self::DrGrpo => (OverLongest, Clipped, Token),
            Self::Cispo => (OverTokens, WeightedLogprob, Token),
            Self::Sapo => (OverCompletions, Soft, Token),
            Self::Gspo => (OverCompletions, Clipped, Sequence),
            Self::Luspo => (OfSums, Clipped, Sequence),
        }
    }
}

/// Configures the loss.
#[derive(Debug, Clone, clap::Args)]
pub struct LossConfig {
    /// What a token's loss is, and how the losses of tokens are averaged over a step
    #[arg(long = "loss", value_enum, value_name = "KIND", default_value = "dapo")]
    pub kind: LossKind,
    /// Lower clip range: a token stops contributing once its probability ratio is below 1 - EPSILON
    #[arg(long, value_name = "EPSILON", default_value_t = 0.2)]
    pub epsilon: f64,
    /// Upper clip range: a token stops contributing once its probability ratio is above 1 + EPSILON [default: --epsilon]. With
    /// --loss cispo, the largest weight itself, like 5
    #[arg(long, value_name = "EPSILON")]
    pub epsilon_high: Option<f64>,
    /// Also stop the gradient where the ratio is above DELTA and the advantage negative (dual clip)
    #[arg(long, value_name = "DELTA")]
    pub delta: Option<f64>,
    /// Whose probability ratio weighs a token [default: sequence for --loss gspo and luspo, else token]
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub ratio_level: Option<RatioLevel>,
    /// How fast the gain of --loss sapo fades where the advantage is positive
    #[arg(long, value_name = "TEMPERATURE", default_value_t = 1.0)]
    pub sapo_temperature_pos: f64,
    /// How fast it fades where the advantage is negative
    #[arg(long, value_name = "TEMPERATURE", default_value_t = 1.05)]
    pub sapo_temperature_neg: f64,
    /// Weight of the KL divergence from --reference; at 0 no reference is used
    #[arg(long, default_value_t = 0.0)]
    pub beta: f64,
    /// Estimate of that divergence, for d = log policy - log reference of a sampled token
    #[arg(long, value_enum, value_name = "ESTIMATOR", default_value = "k3-weighted")]
    pub kl_estimator: KlEstimator,
    /// Weight of the mean entropy of the step's tokens, which the loss falls by: a positive one keeps the policy exploring
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0, allow_hyphen_values = true)]
    pub entropy_coef: f64,
    /// Give no gradient to completions that were cut off (finish_reason "length")
    #[arg(long)]
    pub mask_truncated: bool,
    /// Fraction of the step's tokens, those of the highest entropy, that get a gradient besides that of the KL divergence
    #[arg(long, value_name = "FRACTION", default_value_t = 1.0)]
    pub top_entropy_quantile: f64,
    /// Completions of negative advantage get no gradient besides that of the KL divergence once the policy has moved away from them:
    /// their log-probability fell by more than NATS per token since they were sampled
    #[arg(long, value_name = "NATS")]
    pub off_policy_mask_threshold: Option<f64>,
    /// The longest completion that `rollout` may sample, by which --loss dr_grpo divides (tokens)
    #[arg(long, value_name = "TOKENS")]
    pub max_completion_tokens: Option<usize>,
    /// Correct for rollouts of older weights by importance sampling: weight each token by its probability under the weights that the
    /// step starts with over that under the weights that sampled it, at most C, and clip the ratio to the former. Without it the ratio
    /// is to the weights that sampled the token
    #[arg(long, value_name = "C")]
    pub importance_sampling_clip_max: Option<f64>,
    /// The smallest such weight [default: none]
    #[arg(long, value_name = "C", requires = "importance_sampling_clip_max")]
    pub importance_sampling_clip_min: Option<f64>,
    /// What to do with weights out of these bounds, and whether they are those of tokens or, as a product, of whole completions
    #[arg(long, value_enum, value_name = "MODE", default_value = "token_truncate")]
    pub importance_sampling_mode: ImportanceMode,
}

impl LossConfig {
    /// Refuses options that contradict each other or are out of range.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str| Err(Error::Usage(what.into()));
        let is_positive = |number: f64| number > 0.0 && number.is_finite();
        let high = self.epsilon_high.unwrap_or(self.epsilon);
        if !(0.0..1.0).contains(&self.epsilon) || !(0.0..).contains(&high) || !high.is_finite() {
            return refuse("--epsilon must be at least 0 and less than 1, and --epsilon-high at least 0");
        }
        if !(0.0..).contains(&self.beta) || !self.beta.is_finite() {
            return refuse("--beta must be at least 0");
        }
        let most = self.importance_sampling_clip_max;
        let least = self.importance_sampling_clip_min;
        if most.is_some_and(|most| !is_positive(most)) {
            return refuse("--importance-sampling-clip-max must be above 0");
        }
        if least.is_some_and(|least| !(0.0..=most.unwrap_or(0.0)).contains(&least)) {
            return refuse(
                "--importance-sampling-clip-min must be at least 0 and at most --importance-sampling-clip-max",
            );
        }
        if most.is_none() && self.importance_sampling_mode != ImportanceMode::TokenTruncate {
            return refuse("--importance-sampling-mode needs --importance-sampling-clip-max");
        }
        if self.kind == LossKind::DrGrpo && self.max_completion_tokens.is_none_or(|tokens| tokens == 0) {
            return refuse("--loss dr_grpo needs --max-completion-tokens, by which it divides");
        }
        if self.kind == LossKind::Cispo && !self.epsilon_high.is_some_and(is_positive) {
            return refuse("--loss cispo needs --epsilon-high, the largest weight of a token, like 5");
        }
        if self.kind == LossKind::Gspo && self.ratio_level == Some(RatioLevel::Token) {
            return refuse("--loss gspo with --ratio-level token is --loss grpo");
        }
        let (_, objective, _) = self.kind.parts();
        if self.delta.is_some() && objective != Objective::Clipped {
            return refuse("--delta belongs to the losses that clip: not to cispo and sapo");
        }
        if self.delta.is_some_and(|delta| !delta.is_finite() || delta <= 1.0 + high) {
            return refuse("--delta must be above 1 + --epsilon-high");
        }
        if self.epsilon_high.is_some() && objective == Objective::Soft {
            return refuse("--epsilon-high belongs to the losses that clip, and to cispo: not to sapo");
        }
        let sapo = [self.sapo_temperature_pos, self.sapo_temperature_neg];
        if objective != Objective::Soft && sapo != [1.0, 1.05] {
            return refuse("--sapo-temperature-pos and --sapo-temperature-neg belong to --loss sapo");
        }
        if !is_positive(self.sapo_temperature_pos) || !is_positive(self.sapo_temperature_neg) {
            return refuse("--sapo-temperature-pos and --sapo-temperature-neg must be above 0");
        }
        if !self.entropy_coef.is_finite() {
            return refuse("--entropy-coef must be a number");
        }
        if !(self.top_entropy_quantile > 0.0 && self.top_entropy_quantile <= 1.0) {
            return refuse("--top-entropy-quantile must be above 0 and at most 1");
        }
        if self.off_policy_mask_threshold.is_some_and(|nats| !(0.0..).contains(&nats) || !nats.is_finite()) {
            return refuse("--off-policy-mask-threshold must be at least 0");
        }
        Ok(())
    }

    /// Whose probability ratio weighs a token.
    fn level(&self) -> RatioLevel {
        let (_, _, of_kind) = self.kind.parts();
        self.ratio_level.unwrap_or(of_kind)
    }

    /// Whether a token's loss depends on what the policy in training makes of other tokens, so that these must be known first.
    /// `has_old`: whether any ratio is to other weights than those in training.
    #[must_use]
    pub fn needs_survey(&self, has_old: bool) -> bool {
        let importance = self.importance_sampling_clip_max.is_some();
        let of_ratio = match self.level() {
            RatioLevel::Token => false,
            RatioLevel::Sequence => has_old || importance || self.beta > 0.0,
            RatioLevel::SequenceToken => has_old,
        };
        of_ratio
            || (importance && self.importance_sampling_mode.is_of_sequences())
            || self.top_entropy_quantile < 1.0
            || self.off_policy_mask_threshold.is_some()
    }
}

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

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;
    use crate::model::TokenStats;
    use clap::Parser;
    use proptest::prelude::*;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        loss: LossConfig,
    }

    fn parse(options: &str) -> LossConfig {
        Options::parse_from(format!("test {options}").split_whitespace()).loss
    }

    fn config(kind: LossKind, beta: f64) -> LossConfig {
        LossConfig { kind, beta, ..parse("--epsilon-high 0.28 --max-completion-tokens 10") }
    }

    /// What is known of a token, and its log-probability under the policy in training.
    struct Logprobs {
        now: f32,
        old: Option<f32>,
        sampled: f32,
        reference: Option<f32>,
    }

    /// The loss of a completion of one token.
    fn token_loss(
        config: &LossConfig,
        advantage: f64,
        Logprobs { now, old, sampled, reference }: Logprobs,
    ) -> TokenLoss {
        let [old, reference] = [&old, &reference].map(|one| one.as_ref().map(from_ref));
        let known = Known { advantage, weight: 1.0, entropy_weight: 0.0, old, sampled: from_ref(&sampled), reference };
        SequenceLoss::new(config, known, None).token(0, now)
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

        /// Of a completion whose tokens share a ratio: each token's slope is that of the sum of all losses.
        #[test]
        fn slopes_of_a_shared_ratio_are_the_derivatives_of_the_sum(
            advantage in -3.0f64..3.0, now in prop::collection::vec(-6.0f32..-0.1, 4), moved in 0usize..4,
            off in prop::collection::vec(-0.3f32..0.3, 12),
            options in prop::sample::select(vec![
                "--loss gspo", "--loss luspo --kl-estimator k1", "--loss sapo --ratio-level sequence",
                "--loss gspo --kl-estimator k2 --importance-sampling-clip-max 1.1", "--loss gspo --delta 1.3 --kl-estimator k3",
            ]),
        ) {
            let config = parse(&format!("{options} --beta 0.2"));
            let near = |from: usize| now.iter().zip(&off[from..]).map(|(now, off)| now + off).collect::<Vec<f32>>();
            let [old, sampled, reference] = [near(0), near(4), near(8)];
            let known =
                Known { advantage, weight: 0.5, entropy_weight: 0.0, old: Some(&old), sampled: &sampled, reference: Some(&reference) };
            let losses = |now: &[f32]| {
                let survey: Vec<_> = now.iter().map(|logprob| TokenStats { logprob: *logprob, entropy: 1.0 }).collect();
                let loss = SequenceLoss::new(&config, known, Some(Survey { tokens: &survey, least_entropy: 0.0 }));
                now.iter().enumerate().map(|(at, now)| loss.token(at, *now)).collect::<Vec<_>>()
            };
            let at = |step: f32| {
                let mut now = now.clone();
                now[moved] += step;
                (f64::from(now[moved]), losses(&now))
            };
            let step = 2.0f32.powi(-10);
            let ((from, below), (_, here), (to, above)) = (at(-step), at(0.0), at(step));
            prop_assume!(below[0].clipped == above[0].clipped);
            prop_assume!(below.iter().zip(&above).all(|(a, b)| a.importance == b.importance));
            let sum = |losses: &[TokenLoss]| losses.iter().map(|one| one.loss).sum::<f64>();
            let numeric = (sum(&above) - sum(&below)) / (to - from);
            prop_assert!((numeric - here[moved].slope).abs() < 1e-3 * (1.0 + numeric.abs()), "{numeric} {:?}", here[moved]);
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
        assert_eq!((found.loss, found.slope, found.clipped), (-1.5, -1.5, Some(Clipped::No)));
    }

    /// Of samples of the policy itself: the divergence of the policy from the reference, the reverse one, or nothing.
    #[test]
    fn the_expected_slope_of_each_penalty_is_the_gradient_of_what_it_says() {
        let (policy, reference) = ([0.7f32, 0.2, 0.1], [0.3f32, 0.3, 0.4].map(f64::from));
        let probabilities = |logits: [f64; 3]| {
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            logits.map(|logit| logit.exp() / sum)
        };
        let divergence = |p: [f64; 3], q: [f64; 3]| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
        let forward = |logits| divergence(probabilities(logits), reference);
        let reverse = |logits| divergence(reference, probabilities(logits));
        let what = |estimator: &str, logits| match estimator {
            "k1" => 0.0,
            "k3" => reverse(logits),
            _ => forward(logits),
        };
        let logits = policy.map(|p| f64::from(p).ln());
        for estimator in ["k3-weighted", "k2", "k3", "k1"] {
            let config = parse(&format!("--beta 1 --kl-estimator {estimator}"));
            for moved in 0..3 {
                let at = |offset: f64| {
                    let mut logits = logits;
                    logits[moved] += offset;
                    what(estimator, logits)
                };
                let slope_of = |token: usize| {
                    let known = logprobs(policy[token].ln(), None, Some(reference[token].ln() as f32));
                    let slope = token_loss(&config, 0.0, known).slope;
                    slope * (f64::from(u8::from(token == moved)) - f64::from(policy[moved]))
                };
                let expected: f64 = (0..3).map(|token| f64::from(policy[token]) * slope_of(token)).sum();
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((expected - numeric).abs() < 1e-6, "{estimator}: {expected} {numeric}");
            }
        }
    }

    #[test]
    fn clipping_stops_the_gain_on_each_side_but_never_the_way_back() {
        let config = config(LossKind::Dapo, 0.0);
        let at = |advantage, ratio: f32| token_loss(&config, advantage, logprobs(ratio.ln() - 3.0, Some(-3.0), None));
        let high = at(1.0, 1.5);
        assert_eq!((high.slope, high.clipped), (0.0, Some(Clipped::High)));
        assert!((high.loss + 1.28).abs() < 1e-6);
        let low = at(-1.0, 0.5);
        assert_eq!((low.slope, low.clipped), (0.0, Some(Clipped::Low)));
        assert!((low.loss - 0.8).abs() < 1e-6);
        for (advantage, ratio) in [(-1.0, 1.5), (1.0, 0.5)] {
            let back = at(advantage, ratio);
            assert_eq!(back.clipped, Some(Clipped::No));
            assert!((back.slope + advantage * f64::from(ratio)).abs() < 1e-6);
        }
        assert_eq!(at(1.0, 1.27).clipped, Some(Clipped::No));
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
        assert_eq!(near.clipped, Some(Clipped::No)); // though 2.2 times as likely as when it was sampled
        assert!((near.slope + 2.2).abs() < 1e-5, "{near:?}");
        let far = at(1.5f32.ln());
        assert_eq!((far.slope, far.clipped), (0.0, Some(Clipped::High)));
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
    fn the_gradient_of_each_token_for_itself_is_the_shared_one_where_nothing_tells_tokens_apart() {
        let (now, old) = ([-1.0f32, -2.5, -0.3], [-1.2f32, -2.4, -0.4]);
        let slopes = |options: &str| -> Vec<f64> {
            let config = parse(&format!("--loss gspo {options}"));
            let survey = now.map(|logprob| TokenStats { logprob, entropy: 1.0 });
            let known = Known {
                advantage: 1.5,
                weight: 1.0,
                entropy_weight: 0.0,
                old: Some(&old),
                sampled: &old,
                reference: None,
            };
            let loss = SequenceLoss::new(&config, known, Some(Survey { tokens: &survey, least_entropy: 0.0 }));
            (0..3).map(|at| loss.token(at, now[at]).slope).collect()
        };
        let shared = slopes("");
        let ratio = (0.2f64 / 3.0).exp();
        assert!(shared.iter().all(|slope| (slope + 1.5 * ratio).abs() < 1e-6), "{shared:?}");
        for (shared, own) in shared.iter().zip(slopes("--ratio-level sequence_token")) {
            assert!((shared - own).abs() < 1e-12);
        }
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        for options in [
            "--loss dr_grpo",
            "--loss cispo",
            "--loss gspo --ratio-level token",
            "--loss sapo --delta 2",
            "--delta 1.1",
            "--loss sapo --sapo-temperature-neg 0",
            "--sapo-temperature-neg 2",
            "--loss sapo --epsilon-high 0.3",
            "--top-entropy-quantile 0",
            "--off-policy-mask-threshold=-1",
            "--importance-sampling-mode token_mask",
            "--importance-sampling-clip-max 1 --importance-sampling-clip-min 2",
        ] {
            assert_eq!(parse(options).check().map_err(|err| err.exit_code()), Err(2), "{options}");
        }
        assert!(parse("--loss cispo --epsilon-high 5 --kl-estimator k3 --beta 0.04").check().is_ok());
    }
}
