//! Statistics of one pass over a step's tokens: the loss, clipping, and how well sampler and trainer agree.

use crate::error::{Error, Result};
use crate::grpo::loss::{Clipped, TokenLoss};
use crate::grpo::metrics::Metrics;
use crate::model::TokenStats;
use crate::numbers::mean::Mean;

/// Statistics over the tokens of one pass.
#[derive(Debug, Default)]
pub struct PassStats {
    /// The step's loss.
    pub loss: f64,
    /// Whether any token had a slope.
    pub learned: bool,
    /// Recomputed log-probabilities, one list per completion (nats).
    pub logprobs: Vec<Vec<f32>>,
    /// Over the tokens that count (nats).
    entropy: Mean,
    kl: Mean,
    teacher_kl: Mean,
    /// Fractions clipped on each side: of all tokens, and of each completion's.
    clipped: Sides,
    clipped_of: Vec<Sides>,
    /// The ratio of the old policy to the sampler, and how often it was truncated.
    importance: Mean,
    truncated: Mean,
    /// |recomputed - recorded| log-probability where sampler and trainer hold the same weights (nats).
    disagreement: Mean,
    not_finite: Option<usize>,
}

/// How often the clip range stopped a gradient.
#[derive(Debug, Default, Clone)]
struct Sides {
    low: Mean,
    high: Mean,
}

impl Sides {
    fn add(&mut self, clipped: Clipped) {
        self.low.add(f64::from(clipped == Clipped::Low));
        self.high.add(f64::from(clipped == Clipped::High));
    }
}

impl PassStats {
    /// Empty statistics of this many completions.
    #[must_use]
    pub fn new(completions: usize) -> Self {
        let clipped_of = vec![Sides::default(); completions];
        Self { logprobs: vec![Vec::new(); completions], clipped_of, ..Self::default() }
    }

    /// Adds a token of a completion: its statistics under the policy, the sampler's log-probability where the weights are the same,
    /// and its weighted loss where it counts.
    pub fn add(&mut self, completion: usize, now: &TokenStats, recorded: Option<f32>, part: Option<TokenLoss>) {
        self.logprobs[completion].push(now.logprob);
        if !now.logprob.is_finite() {
            self.not_finite.get_or_insert(completion);
        } else if let Some(recorded) = recorded {
            self.disagreement.add(f64::from((now.logprob - recorded).abs()));
        }
        let Some(part) = part else { return };
        self.loss += part.loss + part.entropy_slope * f64::from(now.entropy);
        self.learned |= part.slope != 0.0 || part.entropy_slope != 0.0;
        self.entropy.add(f64::from(now.entropy));
        self.kl.add(part.kl);
        part.teacher_kl.into_iter().for_each(|kl| self.teacher_kl.add(kl));
        if let Some(clipped) = part.clipped {
            self.clipped.add(clipped);
            self.clipped_of[completion].add(clipped);
        }
        if let Some(importance) = part.importance {
            self.importance.add(importance.ratio);
            self.truncated.add(f64::from(importance.truncated));
        }
    }

    /// Refuses a pass that must not lead to an update. `place` names the record of a completion.
    ///
    /// # Errors
    /// [`Error::Numerics`] when a log-probability or the loss is not finite, or the log-probabilities differ from the recorded ones by
    /// more than `band` on average (nats).
    pub fn check(&self, place: &dyn Fn(usize) -> String, band: f64) -> Result<()> {
        if let Some(completion) = self.not_finite {
            let what = "its recomputed log-probability is not finite; nothing was published";
            return Err(Error::Numerics(format!("{}: {what}", place(completion))));
        }
        if !self.loss.is_finite() {
            return Err(Error::Numerics("the loss is not finite; nothing was published".into()));
        }
        let Mean { count, max, .. } = self.disagreement;
        let average = mean(&self.disagreement);
        if average > band {
            return Err(Error::Numerics(format!(
                "sampler and trainer disagree: log-probabilities of {count} tokens differ by {average:.3} nats on average \
                 (at most {max:.3}; allowed {band}); nothing was published; with rollout --dtype f32 on the CPU they are \
                 equal, and --logprob-band allows more"
            )));
        }
        Ok(())
    }

    /// Adds the statistics to a line of metrics.
    pub fn report(&self, line: &mut Metrics, has_reference: bool) {
        if has_reference {
            line.real("kl", mean(&self.kl));
        }
        if self.teacher_kl.count > 0 {
            line.real("teacher_kl", mean(&self.teacher_kl));
        }
        line.real("entropy", mean(&self.entropy));
        let [low, high] = [&self.clipped.low, &self.clipped.high].map(mean);
        line.real("clip_ratio/low_mean", low);
        line.real("clip_ratio/low_min", self.fractions(|sides| &sides.low).min);
        line.real("clip_ratio/high_mean", high);
        line.real("clip_ratio/high_max", self.fractions(|sides| &sides.high).max);
        line.real("clip_ratio/region_mean", low + high);
        if self.disagreement.count > 0 {
            line.real("sampling/sampling_logp_difference/mean", mean(&self.disagreement));
            line.real("sampling/sampling_logp_difference/max", self.disagreement.max);
        }
        if self.importance.count > 0 {
            line.real("sampling/importance_sampling_ratio/min", self.importance.min);
            line.real("sampling/importance_sampling_ratio/mean", mean(&self.importance));
            line.real("sampling/importance_sampling_ratio/max", self.importance.max);
            line.real("sampling/importance_sampling_ratio/clipped_ratio", mean(&self.truncated));
        }
    }

    /// The fraction of each completion's tokens that were clipped on one side.
    fn fractions(&self, side: impl Fn(&Sides) -> &Mean) -> Mean {
        self.clipped_of.iter().filter_map(|sides| side(sides).mean()).collect()
    }
}

fn mean(of: &Mean) -> f64 {
    of.mean().unwrap_or(0.0)
}
