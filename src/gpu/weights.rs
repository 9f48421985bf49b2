//! A model's parameters on the device: matrices in the type of the products, vectors in f32.
//!
//! What one product reads lies together: queries, keys and values; gate and up.

use std::sync::Arc;

use super::buffer::{Buffer, DynBuffer};
use super::driver::{Address, Driver};
use crate::error::{Error, Result};
use crate::model::{Config, Model};
use crate::numbers::dtype::Dtype;

/// Kernels read 16 bytes at a time: every width is a multiple of so many numbers.
const PACK: usize = 8;

/// Where each parameter lies among all of them.
#[derive(Debug, Clone)]
pub struct ParameterLayout {
    /// First number of each parameter, in the order of [`Config::parameters`].
    pub at: Vec<usize>,
    /// Numbers of all matrices, which come first.
    pub matrices: usize,
    /// Numbers of all parameters.
    pub all: usize,
}

/// Places of one block's parameters: matrices `(out, in)`, vectors `(out)`.
#[derive(Debug, Clone, Copy)]
pub struct LayerAddresses {
    /// `(D)`.
    pub input_norm: Address,
    /// `((H + 2 K) E, D)`.
    pub qkv: Address,
    /// `((H + 2 K) E)`.
    pub qkv_bias: Address,
    /// `(D, D)`.
    pub o: Address,
    /// `(D)`.
    pub post_norm: Address,
    /// `(2 F, D)`: gate, then up.
    pub gate_up: Address,
    /// `(D, F)`.
    pub down: Address,
}

/// A model's parameters on a device.
pub struct DeviceWeights {
    /// The shape.
    pub config: Config,
    /// Of `matrices` and `vectors` together.
    pub layout: ParameterLayout,
    /// All matrices.
    pub matrices: DynBuffer,
    /// All vectors.
    pub vectors: Buffer<f32>,
    /// Cosines, then sines, `(positions, E / 2)` each.
    pub rope: Buffer<f32>,
    /// Positions in `rope`.
    pub positions: usize,
}

impl LayerAddresses {
    /// Of block `layer`, by where each parameter is, in the order of [`Config::parameters`].
    pub(super) fn of(layer: usize, parameter: impl Fn(usize) -> Address) -> Self {
        let parameter = |i: usize| parameter(1 + LAYER * layer + i);
        Self {
            input_norm: parameter(0),
            qkv: parameter(1),
            qkv_bias: parameter(2),
            o: parameter(7),
            post_norm: parameter(8),
            gate_up: parameter(9),
            down: parameter(11),
        }
    }
}

impl ParameterLayout {
    /// For a shape.
    ///
    /// # Errors
    /// [`Error::Device`] naming a width that the kernels cannot read.
    pub fn new(config: &Config) -> Result<Self> {
        let widths = [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("the width of a head", config.head_dim()),
        ];
        if let Some((name, width)) = widths.iter().find(|(_, width)| !width.is_multiple_of(PACK)) {
            return Err(Error::Device(format!(
                "{name} = {width} is no multiple of {PACK}, as the GPU's kernels need it"
            )));
        }
        let parameters = config.parameters();
        let mut at = vec![0; parameters.len()];
        let mut next = 0;
        let mut place = |dimensions: usize| {
            for (at, (_, shape)) in at.iter_mut().zip(&parameters).filter(|(_, (_, shape))| shape.len() == dimensions) {
                *at = next;
                next += shape.iter().product::<usize>();
            }
            next
        };
        Ok(Self { matrices: place(2), all: place(1), at })
    }
}

impl DeviceWeights {
    /// Copies a model's parameters to the device, with rope tables for `positions`.
    ///
    /// # Errors
    /// [`Error::Device`] when the shape does not suit the kernels, there is no room, or the device fails.
    pub fn new(driver: &Arc<dyn Driver>, model: &Model, dtype: Dtype, positions: usize) -> Result<Self> {
        let layout = ParameterLayout::new(model.config())?;
        let matrices = DynBuffer::shareable(driver, dtype, layout.matrices)?;
        let vectors = Buffer::shareable(driver, layout.all - layout.matrices)?;
        let rope = Buffer::from_slice(driver, &model.rope_table(positions))?;
        let weights = Self { config: model.config().clone(), layout, matrices, vectors, rope, positions };
        weights.upload(model)?;
        Ok(weights)
    }

    /// Overwrites all parameters with those of a model of the same shape.
    ///
    /// # Errors
    /// [`Error::Device`] when the device fails.
    pub fn upload(&self, model: &Model) -> Result<()> {
        for (numbers, &at) in model.parameters().into_iter().zip(&self.layout.at) {
            match at.checked_sub(self.layout.matrices) {
                None => self.matrices.upload(at, numbers)?,
                Some(at) => self.vectors.upload(at, numbers)?,
            }
        }
        Ok(())
    }

    /// `(V, D)`.
    #[must_use]
    pub fn embedding(&self) -> Address {
        self.parameter(0)
    }

    /// `(D)`.
    #[must_use]
    pub fn final_norm(&self) -> Address {
        self.parameter(final_norm_index(&self.config))
    }

    /// `(V, D)`.
    #[must_use]
    pub fn head(&self) -> Address {
        self.parameter(head_index(&self.config))
    }

    /// Of block `layer`.
    #[must_use]
    pub fn layer(&self, layer: usize) -> LayerAddresses {
        LayerAddresses::of(layer, |index| self.parameter(index))
    }

    fn parameter(&self, index: usize) -> Address {
        let at = self.layout.at[index];
        match at.checked_sub(self.layout.matrices) {
            None => self.matrices.at(at),
            Some(at) => self.vectors.at(at),
        }
    }
}

/// Parameters of a block, in the order of [`Config::parameters`].
const LAYER: usize = 12;

/// The final norm's among the parameters.
pub(super) fn final_norm_index(config: &Config) -> usize {
    1 + LAYER * config.num_hidden_layers
}

/// The LM head's among the parameters.
pub(super) fn head_index(config: &Config) -> usize {
    if config.tie_word_embeddings { 0 } else { 1 + final_norm_index(config) }
}
