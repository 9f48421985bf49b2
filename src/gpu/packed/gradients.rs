//! The gradients of all parameters in one f32 array, laid out like the parameters.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::driver::{Address, Driver};
use crate::gpu::{Buffer, LayerAddresses, ParameterLayout};
use crate::model::{Config, Parameter};

/// The gradients that a step accumulates.
pub struct DeviceGradients {
    /// All gradients.
    pub numbers: Buffer<f32>,
    /// Where each parameter's gradient is in `numbers`.
    pub layout: ParameterLayout,
    config: Config,
}

impl DeviceGradients {
    /// Allocates gradients of zero.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the kernels do not support the shape or there is not enough memory.
    pub fn zeros(driver: &Arc<dyn Driver>, config: &Config) -> Result<Self> {
        let layout = ParameterLayout::new(config, config.trainable())?;
        Ok(Self { numbers: Buffer::zeros(driver, layout.all)?, layout, config: config.clone() })
    }

    /// Downloads the gradient of each parameter, in the order of [`Config::trainable`].
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub fn to_vecs(&self) -> Result<Vec<Vec<f32>>> {
        let of = |((_, shape), &at): ((_, &[usize]), &usize)| {
            let mut numbers = vec![0.0; shape.iter().product()];
            self.numbers.download(at, &mut numbers).map(|()| numbers)
        };
        self.config.trainable().iter().zip(&self.layout.at).map(of).collect()
    }

    pub(super) fn embedding(&self) -> Address {
        self.numbers.at(self.layout.of_model(Parameter::EmbedTokens))
    }

    pub(super) fn final_norm(&self) -> Address {
        self.numbers.at(self.layout.of_model(Parameter::FinalNorm))
    }

    pub(super) fn head(&self) -> Address {
        self.numbers.at(self.layout.of_head())
    }

    pub(super) fn layer(&self, layer: usize) -> LayerAddresses {
        self.layout.of_layer(layer, |number| self.numbers.at(number))
    }
}
