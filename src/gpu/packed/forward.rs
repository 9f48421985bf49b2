//! The forward pass of packed sequences, and the activations that it keeps for the backward pass.

use std::sync::Arc;

use super::batch::PackedBatch;
use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Matrix};
use crate::gpu::kernels::{self, ModelShape, NormInput, RopeTable};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer, LayerAddresses};
use crate::model::Packed;
use crate::numbers::dtype::Dtype;

/// Which activations of each block are kept for the backward pass, which computes the others again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptActivations {
    /// All but the outputs of the norms and of the MLP's activation.
    All,
    /// As `All`, without the MLP's gate and up.
    NoMlp,
    /// Only the residual stream at the start of each block.
    Inputs,
    /// None, because there is no backward pass.
    Nothing,
}

/// The activations of a block for T rows that the backward pass reads. An array that blocks do not keep is shared by all of them.
#[derive(Clone)]
pub(super) struct BlockActivations {
    /// The residual stream at the start of the block, `(T, D)`.
    pub x_in: Arc<Buffer<f32>>,
    /// Queries and keys before the norms of their heads, `(T, (H + K) E)`, where they have norms.
    pub qk: Option<Arc<DynBuffer>>,
    /// Queries, keys and values after rope, `(T, (H + 2 K) E)`.
    pub qkv: Arc<DynBuffer>,
    /// Outputs of the heads, `(T, H E)`.
    pub attended: Arc<DynBuffer>,
    /// Log-sum-exp of the attention scores, `(T, H)`.
    pub log_sum: Arc<Buffer<f32>>,
    /// The residual stream after attention, `(T, D)`.
    pub x_mid: Arc<Buffer<f32>>,
    /// Gate and up of the MLP, `(T, 2 F)`; the backward pass replaces them by their gradients.
    pub gate_up: Arc<DynBuffer>,
}

/// Buffers for `rows` rows. The backward pass uses them, too: see there.
pub(super) struct ForwardBuffers {
    pub rows: usize,
    pub layers: Vec<BlockActivations>,
    /// The residual stream after the last block, `(T, D)`.
    pub x_out: Arc<Buffer<f32>>,
    /// The output of a product in f32, or the gradient of a norm's output, `(T, max(D, (H + 2 K) E))`.
    pub wide: Buffer<f32>,
    /// The output of a norm, `(T, D)`.
    pub normed: DynBuffer,
    /// The MLP's activation or its gradient, `(T, F)`.
    pub act: DynBuffer,
}

/// The forward pass of a model, with its buffers.
pub struct ForwardPass {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) shape: ModelShape,
    pub(super) dtype: Dtype,
    layers: usize,
    keep: KeptActivations,
    buffers: Option<ForwardBuffers>,
}

/// Called per layer with its queries, keys and values after rope, `(T, (H + 2 K) E)`.
pub type QkvHook<'a> = &'a mut dyn FnMut(usize, &DynBuffer) -> Result<()>;

impl ForwardPass {
    /// For models of the shape and type of `weights`. The first batch allocates the buffers, a larger one allocates them again.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when no kernel was compiled for the shape.
    pub fn new(driver: &Arc<dyn Driver>, weights: &DeviceWeights, keep: KeptActivations) -> Result<Self> {
        let (shape, dtype) = (ModelShape::new(&weights.config)?, weights.matrices.dtype());
        let layers = weights.config.num_hidden_layers;
        Ok(Self { driver: Arc::clone(driver), shape, dtype, layers, keep, buffers: None })
    }

    /// Copies packed sequences to the device.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub fn batch(&self, packed: &Packed) -> Result<PackedBatch> {
        PackedBatch::new(&self.driver, packed, self.shape.tile_rows(self.dtype))
    }

    /// Runs all blocks, up to the residual stream after the last one.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has not enough memory, and the errors of `hook`.
    pub fn run(&mut self, weights: &DeviceWeights, batch: &PackedBatch, hook: QkvHook<'_>) -> Result<()> {
        self.reserve(batch.rows)?;
        let buffers = self.buffers();
        let embedding = (weights.embedding(), self.dtype);
        kernels::embed(&*self.driver, batch, embedding, &buffers.layers[0].x_in, &self.shape)?;
        let first = NormInput::Rows(&buffers.layers[0].x_in);
        self.norm(first, weights.layer(0).input_norm, batch.rows)?;
        for layer in 0..self.layers {
            self.self_attention(weights, batch, layer)?;
            hook(layer, &buffers.layers[layer].qkv)?;
            let kept = &buffers.layers[layer];
            self.norm(
                NormInput::Sum(&kept.x_in, &buffers.wide, &kept.x_mid),
                weights.layer(layer).post_norm,
                batch.rows,
            )?;
            self.gate_up(weights, batch.rows, layer)?;
            self.down(weights, batch.rows, layer)?;
            let (next, norm) = match buffers.layers.get(layer + 1) {
                Some(next) => (&next.x_in, weights.layer(layer + 1).input_norm),
                None => (&buffers.x_out, weights.final_norm()), // only the sum is used
            };
            self.norm(NormInput::Sum(&kept.x_mid, &buffers.wide, next), norm, batch.rows)?;
        }
        Ok(())
    }

    /// `hidden (rows, D)` = the final norm of these rows of the last batch, which the LM head reads.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub fn hidden(&self, weights: &DeviceWeights, rows: &Buffer<u32>, hidden: &DynBuffer) -> Result<()> {
        let picked = NormInput::Picked(&self.buffers().x_out, rows);
        kernels::norm_rows(&*self.driver, picked, weights.final_norm(), (hidden, rows.len()), &self.shape)
    }

    /// Reads `normed`; writes queries, keys and values, the outputs of the heads, and to `wide` what is added to the residual stream.
    pub(super) fn self_attention(&self, weights: &DeviceWeights, batch: &PackedBatch, layer: usize) -> Result<()> {
        let (driver, shape, buffers, w) = (&*self.driver, &self.shape, self.buffers(), weights.layer(layer));
        let (kept, d, width, qkv) = (&buffers.layers[layer], shape.width, shape.attention_width(), shape.qkv());
        let raw = wide(buffers, qkv);
        kernels::linear(driver, buffers.normed.matrix(0, d), self.weight(w.qkv, d), raw, [batch.rows, qkv, d])?;
        let rope = RopeTable { table: weights.rope.at(0), positions: weights.positions };
        match (&kept.qk, w.head_norms) {
            (Some(qk), Some(norms)) => {
                kernels::norm_rope(driver, batch, (&buffers.wide, norms, rope), (qk, &kept.qkv), shape)
            }
            _ => kernels::bias_rope(driver, batch, (&buffers.wide, w.qkv_bias, rope), &kept.qkv, shape),
        }?;
        kernels::attend(driver, batch, &kept.qkv, (&kept.attended, &kept.log_sum), shape)?;
        let attended = kept.attended.matrix(0, width);
        kernels::linear(driver, attended, self.weight(w.o, width), wide(buffers, d), [batch.rows, d, width])
    }

    /// Reads `normed`; writes gate and up of the MLP.
    pub(super) fn gate_up(&self, weights: &DeviceWeights, rows: usize, layer: usize) -> Result<()> {
        let (buffers, LayerAddresses { gate_up, .. }) = (self.buffers(), weights.layer(layer));
        let (d, f) = (self.shape.width, self.shape.mlp);
        let out = buffers.layers[layer].gate_up.matrix(0, 2 * f);
        kernels::linear(&*self.driver, buffers.normed.matrix(0, d), self.weight(gate_up, d), out, [rows, 2 * f, d])
    }

    /// Reads gate and up; writes the activation to `act`, and to `wide` what is added to the residual stream.
    fn down(&self, weights: &DeviceWeights, rows: usize, layer: usize) -> Result<()> {
        let (buffers, d, f) = (self.buffers(), self.shape.width, self.shape.mlp);
        kernels::swiglu(&*self.driver, rows, &buffers.layers[layer].gate_up, &buffers.act, &self.shape)?;
        let down = self.weight(weights.layer(layer).down, f);
        kernels::linear(&*self.driver, buffers.act.matrix(0, f), down, wide(buffers, d), [rows, d, f])
    }

    pub(super) fn norm(&self, from: NormInput<'_>, weight: Address, rows: usize) -> Result<()> {
        kernels::norm_rows(&*self.driver, from, weight, (&self.buffers().normed, rows), &self.shape)
    }

    pub(super) fn weight(&self, at: Address, stride: usize) -> Matrix {
        Matrix { at, stride, dtype: self.dtype }
    }

    pub(super) fn keep(&self) -> KeptActivations {
        self.keep
    }

    pub(super) fn buffers(&self) -> &ForwardBuffers {
        self.buffers.as_ref().expect("a batch has run")
    }

    fn reserve(&mut self, rows: usize) -> Result<()> {
        if self.buffers.as_ref().is_none_or(|buffers| buffers.rows < rows) {
            self.buffers = None; // release first: holding both would be the peak
            self.buffers = Some(ForwardBuffers::new(self, rows)?);
        }
        Ok(())
    }
}

/// `wide` as rows of `width` numbers.
pub(super) fn wide(buffers: &ForwardBuffers, width: usize) -> Matrix {
    Matrix { at: buffers.wide.at(0), stride: width, dtype: Dtype::F32 }
}

impl ForwardBuffers {
    fn new(forward: &ForwardPass, rows: usize) -> Result<Self> {
        let ForwardPass { driver, shape, dtype, keep, layers, .. } = forward;
        let d = shape.width;
        let stream = || Buffer::new(driver, rows * d).map(Arc::new);
        let numbers = |width: usize| DynBuffer::new(driver, *dtype, rows * width).map(Arc::new);
        let block = |gate_up: Option<&Arc<DynBuffer>>| -> Result<BlockActivations> {
            Ok(BlockActivations {
                x_in: stream()?,
                qk: (shape.normed_qk > 0).then(|| numbers(shape.normed_qk)).transpose()?,
                qkv: numbers(shape.qkv())?,
                attended: numbers(shape.attention_width())?,
                log_sum: Arc::new(Buffer::new(driver, rows * shape.heads)?),
                x_mid: stream()?,
                gate_up: gate_up.map_or_else(|| numbers(2 * shape.mlp), |shared| Ok(Arc::clone(shared)))?,
            })
        };
        let mut shared = block(None)?;
        if *keep == KeptActivations::Nothing {
            shared.x_mid = Arc::clone(&shared.x_in);
        }
        let mut all = vec![shared.clone()];
        for _ in 1..*layers {
            all.push(match keep {
                KeptActivations::All => block(None)?,
                KeptActivations::NoMlp => block(Some(&shared.gate_up))?,
                KeptActivations::Inputs => BlockActivations { x_in: stream()?, ..shared.clone() },
                KeptActivations::Nothing => shared.clone(),
            });
        }
        let x_out = if *keep == KeptActivations::Nothing { Arc::clone(&shared.x_in) } else { stream()? };
        let (normed, act) =
            (DynBuffer::new(driver, *dtype, rows * d)?, DynBuffer::new(driver, *dtype, rows * shape.mlp)?);
        Ok(Self { rows, layers: all, x_out, wide: Buffer::new(driver, rows * d.max(shape.qkv()))?, normed, act })
    }
}
