//! A model's parameters on the device: matrices in the type that products read, vectors in f32.
//!
//! Matrices that one product reads are adjacent: those of queries, keys and values, and those of gate and up.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::driver::{Address, Driver};
use crate::gpu::{Buffer, DynBuffer};
use crate::model::{Config, Model};
use crate::numbers::dtype::Dtype;

/// Kernels read 16 bytes at a time, so every width must be a multiple of this many numbers.
const PACK: usize = 8;

/// The places of all parameters in one array.
#[derive(Debug, Clone)]
pub struct ParameterLayout {
    /// Index of each parameter's first number, in the order of [`Config::parameters`].
    pub at: Vec<usize>,
    /// How many numbers all matrices have; they come first.
    pub matrices: usize,
    /// How many numbers all parameters have.
    pub all: usize,
}

/// Addresses of the parameters of one block: matrices `(out, in)`, vectors `(out)`.
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
    /// The model's shape.
    pub config: Config,
    /// The places of the parameters in `matrices`, then `vectors`.
    pub layout: ParameterLayout,
    /// All matrices.
    pub matrices: DynBuffer,
    /// All vectors.
    pub vectors: Buffer<f32>,
    /// Rotary tables: cosines, then sines, `(positions, E / 2)` each.
    pub rope: Buffer<f32>,
    /// How many positions `rope` has.
    pub positions: usize,
}

impl LayerAddresses {
    /// Addresses for block `layer`; `parameter` returns that of a parameter by its index in [`Config::parameters`].
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
    /// Lays out the parameters of a model.
    ///
    /// # Errors
    /// [`Error::Device`] with the width that the kernels cannot read.
    pub fn new(config: &Config) -> Result<Self> {
        let widths = [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("the width of a head", config.head_dim()),
        ];
        if let Some((name, width)) = widths.iter().find(|(_, width)| !width.is_multiple_of(PACK)) {
            return Err(Error::Device(format!(
                "{name} = {width} is not a multiple of {PACK}, which the GPU's kernels require"
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
    /// [`Error::Device`] when the kernels do not support the shape, there is not enough memory, or the device fails.
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

    /// The embedding, `(V, D)`.
    #[must_use]
    pub fn embedding(&self) -> Address {
        self.parameter(0)
    }

    /// The weight of the final norm, `(D)`.
    #[must_use]
    pub fn final_norm(&self) -> Address {
        self.parameter(final_norm_index(&self.config))
    }

    /// The LM head, `(V, D)`.
    #[must_use]
    pub fn head(&self) -> Address {
        self.parameter(head_index(&self.config))
    }

    /// The parameters of block `layer`.
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

/// How many parameters a block has in [`Config::parameters`].
const LAYER: usize = 12;

/// Index of the final norm in [`Config::parameters`].
pub(super) fn final_norm_index(config: &Config) -> usize {
    1 + LAYER * config.num_hidden_layers
}

/// Index of the LM head in [`Config::parameters`].
pub(super) fn head_index(config: &Config) -> usize {
    if config.tie_word_embeddings { 0 } else { 1 + final_norm_index(config) }
}
