//! A model's parameters on the device: matrices in the type that products read, vectors in f32.
//!
//! What one kernel reads is adjacent: matrices of queries, keys and values, those of gate and up, and the norms of heads.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::driver::{Address, Driver};
use crate::gpu::{Buffer, DynBuffer};
use crate::model::{Config, Model, Parameter, ParameterList};
use crate::numbers::dtype::Dtype;

/// Kernels read 16 bytes at a time, so every width must be a multiple of this many numbers.
const PACK: usize = 8;

/// The places of a list of parameters in one array.
#[derive(Debug, Clone)]
pub struct ParameterLayout {
    list: ParameterList,
    /// Index of each parameter's first number, in the order of the list.
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
    /// `((H + 2 K) E)`, where there is one.
    pub qkv_bias: Option<Address>,
    /// `(2 E)`, of queries, then of keys, where heads have norms.
    pub head_norms: Option<Address>,
    /// `(D, H E)`.
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

impl ParameterLayout {
    /// Lays out the parameters in `list`, for a model of this shape.
    ///
    /// # Errors
    /// [`Error::Device`] with the width that the kernels cannot read.
    pub fn new(config: &Config, list: ParameterList) -> Result<Self> {
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
        let mut at = vec![0; list.iter().count()];
        let mut next = 0;
        let mut place = |dimensions: usize| {
            for (at, (_, shape)) in at.iter_mut().zip(list.iter()).filter(|(_, (_, shape))| shape.len() == dimensions) {
                *at = next;
                next += shape.iter().product::<usize>();
            }
            next
        };
        let (matrices, all) = (place(2), place(1));
        Ok(Self { matrices, all, at, list })
    }

    /// The numbers of each parameter, in the order of the list.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let of = |((_, shape), &at): ((_, &[usize]), &usize)| at..at + shape.iter().product::<usize>();
        self.list.iter().zip(&self.at).map(of).collect()
    }

    /// First number of a parameter outside the layers.
    pub(super) fn of_model(&self, parameter: Parameter) -> usize {
        self.at[self.list.of_model(parameter).expect(LISTED)]
    }

    /// First number of a parameter of a layer, which must be in the list.
    pub(super) fn at_of_layer(&self, layer: usize, parameter: Parameter) -> usize {
        self.at[self.list.of_layer(layer, parameter).expect(LISTED)]
    }

    /// First number of the LM head.
    pub(super) fn of_head(&self) -> usize {
        self.at[self.list.of_head().expect(LISTED)]
    }

    /// Addresses of a layer's parameters, given the address of each number.
    pub(super) fn of_layer(&self, layer: usize, address: impl Fn(usize) -> Address) -> LayerAddresses {
        let optional = |parameter| Some(address(self.at[self.list.of_layer(layer, parameter)?]));
        let parameter = |parameter| optional(parameter).expect(LISTED);
        LayerAddresses {
            input_norm: parameter(Parameter::InputNorm),
            qkv: parameter(Parameter::QProj),
            qkv_bias: optional(Parameter::QBias),
            head_norms: optional(Parameter::QNorm),
            o: parameter(Parameter::OProj),
            post_norm: parameter(Parameter::PostNorm),
            gate_up: parameter(Parameter::GateProj),
            down: parameter(Parameter::DownProj),
        }
    }
}

impl DeviceWeights {
    /// Copies a model's parameters to the device, with rope tables for `positions`.
    ///
    /// # Errors
    /// [`Error::Device`] when the kernels do not support the shape, there is not enough memory, or the device fails.
    pub fn new(driver: &Arc<dyn Driver>, model: &Model, dtype: Dtype, positions: usize) -> Result<Self> {
        let layout = ParameterLayout::new(model.config(), model.config().stored())?;
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
        self.address(self.layout.of_model(Parameter::EmbedTokens))
    }

    /// The weight of the final norm, `(D)`.
    #[must_use]
    pub fn final_norm(&self) -> Address {
        self.address(self.layout.of_model(Parameter::FinalNorm))
    }

    /// The LM head, `(V, D)`.
    #[must_use]
    pub fn head(&self) -> Address {
        self.address(self.layout.of_head())
    }

    /// Addresses of the parameters of layer `layer`.
    #[must_use]
    pub fn layer(&self, layer: usize) -> LayerAddresses {
        self.layout.of_layer(layer, |number| self.address(number))
    }

    fn address(&self, number: usize) -> Address {
        match number.checked_sub(self.layout.matrices) {
            None => self.matrices.at(number),
            Some(number) => self.vectors.at(number),
        }
    }
}

/// Of parameters that every family has.
const LISTED: &str = "every list has it";
