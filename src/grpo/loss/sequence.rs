//! The losses of a completion's tokens, from what is known of them.

use super::surrogate::{Ratio, Surrogate};
use super::{Clipped, Importance, KlEstimator, LossConfig, MAX_LOG_RATIO, Objective, RatioLevel};
use crate::model::TokenStats;

/// What is known of a completion before the policy in training is asked. Log-probabilities are of each of its tokens (nats).
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Of the completion.
    pub advantage: f64,
    /// Weight of each token in the step's loss.
    pub weight: f64,
    /// What each token's entropy adds to the step's loss, per nat.
    pub entropy_weight: f64,
    /// Under the weights that the ratio is to; `None` when these are in training, so that the ratio is 1.
    pub old: Option<&'a [f32]>,
    /// Under the weights that sampled them.
    pub sampled: &'a [f32],
    /// Under the reference; required where `beta` is not 0.
    pub reference: Option<&'a [f32]>,
    /// Under the teacher; required where `distill` is not 0.
    pub teacher: Option<&'a [f32]>,
}

/// What the policy in training makes of a completion, for [`LossConfig::needs_survey`].
#[derive(Debug, Clone, Copy)]
pub struct Survey<'a> {
    /// Of each of its tokens.
    pub tokens: &'a [TokenStats],
    /// The entropy below which no token of the step has a gradient (nats).
    pub least_entropy: f32,
}

/// The loss of one token, times its weight, without the entropy's part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLoss {
    /// `beta` times `kl`, plus `distill` times `teacher_kl`, minus the surrogate.
    pub loss: f64,
    /// dloss / dlogprob: of the losses of all of the completion's tokens, if they share a ratio.
    pub slope: f64,
    /// What the loss rises by per nat of the token's entropy.
    pub entropy_slope: f64,
    /// Estimate of the KL divergence from the reference (nats), without the token's weight; 0 without a reference.
    pub kl: f64,
    /// The same from the teacher, if there is one.
    pub teacher_kl: Option<f64>,
    /// Whether the clip range stops the gradient. If the ratio is the completion's, its first token alone tells.
    pub clipped: Option<Clipped>,
    /// The weight of the surrogate; `None` without importance sampling. If it is the completion's, its first token alone tells.
    pub importance: Option<Importance>,
}

/// The losses of a completion's tokens: the surrogate, with the KL penalty and that of distillation.
///
/// [`KlEstimator::K3Weighted`] is weighted by the ratio, whose slope counts even where the ratio is 1: otherwise the gradient of the
/// penalty would not be that of the divergence.
///
/// With [`LossConfig::importance_sampling_clip_max`] the surrogate, but not the penalty, is weighted by the bounded ratio of the old
/// policy to the sampler, a constant. Clipping then keeps the policy near the old one, not near the sampler. Why clipping may be around
/// another policy than the sampler's: Hilton et al. 2021, <https://arxiv.org/abs/2110.00641>.
///
/// The masks of entropy and of distance from the sampler take the surrogate away, but not the penalty, and not the token's part in any
/// denominator but that of the entropy bonus, whose mean is over the tokens that it acts on.
///
/// # Source
/// TRL `GRPOTrainer._compute_loss`; distillation: Agarwal et al. 2023, <https://arxiv.org/abs/2306.13649> (GKD), reverse KL on the student's own
/// samples; entropy: Wang et al. 2025, <https://arxiv.org/abs/2506.01939>; distance: DeepSeek-V3.2,
/// <https://arxiv.org/abs/2512.02556>, eq. 9.
///
/// [`KlEstimator::K3Weighted`]: super::KlEstimator::K3Weighted
#[derive(Debug, Clone)]
pub struct SequenceLoss<'a> {
    config: &'a LossConfig,
    known: Known<'a>,
    survey: Option<Survey<'a>>,
    /// The ratio of all tokens, if it is one.
    ratio: Option<f64>,
    /// The weight of all tokens in importance sampling, if it is one.
    importance: Option<Importance>,
    /// Whether the policy moved too far away.
    is_masked: bool,
    /// Means over the tokens, if the gradient of the ratio reaches all of them: of the surrogate's slope, and of the unweighted KL.
    shared: Option<(f64, f64)>,
}

impl<'a> SequenceLoss<'a> {
    /// `survey` is required where [`LossConfig::needs_survey`] says so.
    #[must_use]
    pub fn new(config: &'a LossConfig, known: Known<'a>, survey: Option<Survey<'a>>) -> Self {
        let mut new = Self { config, known, survey, ratio: None, importance: None, is_masked: false, shared: None };
        if config.level() != RatioLevel::Token {
            new.ratio = Some(survey.map_or(0.0, |survey| new.mean(survey, |at, now| new.log_ratio(at, now))));
        }
        let Some(survey) = survey else { return new };
        if config.importance_sampling_mode.is_of_sequences() {
            let difference: f64 = new.each(survey, |at, now| new.since_sampling(at, now)).sum();
            new.importance = Importance::of(config, difference);
        }
        if let Some(threshold) = config.off_policy_mask_threshold {
            let fell = new.mean(survey, |at, now| f64::from(known.sampled[at]) - f64::from(now));
            new.is_masked = known.advantage < 0.0 && fell > threshold;
        }
        if config.level() == RatioLevel::Sequence {
            let slope = new.mean(survey, |at, now| new.surrogate(at, now).0.slope);
            new.shared = Some((slope, new.mean(survey, |at, now| new.kl(at, now).0)));
        }
        new
    }

    /// The loss of token `at` if its log-probability is `now`.
    #[must_use]
    pub fn token(&self, at: usize, now: f32) -> TokenLoss {
        let Self { config, known, .. } = self;
        let ratio = self.ratio(at, now);
        let (surrogate, importance) = self.surrogate(at, now);
        let (estimate, estimate_slope) = self.kl(at, now);
        let (_, objective, _) = config.kind.parts();
        let (surrogate_slope, of_ratio) = match self.shared {
            Some((_, estimate)) if objective == Objective::WeightedLogprob => (surrogate.slope, estimate),
            Some(shared) => shared,
            None => (surrogate.slope, estimate),
        };
        let (kl, kl_slope) = match config.kl_estimator.is_weighted() {
            true => (ratio.value * estimate, ratio.slope * of_ratio + ratio.value * estimate_slope),
            false => (estimate, estimate_slope),
        };
        let of_teacher = difference(known.teacher, at, now).map(|far| KlEstimator::K2.of(far));
        let (teacher_kl, teacher_slope) = of_teacher.unwrap_or_default();
        let tells = |is_shared: bool| !is_shared || at == 0;
        TokenLoss {
            loss: known.weight * (config.beta * kl + config.distill * teacher_kl - surrogate.value),
            slope: known.weight * (config.beta * kl_slope + config.distill * teacher_slope - surrogate_slope),
            entropy_slope: if self.has_entropy(at) { known.entropy_weight } else { 0.0 },
            kl,
            teacher_kl: of_teacher.map(|(kl, _)| kl),
            clipped: tells(self.ratio.is_some()).then_some(surrogate.clipped),
            importance: importance.filter(|_| tells(self.importance.is_some())),
        }
    }

    /// log policy - log old policy, which is 0 if they are the same weights.
    fn log_ratio(&self, at: usize, now: f32) -> f64 {
        self.known.old.map_or(0.0, |old| f64::from(now) - f64::from(old[at]))
    }

    /// log old policy - log sampler.
    fn since_sampling(&self, at: usize, now: f32) -> f64 {
        f64::from(self.known.old.map_or(now, |old| old[at])) - f64::from(self.known.sampled[at])
    }

    fn ratio(&self, at: usize, now: f32) -> Ratio {
        let difference = self.ratio.unwrap_or_else(|| self.log_ratio(at, now));
        let value = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
        Ratio { value, slope: if difference.abs() > MAX_LOG_RATIO { 0.0 } else { value } }
    }

    fn surrogate(&self, at: usize, now: f32) -> (Surrogate, Option<Importance>) {
        let importance = self.importance.or_else(|| Importance::of(self.config, self.since_sampling(at, now)));
        let times = if self.is_masked || !self.has_entropy(at) { 0.0 } else { importance.map_or(1.0, |one| one.ratio) };
        let advantage = (self.known.advantage, times);
        (Surrogate::of(self.config, self.ratio(at, now), advantage, f64::from(now)), importance)
    }

    /// Whether the token is among those of the highest entropy.
    fn has_entropy(&self, at: usize) -> bool {
        self.survey.is_none_or(|survey| survey.tokens[at].entropy >= survey.least_entropy)
    }

    /// The estimate of the KL divergence before it is weighted, and its slope.
    fn kl(&self, at: usize, now: f32) -> (f64, f64) {
        difference(self.known.reference, at, now).map_or((0.0, 0.0), |far| self.config.kl_estimator.of(far))
    }

    fn each(&self, survey: Survey<'a>, of: impl Fn(usize, f32) -> f64) -> impl Iterator<Item = f64> {
        survey.tokens.iter().enumerate().map(move |(at, stats)| of(at, stats.logprob))
    }

    fn mean(&self, survey: Survey<'a>, of: impl Fn(usize, f32) -> f64) -> f64 {
        self.each(survey, of).sum::<f64>() / survey.tokens.len().max(1) as f64
    }
}

/// log policy - log of another model, if there is one, of token `at`.
fn difference(other: Option<&[f32]>, at: usize, now: f32) -> Option<f64> {
    other.map(|other| f64::from(now) - f64::from(other[at]))
}
