//! AdamW with f32 state, clipping by global norm, and learning-rate schedules, to PyTorch's and transformers' numbers.

use std::ops::Deref;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::floats::Floats;
use crate::tensorfile::{self, Storage, Tensor, TensorFile};

mod loss_scale;

pub use loss_scale::LossScale;

/// Numbers that one thread updates at a time. Sums over chunks are added in order, so threads do not change a bit.
pub(crate) const CHUNK: usize = 1 << 15;

/// Added to the norm before dividing by it, as `torch.nn.utils.clip_grad_norm_` does.
const CLIP_EPSILON: f64 = 1e-6;

/// The course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays
    Constant,
    /// Falls in a line to 0 at --total-steps
    Linear,
    /// Falls along half a cosine to 0 at --total-steps
    Cosine,
}

/// Numbers of the optimizer.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct OptimizerConfig {
    /// Learning rate, at its highest
    #[arg(long, value_name = "RATE", default_value_t = 1e-6)]
    pub learning_rate: f64,
    /// Decay of the mean of gradients
    #[arg(long, value_name = "DECAY", default_value_t = 0.9)]
    pub adam_beta1: f64,
    /// Decay of the mean of squared gradients
    #[arg(long, value_name = "DECAY", default_value_t = 0.999)]
    pub adam_beta2: f64,
    /// Added to the root of the mean of squared gradients
    #[arg(long, value_name = "EPSILON", default_value_t = 1e-8)]
    pub adam_epsilon: f64,
    /// Decay of weight matrices and embeddings; norms and biases have none
    #[arg(long, value_name = "DECAY", default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Scale gradients down to this norm; 0 leaves them
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Course of the learning rate
    #[arg(long, value_enum, default_value = "constant")]
    pub schedule: Schedule,
    /// Part of --total-steps over which the learning rate rises from 0 [0-1]
    #[arg(long, value_name = "RATIO", default_value_t = 0.0)]
    pub warmup_ratio: f64,
    /// Optimizer steps of the whole run, of which this may be the first or a later part
    #[arg(long, value_name = "STEPS")]
    pub total_steps: Option<u64>,
}

impl OptimizerConfig {
    /// Refuses numbers that mean nothing.
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

    /// The learning rate of an optimizer step, counted from 0.
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

/// State of AdamW: running means of gradients and of their squares, in the parameters' shapes and order.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Updates made.
    pub steps: u64,
    pub(crate) first: Vec<Floats>,
    pub(crate) second: Vec<Floats>,
}

/// What a moment's name starts with, before its parameter's.
const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";

impl Moments {
    /// Before the first update.
    #[must_use]
    pub fn zeros(parameters: &[(String, Vec<usize>)]) -> Self {
        let zeros = || parameters.iter().map(|(_, shape)| Floats::zeros(shape.iter().product())).collect();
        Self { steps: 0, first: zeros(), second: zeros() }
    }

    /// Reads what [`Moments::save`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`] when the file cannot be read or is of other parameters.
    pub fn load(path: &Path, parameters: &[(String, Vec<usize>)]) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let steps = file.note("step").and_then(|step| step.parse().ok());
        let steps = steps.ok_or_else(|| Error::model(path, "no step in its metadata"))?;
        let read = |prefix: &str| -> Result<Vec<Floats>> {
            let one = |(name, shape): &(String, Vec<usize>)| {
                let name = format!("{prefix}{name}");
                if file.shape(&name)? != shape {
                    return Err(Error::model(path, format!("{name} is not of the model's shape {shape:?}")));
                }
                file.read(&name)
            };
            parameters.iter().map(one).collect()
        };
        Ok(Self { steps, first: read(FIRST)?, second: read(SECOND)? })
    }

    /// Writes both moments of each parameter in f32, and the count of updates in the file's metadata.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn save(&self, path: &Path, parameters: &[(String, Vec<usize>)]) -> Result<()> {
        let mut all = Vec::with_capacity(2 * parameters.len());
        for (prefix, moments) in [(FIRST, &self.first), (SECOND, &self.second)] {
            let with_names = parameters.iter().zip(moments);
            all.extend(with_names.map(|((name, shape), values)| Tensor {
                name: format!("{prefix}{name}"),
                shape: shape.clone(),
                values,
            }));
        }
        tensorfile::write(path, ("step", &self.steps.to_string()), Storage::F32, &all)
    }
}

/// The norm of each tensor. Squares are added in f64, so that no finite f32 overflows.
#[must_use]
pub fn norms<T: Deref<Target = [f32]> + Sync>(tensors: &[T]) -> Vec<f64> {
    let of_chunk = |chunk: &[f32]| chunk.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let of_tensor = |tensor: &T| tensor.par_chunks(CHUNK).map(of_chunk).collect::<Vec<_>>();
    tensors.par_iter().map(|tensor| of_tensor(tensor).iter().sum::<f64>().sqrt()).collect()
}

/// The norm of all tensors as one vector, from the norm of each.
#[must_use]
pub fn global_norm(norms: &[f64]) -> f64 {
    norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt()
}

/// One AdamW update of all parameters.
///
/// `gradients` are scaled down to `max_grad_norm` by their `norm` first; `decays[i]` says whether weight decay is for
/// parameter i. The learning rate is that of the schedule after `moments.steps` updates.
///
/// # Source
/// Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>, in the order of operations of `torch.optim.AdamW`.
pub fn update<T: Deref<Target = [f32]> + Sync>(
    config: &OptimizerConfig,
    parameters: Vec<&mut [f32]>,
    gradients: &[T],
    norm: f64,
    moments: &mut Moments,
    decays: &[bool],
) {
    assert_eq!((parameters.len(), decays.len()), (gradients.len(), gradients.len()), "one gradient a parameter");
    let rate = config.learning_rate_at(moments.steps);
    moments.steps += 1;
    let rule = Rule::new(config, rate, norm, moments.steps);
    let tensors =
        parameters.into_par_iter().zip(gradients).zip(&mut moments.first).zip(&mut moments.second).zip(decays);
    tensors.for_each(|((((parameter, gradient), first), second), decays)| {
        let keep = if *decays { rule.keep } else { 1.0 };
        let chunks = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        let chunks = chunks.zip(first.par_chunks_mut(CHUNK)).zip(second.par_chunks_mut(CHUNK));
        chunks.for_each(|(((w, g), m), v)| rule.apply(keep, w, g, m, v));
    });
}

/// The numbers of one update, computed in f64 and rounded once, as PyTorch does with its scalars.
pub struct Rule {
    pub(crate) gradient_scale: f32,
    pub(crate) keep: f32,
    pub(crate) first_rate: f32,
    pub(crate) second_keep: f32,
    pub(crate) second_rate: f32,
    pub(crate) correction_root: f32,
    pub(crate) epsilon: f32,
    pub(crate) step_size: f32,
}

impl Rule {
    /// Of update `step`, counted from 1, at learning rate `rate`, of gradients of this norm.
    #[must_use]
    pub fn new(config: &OptimizerConfig, rate: f64, norm: f64, step: u64) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let limit = config.max_grad_norm;
        let gradient_scale = if limit > 0.0 { (limit / (norm + CLIP_EPSILON)).min(1.0) } else { 1.0 };
        Self {
            gradient_scale: gradient_scale as f32,
            keep: (1.0 - rate * config.weight_decay) as f32,
            first_rate: (1.0 - config.adam_beta1) as f32,
            second_keep: config.adam_beta2 as f32,
            second_rate: (1.0 - config.adam_beta2) as f32,
            correction_root: correction(config.adam_beta2).sqrt() as f32,
            epsilon: config.adam_epsilon as f32,
            step_size: (rate / correction(config.adam_beta1)) as f32,
        }
    }

    fn apply(&self, keep: f32, weights: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32]) {
        for (((w, g), m), v) in weights.iter_mut().zip(gradients).zip(first).zip(second) {
            let g = g * self.gradient_scale;
            *w *= keep;
            *m += self.first_rate * (g - *m);
            *v = *v * self.second_keep + self.second_rate * g * g;
            *w -= self.step_size * *m / (v.sqrt() / self.correction_root + self.epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> OptimizerConfig {
        OptimizerConfig {
            learning_rate: 1e-3,
            adam_beta1: 0.9,
            adam_beta2: 0.99,
            adam_epsilon: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 0.0,
            schedule: Schedule::Constant,
            warmup_ratio: 0.0,
            total_steps: None,
        }
    }

    fn parameters() -> Vec<(String, Vec<usize>)> {
        vec![("a.weight".into(), vec![2, 2]), ("a.bias".into(), vec![3])]
    }

    /// AdamW as its paper states it, in f64 and one number at a time.
    fn plain(config: &OptimizerConfig, mut w: f64, gradients: &[f64], decay: f64) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for (step, g) in (1..).zip(gradients) {
            m = config.adam_beta1 * m + (1.0 - config.adam_beta1) * g;
            v = config.adam_beta2 * v + (1.0 - config.adam_beta2) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - config.adam_beta1.powi(step)), v / (1.0 - config.adam_beta2.powi(step)));
            w -= config.learning_rate * (m_hat / (v_hat.sqrt() + config.adam_epsilon) + decay * w);
        }
        w
    }

    #[test]
    fn five_updates_are_those_of_the_paper_and_only_matrices_decay() {
        let config = config();
        let mut weights = [vec![1.0f32, -0.5, 0.25, 2.0], vec![0.3, 0.0, -1.0]];
        let start = weights.clone();
        let gradient = |step: u32, index: usize| ((step * 7 + index as u32 * 3) % 11) as f32 / 10.0 - 0.45;
        let mut moments = Moments::zeros(&parameters());
        for step in 0..5 {
            let gradients = [0, 1].map(|t| (0..weights[t].len()).map(|i| gradient(step, t + i)).collect::<Vec<_>>());
            let views = weights.iter_mut().map(Vec::as_mut_slice).collect();
            update(&config, views, &gradients, 1.0, &mut moments, &[true, false]);
        }
        for (tensor, decay) in [(0, 0.1), (1, 0.0)] {
            for (index, (found, first)) in weights[tensor].iter().zip(&start[tensor]).enumerate() {
                let gradients: Vec<f64> = (0..5).map(|step| f64::from(gradient(step, tensor + index))).collect();
                let expected = plain(&config, f64::from(*first), &gradients, decay);
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
            }
        }
        assert_eq!(moments.steps, 5);
    }

    #[test]
    fn clipping_scales_the_gradient_to_the_limit_and_leaves_a_small_one() {
        let mut config = config();
        config.max_grad_norm = 1.0;
        assert!((Rule::new(&config, 1e-3, 4.0, 1).gradient_scale - 0.25).abs() < 1e-6);
        assert_eq!(Rule::new(&config, 1e-3, 0.5, 1).gradient_scale, 1.0);
        config.max_grad_norm = 0.0;
        assert_eq!(Rule::new(&config, 1e-3, 4.0, 1).gradient_scale, 1.0);
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

    #[test]
    fn moments_come_back_from_their_file_and_not_into_another_model() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let mut moments = Moments::zeros(&parameters());
        let mut weights = [vec![1.0f32; 4], vec![1.0; 3]];
        let gradients = [vec![0.1; 4], vec![0.2; 3]];
        update(
            &config(),
            weights.iter_mut().map(Vec::as_mut_slice).collect(),
            &gradients,
            1.0,
            &mut moments,
            &[true; 2],
        );
        moments.save(&path, &parameters()).unwrap();
        assert_eq!(Moments::load(&path, &parameters()).unwrap(), moments);
        let other = [("a.weight".into(), vec![4, 1]), ("a.bias".into(), vec![3])];
        assert_eq!(Moments::load(&path, &other).unwrap_err().exit_code(), 1);
    }
}
