//! The gradients of all that is trained in one f32 array.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::adapter::DeviceAdapter;
use crate::gpu::driver::{Address, Driver, Matrix};
use crate::gpu::kernels::weight_gradient;
use crate::gpu::{Buffer, DynBuffer, ParameterLayout};
use crate::model::{Config, Parameter};

/// The gradients that a step accumulates.
pub struct DeviceGradients {
    /// All gradients.
    pub numbers: Buffer<f32>,
    /// Those of each trained parameter, in the order of [`Model::trained`].
    ///
    /// [`Model::trained`]: crate::model::Model::trained
    pub ranges: Vec<Range<usize>>,
    of: GradientsOf,
}

/// Whose gradients they are.
enum GradientsOf {
    /// All parameters', laid out like these.
    Weights(ParameterLayout),
    /// An adapter's. Sums over rows that come with those of the residual stream, of norms, go to `discarded`.
    Adapter { adapter: Arc<DeviceAdapter>, discarded: Buffer<f32>, has_head_norms: bool },
}

/// Where the gradients of a layer's vectors go.
pub(super) struct VectorGradients {
    /// `(D)`.
    pub input_norm: Address,
    /// `((H + 2 K) E)`, unless there is none or it is not trained.
    pub qkv_bias: Option<Address>,
    /// `(2 E)`, of queries, then of keys, where heads have norms.
    pub head_norms: Option<Address>,
    /// `(D)`.
    pub post_norm: Address,
}

impl DeviceGradients {
    /// Allocates gradients of zero for all parameters.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the kernels do not support the shape or there is not enough memory.
    pub fn zeros(driver: &Arc<dyn Driver>, config: &Config) -> Result<Self> {
        let layout = ParameterLayout::new(config, config.trainable())?;
        let numbers = Buffer::zeros(driver, layout.all)?;
        Ok(Self { numbers, ranges: layout.ranges(), of: GradientsOf::Weights(layout) })
    }

    /// Allocates gradients of zero for an adapter, which are to be multiplied by its factor.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory.
    pub fn of_adapter(driver: &Arc<dyn Driver>, adapter: &Arc<DeviceAdapter>, config: &Config) -> Result<Self> {
        let numbers = Buffer::zeros(driver, adapter.copy().len())?;
        let discarded = Buffer::zeros(driver, config.hidden_size.max(2 * config.head_dim()))?;
        let (ranges, adapter, has_head_norms) = (adapter.ranges(), Arc::clone(adapter), config.qk_norm);
        Ok(Self { numbers, ranges, of: GradientsOf::Adapter { adapter, discarded, has_head_norms } })
    }

    /// Downloads the gradient of each trained parameter.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub fn to_vecs(&self) -> Result<Vec<Vec<f32>>> {
        let of = |range: &Range<usize>| {
            let mut numbers = vec![0.0; range.len()];
            self.numbers.download(range.start, &mut numbers).map(|()| numbers)
        };
        self.ranges.iter().map(of).collect()
    }

    /// The rank of the adapter; 0 without one.
    pub(super) fn rank(&self) -> usize {
        match &self.of {
            GradientsOf::Weights(_) => 0,
            GradientsOf::Adapter { adapter, .. } => adapter.rank(),
        }
    }

    /// `None` where it is not trained, as with [`DeviceGradients::head`].
    pub(super) fn embedding(&self) -> Option<Address> {
        self.of_weights(|layout| layout.of_model(Parameter::EmbedTokens))
    }

    pub(super) fn head(&self) -> Option<Address> {
        self.of_weights(ParameterLayout::of_head)
    }

    fn of_weights(&self, place: impl Fn(&ParameterLayout) -> usize) -> Option<Address> {
        match &self.of {
            GradientsOf::Weights(layout) => Some(self.numbers.at(place(layout))),
            GradientsOf::Adapter { .. } => None,
        }
    }

    pub(super) fn final_norm(&self) -> Address {
        match &self.of {
            GradientsOf::Weights(layout) => self.numbers.at(layout.of_model(Parameter::FinalNorm)),
            GradientsOf::Adapter { discarded, .. } => discarded.at(0),
        }
    }

    pub(super) fn vectors(&self, layer: usize) -> VectorGradients {
        match &self.of {
            GradientsOf::Weights(layout) => {
                let to = layout.of_layer(layer, |number| self.numbers.at(number));
                let (input_norm, post_norm) = (to.input_norm, to.post_norm);
                VectorGradients { input_norm, qkv_bias: to.qkv_bias, head_norms: to.head_norms, post_norm }
            }
            GradientsOf::Adapter { discarded, has_head_norms, .. } => {
                let nowhere = discarded.at(0);
                let head_norms = has_head_norms.then_some(nowhere);
                VectorGradients { input_norm: nowhere, qkv_bias: None, head_norms, post_norm: nowhere }
            }
        }
    }

    /// Adds the gradients of adjacent matrices of a layer, `(out, in)` together, from `first` on, given their input `x (rows, in)` and the
    /// gradient of their output, `dy (rows, out)`. `narrow` is for `rows` times [`DeviceGradients::rank`] numbers.
    pub(super) fn add(
        &self,
        driver: &dyn Driver,
        (layer, first): (usize, Parameter),
        [dy, x]: [Matrix; 2],
        narrow: &DynBuffer,
        shape: [usize; 3],
    ) -> Result<()> {
        match &self.of {
            GradientsOf::Weights(layout) => {
                weight_gradient(driver, dy, x, self.numbers.at(layout.at_of_layer(layer, first)), shape)
            }
            GradientsOf::Adapter { adapter, .. } => {
                adapter.add_gradients(driver, (layer, first), [dy, x], (&self.numbers, narrow), shape[0])
            }
        }
    }
}
