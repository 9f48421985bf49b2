//! Backward of packed sequences through all blocks: the explicit chain, each gradient added once, in place.

use std::sync::Arc;

use super::batch::PackedBatch;
use super::forward::{ForwardPass, KeptActivations, wide};
use super::gradients::DeviceGradients;
use crate::error::Result;
use crate::gpu::driver::{Address, Driver};
use crate::gpu::kernels::{
    self, AttentionGradients, BLOCKS, ColumnSum, NormBackward, NormGradient, NormInput, RopeTable, RowSegments,
    SavedAttention, input_gradient, weight_gradient,
};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer};
use crate::model::Packed;

/// Memory of a backward.
pub struct BackwardPass {
    rows: usize,
    entries: usize,
    /// Gradient of the residual stream, `(T, D)`, and the same as the products read it.
    pub(super) dx: Buffer<f32>,
    pub(super) d: DynBuffer,
    d_attended: DynBuffer,
    d_qkv: DynBuffer,
    along: Buffer<f32>,
    /// Parts of the gradients of keys and values, `(entries, 2 K E)`.
    keys: Buffer<f32>,
    /// Parts of sums over rows.
    pub(super) partial: Buffer<f32>,
}

impl BackwardPass {
    /// Room for the rows and entries of `batch`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is none.
    pub fn new(forward: &ForwardPass, batch: &PackedBatch) -> Result<Self> {
        let (driver, shape, dtype) = (&forward.driver, &forward.shape, forward.dtype);
        let (rows, entries) = (batch.rows, batch.entries);
        Ok(Self {
            rows,
            entries,
            dx: Buffer::new(driver, rows * shape.width)?,
            d: DynBuffer::new(driver, dtype, rows * shape.width)?,
            d_attended: DynBuffer::new(driver, dtype, rows * shape.width)?,
            d_qkv: DynBuffer::new(driver, dtype, rows * shape.qkv())?,
            along: Buffer::new(driver, rows * shape.heads)?,
            keys: Buffer::new(driver, entries * 2 * shape.kv_heads * shape.dim)?,
            partial: Buffer::new(driver, BLOCKS * shape.width.max(shape.qkv()))?,
        })
    }

    /// Whether `batch` fits.
    #[must_use]
    pub fn holds(&self, batch: &PackedBatch) -> bool {
        self.rows >= batch.rows && self.entries >= batch.entries
    }

    /// From the gradient of the residual stream after the last block, in `dx` and `d`, to the parameters' gradients.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub(super) fn run(&self, forward: &ForwardPass, pass: &Pass<'_>, packed: &Packed) -> Result<()> {
        for layer in (0..pass.weights.config.num_hidden_layers).rev() {
            self.mlp(forward, pass, layer)?;
            self.self_attention(forward, pass, layer)?;
        }
        let segments = by_token(&forward.driver, packed, pass.weights.config.pad_token_id)?;
        if segments.to.is_empty() {
            return Ok(());
        }
        kernels::add_rows(&*forward.driver, &self.dx, &segments, pass.gradients.embedding(), &forward.shape)
    }

    fn mlp(&self, forward: &ForwardPass, pass: &Pass<'_>, layer: usize) -> Result<()> {
        let Pass { weights, batch, gradients } = pass;
        let (driver, shape, room, rows) = (&*forward.driver, &forward.shape, forward.room(), batch.rows);
        let (w, to, kept) = (weights.layer(layer), gradients.layer(layer), &room.layers[layer]);
        let (d, f) = (shape.width, shape.mlp);
        let (gate_up, act, normed) = (kept.gate_up.matrix(0, 2 * f), room.act.matrix(0, f), room.normed.matrix(0, d));

        if forward.keep() == KeptActivations::Inputs {
            forward.norm(NormInput::Rows(&kept.x_in), w.input_norm, rows)?;
            forward.self_attention(weights, batch, layer)?;
            forward.norm(NormInput::Sum(&kept.x_in, &room.wide, &kept.x_mid), w.post_norm, rows)?;
        } else {
            forward.norm(NormInput::Rows(&kept.x_mid), w.post_norm, rows)?;
        }
        if forward.keep() != KeptActivations::All {
            forward.gate_up(weights, rows, layer)?;
        }
        let dy = self.d.matrix(0, d);
        input_gradient(driver, dy, forward.weight(w.down, f), act, [rows, d, f])?;
        kernels::swiglu_backward(driver, rows, &kept.gate_up, &room.act, shape)?;
        weight_gradient(driver, dy, act, to.down, [rows, d, f])?;
        weight_gradient(driver, gate_up, normed, to.gate_up, [rows, 2 * f, d])?;
        input_gradient(driver, gate_up, forward.weight(w.gate_up, d), wide(room, d), [rows, 2 * f, d])?;
        self.norm(forward, (&kept.x_mid, rows), w.post_norm, to.post_norm)
    }

    fn self_attention(&self, forward: &ForwardPass, pass: &Pass<'_>, layer: usize) -> Result<()> {
        let Pass { weights, batch, gradients } = pass;
        let (driver, shape, room, rows) = (&*forward.driver, &forward.shape, forward.room(), batch.rows);
        let (w, to, kept) = (weights.layer(layer), gradients.layer(layer), &room.layers[layer]);
        let (d, qkv) = (shape.width, shape.qkv());

        let dy = self.d.matrix(0, d);
        input_gradient(driver, dy, forward.weight(w.o, d), self.d_attended.matrix(0, d), [rows, d, d])?;
        weight_gradient(driver, dy, kept.attended.matrix(0, d), to.o, [rows, d, d])?;
        let rope = RopeTable { table: weights.rope.at(0), positions: weights.positions };
        let (log_sum, d_out) = (&*kept.log_sum, &self.d_attended);
        let attended = SavedAttention { qkv: &kept.qkv, out: &kept.attended, log_sum, d_out };
        let attending = AttentionGradients { d_qkv: &self.d_qkv, along: &self.along, partial: &self.keys };
        kernels::attend_backward(driver, batch, attended, attending, (shape, rope))?;
        let bias = ColumnSum { partial: &self.partial, to: to.qkv_bias };
        kernels::column_sums(driver, &self.d_qkv, [rows, qkv], bias)?;
        forward.norm(NormInput::Rows(&kept.x_in), w.input_norm, rows)?;
        let dy = self.d_qkv.matrix(0, qkv);
        weight_gradient(driver, dy, room.normed.matrix(0, d), to.qkv, [rows, qkv, d])?;
        input_gradient(driver, dy, forward.weight(w.qkv, d), wide(room, d), [rows, qkv, d])?;
        self.norm(forward, (&kept.x_in, rows), w.input_norm, to.input_norm)
    }

    /// From `wide` through a norm, added to the stream's gradient.
    fn norm(
        &self,
        forward: &ForwardPass,
        (x, rows): (&Buffer<f32>, usize),
        weight: Address,
        to: Address,
    ) -> Result<()> {
        let norm = NormBackward { x, index: None, weight, d_weight: ColumnSum { partial: &self.partial, to } };
        let into = NormGradient::Added(&self.dx, &self.d);
        let of = (&forward.shape, forward.dtype);
        kernels::norm_backward(&*forward.driver, &norm, (&forward.room().wide, rows), into, of)
    }
}

/// What a backward runs over.
pub(super) struct Pass<'a> {
    pub weights: &'a DeviceWeights,
    pub batch: &'a PackedBatch,
    pub gradients: &'a DeviceGradients,
}

/// Rows grouped by what is at each, in order.
pub(super) fn segments(driver: &Arc<dyn Driver>, keys: &[u32], all: Option<usize>) -> Result<RowSegments> {
    group(driver, keys, all, (0..keys.len() as u32).collect())
}

fn group(driver: &Arc<dyn Driver>, keys: &[u32], all: Option<usize>, mut order: Vec<u32>) -> Result<RowSegments> {
    order.sort_by_key(|row| keys[*row as usize]); // stable: the order of rows is the order of the sums
    let (mut from, mut to) = (Vec::new(), Vec::new());
    match all {
        Some(count) => {
            from =
                (0..=count as u32).map(|key| order.partition_point(|row| keys[*row as usize] < key) as u32).collect();
        }
        None => {
            for (i, row) in order.iter().enumerate() {
                if to.last() != Some(&keys[*row as usize]) {
                    from.push(i as u32);
                    to.push(keys[*row as usize]);
                }
            }
            from.push(order.len() as u32);
        }
    }
    let upload = |numbers: &[u32]| Buffer::from_slice(driver, numbers);
    Ok(RowSegments { order: upload(&order)?, from: upload(&from)?, to: upload(&to)? })
}

fn by_token(driver: &Arc<dyn Driver>, packed: &Packed, padding: Option<u32>) -> Result<RowSegments> {
    let learns = |row: &u32| Some(packed.tokens[*row as usize]) != padding;
    group(driver, &packed.tokens, None, (0..packed.tokens.len() as u32).filter(learns).collect())
}
