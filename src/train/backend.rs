//! Where a policy is trained: what a step asks of the processor or a GPU.

use std::borrow::Cow;

use crate::error::Result;
use crate::model::{Config, Gradients, Model, Slope, TokenStats};
use crate::optim::{self, LossScale, Moments, Rule};
use crate::process::cancel::Stop;
use crate::train::microbatch::MicroBatch;

/// Which weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Those in training.
    Policy,
    /// Those that the KL divergence is measured from.
    Reference,
}

/// Weights, gradients and moments, and the passes over them.
///
/// # Errors
/// Every call returns [`crate::Error::Device`] when a device fails or has no room, passes that of the stop besides.
pub trait Machine {
    /// The policy's shape.
    fn config(&self) -> &Config;

    /// What the weights depend on besides the data and the numbers of the steps; `None` for the processor.
    fn kind(&self) -> Option<&'static str>;

    /// Tokens to run at once where nobody has decided.
    fn default_tokens(&self) -> usize;

    /// The policy's weights as they are now.
    fn weights(&mut self) -> Result<&Model>;

    /// By what a sampler on the same card finds the policy's weights, without a copy through the host; none from the processor.
    fn offer(&mut self) -> Result<Option<Vec<u8>>>;

    /// Waits until the weights that were offered are those of the last update.
    fn settle(&mut self) -> Result<()>;

    /// Takes the reference's weights.
    fn hold_reference(&mut self, model: Model) -> Result<()>;

    /// Lets passes end early when that is wished, with the error of the stop.
    fn stop_with(&mut self, stop: &Stop);

    /// What the model says of each target.
    fn logprobs(&mut self, of: Of, batch: &MicroBatch, temperature: f32) -> Result<Vec<TokenStats>>;

    /// What the policy says of each target, and adds the gradients of the loss with these slopes.
    fn accumulate(&mut self, batch: &MicroBatch, temperature: f32, slope: Slope<'_>) -> Result<Vec<TokenStats>>;

    /// The norm of each parameter's gradient, in the order of [`Config::trainable`].
    fn gradient_norms(&mut self) -> Result<Vec<f64>>;

    /// What slopes are multiplied by in the next pass, to change between updates; norms and updates are of the gradients without it.
    /// `None` where gradients have the range of f32.
    fn loss_scale(&mut self) -> Option<&mut LossScale>;

    /// Empties the gradients.
    fn clear_gradients(&mut self) -> Result<()>;

    /// Whether it has moments.
    fn has_moments(&self) -> bool;

    /// Takes moments, before the first update.
    fn take_moments(&mut self, moments: Moments) -> Result<()>;

    /// The moments as they are now, once it has them.
    fn moments(&mut self) -> Result<Option<Cow<'_, Moments>>>;

    /// Updates the weights by the gradients, and empties these.
    fn update(&mut self, rule: Rule) -> Result<()>;
}

/// The processor.
pub struct Cpu {
    model: Model,
    reference: Option<Model>,
    gradients: Gradients,
    moments: Option<Moments>,
}

impl Cpu {
    /// With a policy.
    #[must_use]
    pub fn new(model: Model) -> Self {
        Self { gradients: Gradients::zeros(model.config()), model, reference: None, moments: None }
    }
}

impl Machine for Cpu {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn kind(&self) -> Option<&'static str> {
        None
    }

    fn default_tokens(&self) -> usize {
        4096
    }

    fn weights(&mut self) -> Result<&Model> {
        Ok(&self.model)
    }

    fn offer(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    fn hold_reference(&mut self, mut model: Model) -> Result<()> {
        model.stop_with(self.model.stop());
        self.reference = Some(model);
        Ok(())
    }

    fn stop_with(&mut self, stop: &Stop) {
        self.model.stop_with(stop);
    }

    fn logprobs(&mut self, of: Of, batch: &MicroBatch, temperature: f32) -> Result<Vec<TokenStats>> {
        let model = match of {
            Of::Policy => &self.model,
            Of::Reference => self.reference.as_ref().expect("asked for where there is one"),
        };
        let stats = model.logprobs(&batch.packed, &batch.targets, temperature);
        model.stop().check().map(|()| stats)
    }

    fn accumulate(&mut self, batch: &MicroBatch, temperature: f32, slope: Slope<'_>) -> Result<Vec<TokenStats>> {
        let Self { model, gradients, .. } = self;
        let stats = model.accumulate_gradients(&batch.packed, &batch.targets, temperature, gradients, slope);
        model.stop().check().map(|()| stats)
    }

    fn gradient_norms(&mut self) -> Result<Vec<f64>> {
        Ok(optim::norms(&self.gradients.0))
    }

    fn loss_scale(&mut self) -> Option<&mut LossScale> {
        None
    }

    fn clear_gradients(&mut self) -> Result<()> {
        self.gradients.clear();
        Ok(())
    }

    fn has_moments(&self) -> bool {
        self.moments.is_some()
    }

    fn take_moments(&mut self, moments: Moments) -> Result<()> {
        self.moments = Some(moments);
        Ok(())
    }

    fn moments(&mut self) -> Result<Option<Cow<'_, Moments>>> {
        Ok(self.moments.as_ref().map(Cow::Borrowed))
    }

    fn update(&mut self, rule: Rule) -> Result<()> {
        let moments = self.moments.as_mut().expect("given before the first update");
        let decays: Vec<bool> = self.model.config().trainable().iter().map(|(_, shape)| shape.len() == 2).collect();
        optim::update(&rule, self.model.trainable_mut(), &self.gradients.0, moments, &decays);
        self.gradients.clear();
        Ok(())
    }
}
