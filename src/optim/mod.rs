//! AdamW with moments in f32 or bf16, clipping by global norm, and learning-rate schedules, as PyTorch and transformers compute them.

mod loss_scale;
mod moments;
mod update;

use std::ops::Deref;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::numbers::dtype::Dtype;

pub use loss_scale::LossScale;
pub use moments::Moments;
pub(crate) use moments::{Held, Means};
pub use update::{Rule, Then, Trained, update};

/// Numbers that one thread updates at a time. Sums of chunks are added in order, so the number of threads does not change a bit.
pub(crate) const CHUNK: usize = 1 << 15;

/// The schedule of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Schedule {
    /// Stays at its peak
    Constant,
    /// Falls linearly to 0 at --total-steps
    Linear,
    /// Decays along half a cosine to 0 at --total-steps
    Cosine,
}

/// Configures the optimizer.
#[derive(Debug, Clone, clap::Args)]
pub struct OptimizerConfig {
    /// Peak learning rate
    #[arg(long, value_name = "RATE", default_value_t = OptimizerConfig::default().learning_rate)]
    pub learning_rate: f64,
    /// Decay of the running mean of gradients
    #[arg(long, value_name = "DECAY", default_value_t = OptimizerConfig::default().adam_beta1)]
    pub adam_beta1: f64,
    /// Decay of the running mean of squared gradients
    #[arg(long, value_name = "DECAY", default_value_t = OptimizerConfig::default().adam_beta2)]
    pub adam_beta2: f64,
    /// Added to the square root of the running mean of squared gradients
    #[arg(long, value_name = "EPSILON", default_value_t = OptimizerConfig::default().adam_epsilon)]
    pub adam_epsilon: f64,
    /// Weight decay of matrices and embeddings; norms and biases do not decay
    #[arg(long, value_name = "DECAY", default_value_t = OptimizerConfig::default().weight_decay)]
    pub weight_decay: f64,
    /// Clip gradients to this global norm; 0 turns clipping off
    #[arg(long, value_name = "NORM", default_value_t = OptimizerConfig::default().max_grad_norm)]
    pub max_grad_norm: f64,
    /// Type that AdamW's moments are stored in; those of a checkpoint are converted
    #[arg(long, value_parser = moments::state_type(), value_name = "TYPE", default_value_t = OptimizerConfig::default().optimizer_state)]
    pub optimizer_state: Dtype,
    /// Schedule of the learning rate
    #[arg(long, value_enum, default_value_t = OptimizerConfig::default().schedule)]
    pub schedule: Schedule,
    /// Fraction of --total-steps over which the learning rate rises from 0 (0 to 1)
    #[arg(long, value_name = "RATIO", default_value_t = OptimizerConfig::default().warmup_ratio)]
    pub warmup_ratio: f64,
    /// Optimizer steps of the whole run, including those of earlier and later commands
    #[arg(long, value_name = "STEPS")]
    pub total_steps: Option<u64>,
}

/// The defaults of the command line.
impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-6,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            optimizer_state: Dtype::F32,
            schedule: Schedule::Constant,
            warmup_ratio: 0.0,
            total_steps: None,
        }
    }
}

impl OptimizerConfig {
    /// Refuses numbers out of range.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        let usage = |what: &str| Err(Error::Usage(what.into()));
        let at_least_zero = |number: f64| number >= 0.0 && number.is_finite();
        if ![self.learning_rate, self.weight_decay, self.max_grad_norm].into_iter().all(at_least_zero) {
            return usage("--learning-rate, --weight-decay and --max-grad-norm must be at least 0");
        }
        if ![self.adam_beta1, self.adam_beta2].iter().all(|beta| (0.0..1.0).contains(beta)) {
            return usage("--adam-beta1 and --adam-beta2 must be at least 0 and less than 1");
        }
        if !(at_least_zero(self.adam_epsilon) && self.adam_epsilon > 0.0) {
            return usage("--adam-epsilon must be more than 0");
        }
        if !(0.0..=1.0).contains(&self.warmup_ratio) {
            return usage("--warmup-ratio must be in 0 to 1");
        }
        if self.total_steps.is_none() && (self.schedule != Schedule::Constant || self.warmup_ratio > 0.0) {
            return usage("--schedule linear and cosine, and --warmup-ratio, need --total-steps");
        }
        Ok(())
    }

    /// The learning rate of optimizer step `step`, counted from 0.
    ///
    /// # Source
    /// transformers `optimization.py`, `get_{constant_schedule_with_warmup,linear_schedule_with_warmup,cosine_schedule_with_warmup}`.
    #[must_use]
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        let total = self.total_steps.unwrap_or(0) as f64;
        let (step, warmup) = (step as f64, (total * self.warmup_ratio).ceil());
        let factor = if step < warmup {
            step / warmup.max(1.0)
        } else {
            let left = (total - warmup).max(1.0);
            match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => ((total - step) / left).max(0.0),
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * ((step - warmup) / left).min(1.0)).cos()),
            }
        };
        self.learning_rate * factor
    }
}

/// The norm of each tensor. Squares are summed in f64, so no finite f32 overflows.
#[must_use]
pub fn norms<T: Deref<Target = [f32]> + Sync>(tensors: &[T]) -> Vec<f64> {
    let of_tensor = |tensor: &T| tensor.par_chunks(CHAINS * CHUNK).map(sums_of_squares).collect::<Vec<_>>();
    tensors.par_iter().map(|tensor| of_tensor(tensor).concat().iter().sum::<f64>().sqrt()).collect()
}

/// Chunks whose squares are summed side by side: each sum is one chain of additions, which wait for one another.
const CHAINS: usize = 8;

/// The sum of squares of each chunk.
fn sums_of_squares(chunks: &[f32]) -> Vec<f64> {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let mut sums = [0.0; CHAINS];
    if chunks.len() < CHAINS * CHUNK {
        return chunks.chunks(CHUNK).map(|chunk| chunk.iter().map(|x| square(*x)).sum()).collect();
    }
    for i in 0..CHUNK {
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum += square(chunks[chain * CHUNK + i]);
        }
    }
    sums.to_vec()
}

/// The norm of all tensors taken as one vector, given the norm of each.
#[must_use]
pub fn global_norm(norms: &[f64]) -> f64 {
    norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn config() -> OptimizerConfig {
        OptimizerConfig {
            learning_rate: 1e-3,
            adam_beta1: 0.9,
            adam_beta2: 0.99,
            adam_epsilon: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 0.0,
            optimizer_state: Dtype::F32,
            schedule: Schedule::Constant,
            warmup_ratio: 0.0,
            total_steps: None,
        }
    }

    #[test]
    fn the_norm_is_that_of_all_numbers_together_and_does_not_overflow() {
        let found = norms(&[vec![3.0; 100_000], vec![4.0; 100_000]]);
        assert!((global_norm(&found) - 5.0 * 100_000f64.sqrt()).abs() < 1e-9);
        assert!(norms(&[vec![f32::MAX; 4]])[0].is_finite());
        assert!(norms(&[vec![f32::NAN, 1.0]])[0].is_nan());
    }

    #[test]
    fn the_learning_rate_rises_over_the_warm_up_and_falls_to_zero() {
        let mut config = OptimizerConfig { warmup_ratio: 0.25, total_steps: Some(10), ..config() };
        let rates =
            |config: &OptimizerConfig| (0..=10).map(|step| config.learning_rate_at(step) * 1e3).collect::<Vec<_>>();
        let constant = rates(&config);
        assert!(constant.iter().zip([0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-12));
        config.schedule = Schedule::Linear;
        assert!((rates(&config)[4] - 6.0 / 7.0).abs() < 1e-12);
        assert_eq!(rates(&config)[10], 0.0);
        config.schedule = Schedule::Cosine;
        assert!((rates(&config)[5] - 0.5 * (1.0 + (std::f64::consts::PI * 2.0 / 7.0).cos())).abs() < 1e-12);
        assert!(rates(&config)[10].abs() < 1e-12);
    }
}
