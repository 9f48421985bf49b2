//! Forward of packed sequences, and what it leaves for a backward.

use std::sync::Arc;

use super::batch::PackedBatch;
use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Matrix};
use crate::gpu::kernels::{self, ModelShape, NormInput, RopeTable};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer, LayerAddresses};
use crate::model::Packed;
use crate::numbers::dtype::Dtype;

/// What of each block stays until the backward; the rest is computed again there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptActivations {
    /// Everything but what norms and the activation give.
    All,
    /// All but the gate and up of the MLP.
    NoMlp,
    /// The residual stream at the block's start.
    Inputs,
    /// Nothing: there is no backward.
    Nothing,
}

/// What a block computes on T rows and its backward needs again. Blocks that do not keep an array share one.
#[derive(Clone)]
pub(super) struct BlockActivations {
    /// Residual stream at the block's start, `(T, D)`.
    pub x_in: Arc<Buffer<f32>>,
    /// Queries, keys and values after rope, `(T, (H + 2 K) E)`.
    pub qkv: Arc<DynBuffer>,
    /// Heads' outputs, `(T, H E)`.
    pub attended: Arc<DynBuffer>,
    /// Log-sum-exp of the scores, `(T, H)`.
    pub log_sum: Arc<Buffer<f32>>,
    /// Residual stream after attention, `(T, D)`.
    pub x_mid: Arc<Buffer<f32>>,
    /// `(T, 2 F)`.
    pub gate_up: Arc<DynBuffer>,
}

/// Memory for `rows` rows.
pub(super) struct ForwardBuffers {
    pub rows: usize,
    pub layers: Vec<BlockActivations>,
    /// Residual stream after the last block, `(T, D)`.
    pub x_out: Arc<Buffer<f32>>,
    /// What a product gives or a norm's gradient, `(T, max(D, (H + 2 K) E))`.
    pub wide: Buffer<f32>,
    /// `(T, D)`.
    pub normed: DynBuffer,
    /// `(T, F)`.
    pub act: DynBuffer,
}

/// The forward of one model, with its memory.
pub struct ForwardPass {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) shape: ModelShape,
    pub(super) dtype: Dtype,
    layers: usize,
    keep: KeptActivations,
    room: Option<ForwardBuffers>,
}

/// Told of each layer's queries, keys and values after rope, `(T, (H + 2 K) E)`.
pub type QkvHook<'a> = &'a mut dyn FnMut(usize, &DynBuffer) -> Result<()>;

impl ForwardPass {
    /// Of models of the shape and type of `weights`. Memory is taken by the first batch, and again by larger ones.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is no kernel for the shape.
    pub fn new(driver: &Arc<dyn Driver>, weights: &DeviceWeights, keep: KeptActivations) -> Result<Self> {
        let (shape, dtype) = (ModelShape::new(&weights.config)?, weights.matrices.dtype());
        let layers = weights.config.num_hidden_layers;
        Ok(Self { driver: Arc::clone(driver), shape, dtype, layers, keep, room: None })
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
    /// [`crate::Error::Device`] when the device fails or has no room, and those of `hook`.
    pub fn run(&mut self, weights: &DeviceWeights, batch: &PackedBatch, hook: QkvHook<'_>) -> Result<()> {
        self.reserve(batch.rows)?;
        let room = self.room();
        let embedding = (weights.embedding(), self.dtype);
        kernels::embed(&*self.driver, batch, embedding, &room.layers[0].x_in, &self.shape)?;
        let first = NormInput::Rows(&room.layers[0].x_in);
        self.norm(first, weights.layer(0).input_norm, batch.rows)?;
        for layer in 0..self.layers {
            self.self_attention(weights, batch, layer)?;
            hook(layer, &room.layers[layer].qkv)?;
            let kept = &room.layers[layer];
            self.norm(NormInput::Sum(&kept.x_in, &room.wide, &kept.x_mid), weights.layer(layer).post_norm, batch.rows)?;
            self.gate_up(weights, batch.rows, layer)?;
            self.down(weights, batch.rows, layer)?;
            let (next, norm) = match room.layers.get(layer + 1) {
                Some(next) => (&next.x_in, weights.layer(layer + 1).input_norm),
                None => (&room.x_out, weights.final_norm()), // of all rows, which nobody reads: not worth a kernel of its own
            };
            self.norm(NormInput::Sum(&kept.x_mid, &room.wide, next), norm, batch.rows)?;
        }
        Ok(())
    }

    /// `hidden (rows, D)` = the final norm of these rows of the last batch, as the LM head reads it.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub fn hidden(&self, weights: &DeviceWeights, rows: &Buffer<u32>, hidden: &DynBuffer) -> Result<()> {
        let picked = NormInput::Picked(&self.room().x_out, rows);
        kernels::norm_rows(&*self.driver, picked, weights.final_norm(), (hidden, rows.len()), &self.shape)
    }

    /// Queries, keys and values from `normed`, then the heads' outputs, and into `wide` what they add to the stream.
    pub(super) fn self_attention(&self, weights: &DeviceWeights, batch: &PackedBatch, layer: usize) -> Result<()> {
        let (driver, shape, room, w) = (&*self.driver, &self.shape, self.room(), weights.layer(layer));
        let (kept, d, qkv) = (&room.layers[layer], shape.width, shape.qkv());
        let raw = wide(room, qkv);
        kernels::linear(driver, room.normed.matrix(0, d), self.weight(w.qkv, d), raw, [batch.rows, qkv, d])?;
        let rope = RopeTable { table: weights.rope.at(0), positions: weights.positions };
        kernels::bias_rope(driver, batch, (&room.wide, w.qkv_bias, rope), &kept.qkv, shape)?;
        kernels::attend(driver, batch, &kept.qkv, (&kept.attended, &kept.log_sum), shape)?;
        let attended = kept.attended.matrix(0, d);
        kernels::linear(driver, attended, self.weight(w.o, d), wide(room, d), [batch.rows, d, d])
    }

    /// From `normed`.
    pub(super) fn gate_up(&self, weights: &DeviceWeights, rows: usize, layer: usize) -> Result<()> {
        let (room, LayerAddresses { gate_up, .. }) = (self.room(), weights.layer(layer));
        let (d, f) = (self.shape.width, self.shape.mlp);
        let out = room.layers[layer].gate_up.matrix(0, 2 * f);
        kernels::linear(&*self.driver, room.normed.matrix(0, d), self.weight(gate_up, d), out, [rows, 2 * f, d])
    }

    /// Into `wide`.
    fn down(&self, weights: &DeviceWeights, rows: usize, layer: usize) -> Result<()> {
        let (room, d, f) = (self.room(), self.shape.width, self.shape.mlp);
        kernels::swiglu(&*self.driver, rows, &room.layers[layer].gate_up, &room.act, &self.shape)?;
        let down = self.weight(weights.layer(layer).down, f);
        kernels::linear(&*self.driver, room.act.matrix(0, f), down, wide(room, d), [rows, d, f])
    }

    pub(super) fn norm(&self, from: NormInput<'_>, weight: Address, rows: usize) -> Result<()> {
        kernels::norm_rows(&*self.driver, from, weight, (&self.room().normed, rows), &self.shape)
    }

    pub(super) fn weight(&self, at: Address, stride: usize) -> Matrix {
        Matrix { at, stride, dtype: self.dtype }
    }

    pub(super) fn keep(&self) -> KeptActivations {
        self.keep
    }

    pub(super) fn room(&self) -> &ForwardBuffers {
        self.room.as_ref().expect("a batch has run")
    }

    fn reserve(&mut self, rows: usize) -> Result<()> {
        if self.room.as_ref().is_none_or(|room| room.rows < rows) {
            self.room = None; // first give back, then take: both at once would be the peak
            self.room = Some(ForwardBuffers::new(self, rows)?);
        }
        Ok(())
    }
}

/// The first `width` numbers of each row of `wide`.
pub(super) fn wide(room: &ForwardBuffers, width: usize) -> Matrix {
    Matrix { at: room.wide.at(0), stride: width, dtype: Dtype::F32 }
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
                qkv: numbers(shape.qkv())?,
                attended: numbers(d)?,
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
