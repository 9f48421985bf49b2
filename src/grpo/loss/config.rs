//! The options of the loss, and which of them contradict each other.

use super::kind::{LossKind, Objective, RatioLevel};
use super::{ImportanceMode, KlEstimator};
use crate::error::{Error, Result};

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
    /// Weight of the divergence from --teacher, whose gradient is that of reverse KL: k2 of the difference in log-probability
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0)]
    pub distill: f64,
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
        if [self.beta, self.distill].iter().any(|weight| !(0.0..).contains(weight) || !weight.is_finite()) {
            return refuse("--beta and --distill must be at least 0");
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
    pub(super) fn level(&self) -> RatioLevel {
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
