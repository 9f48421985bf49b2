//! Log-probabilities and gradients of packed sequences on the device: `Model::logprobs` and `Model::accumulate_gradients` on a GPU.

use std::sync::Arc;

use super::backward::{BackwardPass, Pass};
use super::forward::{ForwardPass, KeptActivations};
use super::gradients::DeviceGradients;
use super::head::{LmHead, LmHeadGradients};
use crate::error::Result;
use crate::gpu::DeviceWeights;
use crate::gpu::driver::Driver;
use crate::model::{Packed, Slope, Target, TokenStats};

/// Forward and backward passes of a model. Buffers are kept from one batch to the next.
pub struct PackedModel {
    forward: ForwardPass,
    head: LmHead,
    backward: Option<BackwardPass>,
}

impl PackedModel {
    /// For models of the shape and type of `weights`, with at most `logits_bytes` of logits at once.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when no kernel was compiled for the shape, or there is not enough memory.
    pub fn new(
        driver: &Arc<dyn Driver>,
        weights: &DeviceWeights,
        keep: KeptActivations,
        logits_bytes: usize,
    ) -> Result<Self> {
        let forward = ForwardPass::new(driver, weights, keep)?;
        Ok(Self { head: LmHead::new(&forward, logits_bytes)?, forward, backward: None })
    }

    /// Log-probabilities (nats) and entropies of `targets` at a temperature.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has not enough memory.
    pub fn logprobs(
        &mut self,
        weights: &DeviceWeights,
        packed: &Packed,
        (targets, temperature): (&[Target], f32),
    ) -> Result<Vec<TokenStats>> {
        let batch = self.forward.batch(packed)?;
        self.forward.run(weights, &batch, &mut |_, _| Ok(()))?;
        Ok(self.head.run(&self.forward, weights, (targets, temperature), None)?.0)
    }

    /// The same, and adds the gradients of a loss to `gradients`. The loss is given by its derivative with respect to each
    /// log-probability: `slope(i, logprob)` is that of the loss at `targets[i]`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has not enough memory.
    pub fn accumulate(
        &mut self,
        weights: &DeviceWeights,
        packed: &Packed,
        (targets, temperature): (&[Target], f32),
        (gradients, slope): (&DeviceGradients, Slope<'_>),
    ) -> Result<Vec<TokenStats>> {
        let batch = self.forward.batch(packed)?;
        if self.backward.as_ref().is_some_and(|backward| !backward.holds(&batch, gradients.rank())) {
            self.backward = None; // release first, then allocate
        }
        self.forward.run(weights, &batch, &mut |_, _| Ok(()))?;
        let backward = match &mut self.backward {
            Some(backward) => backward,
            empty => empty.insert(BackwardPass::new(&self.forward, &batch, gradients.rank())?),
        };
        let learning = LmHeadGradients { slope, gradients, backward, rows: batch.rows };
        let (stats, learned) = self.head.run(&self.forward, weights, (targets, temperature), Some(&learning))?;
        if learned {
            backward.run(&self.forward, &Pass { weights, batch: &batch, gradients }, packed)?;
        }
        Ok(stats)
    }
}
