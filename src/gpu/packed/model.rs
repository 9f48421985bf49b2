//! A model on the device that is looked at and learns: the twin of `Model::logprobs` and `Model::accumulate`.

use std::sync::Arc;

use super::backward::{BackwardPass, Pass};
use super::forward::{ForwardPass, KeptActivations};
use super::gradients::DeviceGradients;
use super::head::{HeadGradients, LmHead, LossSlope};
use crate::error::Result;
use crate::gpu::DeviceWeights;
use crate::gpu::driver::Driver;
use crate::model::{Packed, Target, TokenStats};

/// Memory for the passes of a model: what a batch needs is kept for the next.
pub struct PackedModel {
    forward: ForwardPass,
    head: LmHead,
    backward: Option<BackwardPass>,
}

impl PackedModel {
    /// For models of the shape and type of `weights`. `logits_bytes` bounds the logits held at once.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is no kernel for the shape, or no room.
    pub fn new(
        driver: &Arc<dyn Driver>,
        weights: &DeviceWeights,
        keep: KeptActivations,
        logits_bytes: usize,
    ) -> Result<Self> {
        let forward = ForwardPass::new(driver, weights, keep)?;
        Ok(Self { head: LmHead::new(&forward, logits_bytes)?, forward, backward: None })
    }

    /// Log-probabilities and entropies of `targets` at a temperature.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has no room.
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

    /// The same, and adds to `gradients` those of a loss given by its derivative after each log-probability: `slope(i, logprob)` =
    /// dLoss / dlogprob of `targets[i]`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has no room.
    pub fn accumulate(
        &mut self,
        weights: &DeviceWeights,
        packed: &Packed,
        (targets, temperature): (&[Target], f32),
        (gradients, slope): (&DeviceGradients, LossSlope<'_>),
    ) -> Result<Vec<TokenStats>> {
        let batch = self.forward.batch(packed)?;
        if self.backward.as_ref().is_some_and(|backward| !backward.holds(&batch)) {
            self.backward = None; // first give back, then take
        }
        self.forward.run(weights, &batch, &mut |_, _| Ok(()))?;
        let backward = match &mut self.backward {
            Some(backward) => backward,
            empty => empty.insert(BackwardPass::new(&self.forward, &batch)?),
        };
        let learning = HeadGradients { slope, gradients, backward, rows: batch.rows };
        let (stats, learned) = self.head.run(&self.forward, weights, (targets, temperature), Some(&learning))?;
        if learned {
            backward.run(&self.forward, &Pass { weights, batch: &batch, gradients }, packed)?;
        }
        Ok(stats)
    }
}
