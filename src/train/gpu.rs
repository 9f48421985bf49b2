//! Trains on a GPU, with the passes of [`crate::gpu::packed`]; checkpoints have the same format as from the CPU.

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::DeviceWeights;
use crate::gpu::adamw::AdamW;
use crate::gpu::adapter::DeviceAdapter;
use crate::gpu::driver::Driver;
use crate::gpu::packed::{DeviceGradients, PackedModel, TrainingPlan};
use crate::model::{AdapterConfig, Config, Model, Slope, TokenSlope, TokenStats};
use crate::numbers::dtype::Dtype;
use crate::optim::{LossScale, Moments, Rule};
use crate::process::cancel::Stop;
use crate::train::backend::{Backend, Frozen, Which};
use crate::train::microbatch::MicroBatch;

/// Trains on a GPU.
pub struct Gpu {
    driver: Arc<dyn Driver>,
    /// A copy of the weights on the host.
    model: Model,
    /// Whether that copy is up to date.
    is_current: bool,
    weights: DeviceWeights,
    adapter: Option<Arc<DeviceAdapter>>,
    frozen: Frozen<DeviceWeights>,
    learner: PackedModel,
    gradients: DeviceGradients,
    optimizer: AdamW,
    tokens: usize,
    /// `Some` where gradients are f16.
    loss_scale: Option<LossScale>,
    stop: Stop,
}

impl Gpu {
    /// Trains `model` with products in `dtype`, within the memory of `plan`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the kernels do not support the shape, memory runs out, or the device fails.
    pub fn new(driver: Arc<dyn Driver>, model: Model, dtype: Dtype, plan: &TrainingPlan) -> Result<Self> {
        let positions = model.config().positions();
        let weights = DeviceWeights::new(&driver, &model, dtype, positions)?;
        let adapter = DeviceAdapter::new(&driver, &model, &weights)?.map(Arc::new);
        let gradients = match &adapter {
            Some(adapter) => DeviceGradients::of_adapter(&driver, adapter, model.config())?,
            None => DeviceGradients::zeros(&driver, model.config())?,
        };
        Ok(Self {
            learner: PackedModel::new(&driver, &weights, plan.keep, plan.logits_bytes)?,
            optimizer: AdamW::new(&driver, &model, &gradients)?,
            gradients,
            driver,
            model,
            is_current: true,
            weights,
            adapter,
            frozen: Frozen::default(),
            tokens: plan.tokens,
            loss_scale: (dtype == Dtype::F16).then(LossScale::default),
            stop: Stop::default(),
        })
    }

    /// The factor on slopes and gradients; 1 without a loss scale.
    fn scale(&self) -> f32 {
        self.loss_scale.map_or(1.0, |scale| scale.factor as f32) // exact: a power of two
    }

    /// What the collected gradients are to be multiplied by.
    fn gradient_scale(&self) -> f32 {
        self.adapter.as_ref().map_or(1.0, |adapter| adapter.factor()) / self.scale()
    }
}

impl Backend for Gpu {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn trained(&self) -> Vec<(String, Vec<usize>)> {
        self.model.trained()
    }

    fn adapter(&self) -> Option<&AdapterConfig> {
        self.model.adapter()
    }

    fn compute_dtype(&self) -> Option<&'static str> {
        Some(self.weights.matrices.dtype().name())
    }

    fn is_on_host(&self) -> bool {
        false
    }

    fn default_tokens(&self) -> usize {
        self.tokens
    }

    fn weights(&mut self) -> Result<&Model> {
        if !self.is_current {
            self.optimizer.weights_to(&mut self.model)?;
            self.model.merge_adapter();
            self.is_current = true;
        }
        Ok(&self.model)
    }

    fn share_weights(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(Some(serde_json::to_vec(&self.weights.offer()?).expect("plain data serialises")))
    }

    fn wait_for_update(&mut self) -> Result<()> {
        self.driver.wait(&self.driver.mark()?)
    }

    fn hold(&mut self, which: Which, model: Model) -> Result<()> {
        // Buffers have the policy's shape.
        let shape = |config: &Config| Config {
            initializer_range: 0.0,
            pad_token_id: None,
            max_position_embeddings: 0,
            ..config.clone()
        };
        if shape(model.config()) != shape(self.model.config()) {
            let option = if which == Which::Teacher { "--teacher" } else { "--reference" };
            return Err(Error::Usage(format!(
                "{option} has another shape than --policy: a GPU computes both in the same; --device cpu takes any"
            )));
        }
        let dtype = self.weights.matrices.dtype();
        *self.frozen.place(which) = None; // it may be replaced, and there is no room for two
        let weights = DeviceWeights::new(&self.driver, &model, dtype, model.config().positions())?;
        *self.frozen.place(which) = Some(weights);
        Ok(())
    }

    fn stop_with(&mut self, stop: &Stop) {
        self.stop = stop.clone();
    }

    fn logprobs(&mut self, which: Which, batch: &MicroBatch, temperature: f32) -> Result<Vec<TokenStats>> {
        self.stop.check()?;
        let weights = self.frozen.or(&self.weights, which);
        self.learner.logprobs(weights, &batch.packed, (&batch.targets, temperature))
    }

    fn accumulate(&mut self, batch: &MicroBatch, temperature: f32, slope: Slope<'_>) -> Result<Vec<TokenStats>> {
        self.stop.check()?;
        let (targets, scale) = ((&batch.targets[..], temperature), self.scale());
        let scaled = |target, logprob| {
            let TokenSlope { logprob, entropy } = slope(target, logprob);
            TokenSlope { logprob: scale * logprob, entropy: scale * entropy }
        };
        self.learner.accumulate(&self.weights, &batch.packed, targets, (&self.gradients, &scaled))
    }

    fn gradient_norms(&mut self) -> Result<Vec<f64>> {
        let scale = f64::from(self.gradient_scale());
        Ok(self.optimizer.norms(&self.gradients)?.into_iter().map(|norm| norm * scale).collect())
    }

    fn loss_scale(&mut self) -> Option<&mut LossScale> {
        self.loss_scale.as_mut()
    }

    fn clear_gradients(&mut self) -> Result<()> {
        self.gradients.numbers.clear()
    }

    fn has_moments(&self) -> bool {
        self.optimizer.has_moments()
    }

    fn take_moments(&mut self, moments: Moments) -> Result<()> {
        self.optimizer.take_moments(&moments)
    }

    fn moments(&mut self) -> Result<Option<Cow<'_, Moments>>> {
        Ok(self.optimizer.moments()?.map(Cow::Owned))
    }

    fn update(&mut self, mut rule: Rule) -> Result<()> {
        self.is_current = false;
        rule.gradient_scale *= self.gradient_scale();
        let (optimizer, gradients, weights) = (&mut self.optimizer, &self.gradients, &self.weights);
        match &self.adapter {
            None => optimizer.update(&rule, gradients, (&weights.matrices, Some(&weights.vectors))),
            Some(adapter) => {
                optimizer.update(&rule, gradients, (adapter.copy(), None))?;
                adapter.merge(&*self.driver, optimizer.weights(), weights)
            }
        }
    }
}
