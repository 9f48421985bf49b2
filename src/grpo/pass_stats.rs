//! What one pass over a step's tokens saw: loss, slopes, and the agreement of sampler and trainer.

use crate::error::{Error, Result};
use crate::grpo::groups::Completion;
use crate::grpo::loss::{Clipped, TokenLoss};
use crate::grpo::metrics::{Mean, Metrics};
use crate::model::TokenStats;

/// Sums over the tokens of one pass.
#[derive(Debug, Default)]
pub struct Tally {
    /// The step's loss.
    pub loss: f64,
    /// Whether any token had a slope.
    pub learned: bool,
    /// Log-probabilities as recomputed, one list a completion [nats].
    pub logprobs: Vec<Vec<f32>>,
    /// Of the tokens that count [nats].
    entropy: Mean,
    kl: Mean,
    clipped_low: Mean,
    clipped_high: Mean,
    /// Ratio of the old policy to the sampler, and how often it was truncated.
    importance: Mean,
    truncated: Mean,
    /// |recomputed - recorded| log-probability where sampler and trainer hold the same weights [nats].
    disagreement: Mean,
    not_finite: Option<usize>,
}

impl Tally {
    /// Nothing seen yet of `completions` completions.
    #[must_use]
    pub fn new(completions: usize) -> Self {
        Self { logprobs: vec![Vec::new(); completions], ..Self::default() }
    }

    /// Adds a token: what the model says of it, the sampler's log-probability where the weights are the same, and its part of the
    /// loss where it counts.
    pub fn add(&mut self, completion: usize, now: &TokenStats, recorded: Option<f32>, part: Option<TokenLoss>) {
        self.logprobs[completion].push(now.logprob);
        if !now.logprob.is_finite() {
            self.not_finite.get_or_insert(completion);
        } else if let Some(recorded) = recorded {
            self.disagreement.add(f64::from((now.logprob - recorded).abs()));
        }
        let Some(part) = part else { return };
        self.loss += part.loss;
        self.learned |= part.slope != 0.0;
        self.entropy.add(f64::from(now.entropy));
        self.kl.add(part.kl);
        self.clipped_low.add(f64::from(part.clipped == Clipped::Low));
        self.clipped_high.add(f64::from(part.clipped == Clipped::High));
        if let Some(importance) = part.importance {
            self.importance.add(importance.ratio);
            self.truncated.add(f64::from(importance.truncated));
        }
    }

    /// Refuses a pass whose numbers mean nothing.
    ///
    /// # Errors
    /// [`Error::Numerics`] when a log-probability is not finite, or the recorded ones are beyond the band.
    pub fn check(&self, completions: &[&Completion], band: f64) -> Result<()> {
        if let Some(completion) = self.not_finite {
            let what = "its recomputed log-probability is not finite; nothing was published";
            let one = completions[completion];
            return Err(Error::Numerics(format!("{}:{}: {what}", one.line.path, one.line.number)));
        }
        if !self.loss.is_finite() {
            return Err(Error::Numerics("the loss is not finite; nothing was published".into()));
        }
        let Mean { count, max, .. } = self.disagreement;
        let mean = self.disagreement.mean();
        if mean > band {
            return Err(Error::Numerics(format!(
                "sampler and trainer disagree: log-probabilities of {count} tokens differ by {mean:.3} nats in the mean \
                 (at most {max:.3}; allowed {band}); nothing was published; rollout --dtype f32 on the CPU samples with the \
                 trainer's bits, --logprob-band allows more"
            )));
        }
        Ok(())
    }

    /// Adds what was seen to a line of metrics.
    pub fn report(&self, line: &mut Metrics, has_reference: bool) {
        if has_reference {
            line.real("kl", self.kl.mean());
        }
        line.real("entropy", self.entropy.mean());
        line.real("clip_ratio/low_mean", self.clipped_low.mean());
        line.real("clip_ratio/high_mean", self.clipped_high.mean());
        line.real("clip_ratio/region_mean", self.clipped_low.mean() + self.clipped_high.mean());
        if self.disagreement.count > 0 {
            line.real("sampling/sampling_logp_difference/mean", self.disagreement.mean());
            line.real("sampling/sampling_logp_difference/max", self.disagreement.max);
        }
        if self.importance.count > 0 {
            line.real("sampling/importance_sampling_ratio/min", self.importance.min);
            line.real("sampling/importance_sampling_ratio/mean", self.importance.mean());
            line.real("sampling/importance_sampling_ratio/max", self.importance.max);
            line.real("sampling/importance_sampling_ratio/clipped_ratio", self.truncated.mean());
        }
    }
}
