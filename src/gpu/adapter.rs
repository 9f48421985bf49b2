//! A low-rank adapter (LoRA) on the device: the gradients of its matrices, and the sums that products read.
//!
//! As on the CPU ([`crate::model::AdapterConfig`]), the weights hold W + factor B A. The gradients are collected without the factor, which
//! is the same for all of them: whoever reads them multiplies.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::driver::{Driver, Matrix};
use crate::gpu::kernels::{self, input_gradient, linear, weight_gradient};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer};
use crate::model::{Model, Parameter};

/// The adapter of a model.
pub struct DeviceAdapter {
    pairs: Vec<DevicePair>,
    rank: usize,
    factor: f32,
    /// A and B of each pair, in the type of products.
    copy: DynBuffer,
    /// The adapted matrices of the base model.
    base: Buffer<f32>,
}

/// The adapter of one matrix: A `(r, in)` and B `(out, r)`.
struct DevicePair {
    layer: usize,
    /// The first of the matrices that one product reads together with this one, and the rows of those before it.
    first: Parameter,
    rows_before: usize,
    /// `[out, in]`.
    shape: [usize; 2],
    /// First numbers of A and B among what is trained.
    at: [usize; 2],
    /// First number of the matrix in [`DeviceAdapter::base`].
    in_base: usize,
    /// First number of the matrix in [`DeviceWeights::matrices`].
    in_weights: usize,
}

impl DeviceAdapter {
    /// Copies the adapter of `model`, whose weights are `weights`, to the device; `None` if it has none.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory, and here and in all methods when the device fails.
    pub fn new(driver: &Arc<dyn Driver>, model: &Model, weights: &DeviceWeights) -> Result<Option<Self>> {
        let Some(config) = model.adapter() else { return Ok(None) };
        let [own, adapted] = config.numbers(model.config());
        let (copy, base) = (DynBuffer::new(driver, weights.matrices.dtype(), own)?, Buffer::new(driver, adapted)?);
        let (mut pairs, mut next, mut in_base) = (Vec::new(), 0, 0);
        for (matrix, values) in model.adapted_matrices().iter().zip(model.trained_values().chunks(2)) {
            let (out, width) = matrix.shape;
            let at = [next, next + values[0].len()];
            at.iter().zip(values).try_for_each(|(&at, values)| copy.upload(at, values))?;
            base.upload(in_base, matrix.base)?;
            let in_weights = weights.layout.at_of_layer(matrix.layer, matrix.target);
            let first = first_of_product(matrix.target);
            let rows_before = (in_weights - weights.layout.at_of_layer(matrix.layer, first)) / width;
            let (layer, shape) = (matrix.layer, [out, width]);
            pairs.push(DevicePair { layer, first, rows_before, shape, at, in_base, in_weights });
            (next, in_base) = (at[1] + values[1].len(), in_base + out * width);
        }
        Ok(Some(Self { pairs, rank: config.rank, factor: config.factor(), copy, base }))
    }

    /// The numbers of A and B of each pair, in the order of [`Model::trained`].
    #[must_use]
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let of = |pair: &DevicePair| {
            let ([out, width], [a, b]) = (pair.shape, pair.at);
            [a..a + self.rank * width, b..b + out * self.rank]
        };
        self.pairs.iter().flat_map(of).collect()
    }

    /// r.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// What B A is multiplied by, and what the collected gradients are to be multiplied by.
    #[must_use]
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// A and B of all pairs in the type of products, which an update of them overwrites.
    #[must_use]
    pub fn copy(&self) -> &DynBuffer {
        &self.copy
    }

    /// Sets the adapted matrices of `weights` to the sums, with the bits that [`Model::merge_adapter`] makes, rounded to their type.
    /// `trained` has A and B.
    ///
    /// # Errors
    /// See [`DeviceAdapter::new`].
    pub fn merge(&self, driver: &dyn Driver, trained: &Buffer<f32>, weights: &DeviceWeights) -> Result<()> {
        self.pairs.iter().try_for_each(|pair| {
            let [a, b] = pair.at.map(|at| trained.at(at));
            let (base, sum) = (self.base.at(pair.in_base), weights.matrices.matrix(pair.in_weights, pair.shape[1]));
            kernels::merge_adapter(driver, (base, [a, b], sum), (pair.shape, self.rank), self.factor)
        })
    }

    /// Adds to `gradients` those of the adapters of the matrices of a layer that one product reads, from `first` on, given the input of that
    /// product, `x (rows, in)`, and the gradient of its output, `dy`. `narrow` has room for `rows` times r numbers.
    ///
    /// # Errors
    /// See [`DeviceAdapter::new`].
    pub(super) fn add_gradients(
        &self,
        driver: &dyn Driver,
        (layer, first): (usize, Parameter),
        [dy, x]: [Matrix; 2],
        (gradients, narrow): (&Buffer<f32>, &DynBuffer),
        rows: usize,
    ) -> Result<()> {
        for pair in self.pairs.iter().filter(|pair| (pair.layer, pair.first) == (layer, first)) {
            let ([out, width], [a, b], r) = (pair.shape, pair.at, self.rank);
            let dy = Matrix { at: dy.at.offset(pair.rows_before * dy.dtype.size()), ..dy };
            // `narrow`: x A^T; then dy B.
            let narrow = narrow.matrix(0, r);
            linear(driver, x, self.copy.matrix(a, width), narrow, [rows, r, width])?;
            weight_gradient(driver, dy, narrow, gradients.at(b), [rows, out, r])?;
            input_gradient(driver, dy, self.copy.matrix(b, r), narrow, [rows, out, r])?;
            weight_gradient(driver, narrow, x, gradients.at(a), [rows, r, width])?;
        }
        Ok(())
    }
}

/// The first of the adjacent matrices that one product reads, see [`crate::gpu::LayerAddresses`].
fn first_of_product(target: Parameter) -> Parameter {
    match target {
        Parameter::KProj | Parameter::VProj => Parameter::QProj,
        Parameter::UpProj => Parameter::GateProj,
        other => other,
    }
}
