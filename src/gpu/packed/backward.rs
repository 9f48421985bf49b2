//! The backward pass of packed sequences through all blocks. Gradients are added in place, each one once.
//!
//! It shares the buffers of the forward pass, `normed`, `act`, `wide` and `gate_up`, and reuses them for gradients: comments name what a
//! buffer holds from that line on.

use std::sync::Arc;

use super::batch::PackedBatch;
use super::forward::{ForwardPass, KeptActivations, wide};
use super::gradients::DeviceGradients;
use crate::error::Result;
use crate::gpu::driver::{Address, Driver};
use crate::gpu::kernels::{
    self, AttentionGradients, BLOCKS, ColumnSum, NormBackward, NormGradient, NormInput, RopeTable, RowSegments,
    SavedAttention, input_gradient,
};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer};
use crate::model::{Packed, Parameter};

/// Buffers of a backward pass.
pub struct BackwardPass {
    rows: usize,
    entries: usize,
    /// Gradient of the residual stream, `(T, D)`.
    pub(super) dx: Buffer<f32>,
    /// The same, rounded for products.
    pub(super) d: DynBuffer,
    /// Gradient of the heads' outputs, `(T, H E)`.
    d_attended: DynBuffer,
    /// Gradient of queries, keys and values before rope, then before the norms of heads, `(T, (H + 2 K) E)`.
    d_qkv: DynBuffer,
    /// See [`AttentionGradients::along`].
    along: Buffer<f32>,
    /// See [`AttentionGradients::partial`].
    keys: Buffer<f32>,
    /// Partial sums over rows.
    pub(super) partial: Buffer<f32>,
    /// Of an adapter of rank r, `(T, r)`.
    narrow: DynBuffer,
    rank: usize,
}

impl BackwardPass {
    /// Allocates buffers for the rows and entries of `batch`, and an adapter of this rank; 0 without one.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory.
    pub fn new(forward: &ForwardPass, batch: &PackedBatch, rank: usize) -> Result<Self> {
        let (driver, shape, dtype) = (&forward.driver, &forward.shape, forward.dtype);
        let (rows, entries) = (batch.rows, batch.entries);
        Ok(Self {
            rows,
            entries,
            dx: Buffer::new(driver, rows * shape.width)?,
            d: DynBuffer::new(driver, dtype, rows * shape.width)?,
            d_attended: DynBuffer::new(driver, dtype, rows * shape.attention_width())?,
            d_qkv: DynBuffer::new(driver, dtype, rows * shape.qkv())?,
            along: Buffer::new(driver, rows * shape.heads)?,
            keys: Buffer::new(driver, entries * 2 * shape.kv_heads * shape.dim)?,
            partial: Buffer::new(driver, BLOCKS * shape.width.max(shape.qkv()).max(2 * shape.dim))?,
            narrow: DynBuffer::new(driver, dtype, rows * rank)?,
            rank,
        })
    }

    /// Whether `batch` and an adapter of this rank fit into the buffers.
    #[must_use]
    pub fn holds(&self, batch: &PackedBatch, rank: usize) -> bool {
        self.rows >= batch.rows && self.entries >= batch.entries && self.rank >= rank
    }

    /// From the gradient of the residual stream after the last block, in `dx` and `d`, to the gradients of all that is trained.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub(super) fn run(&self, forward: &ForwardPass, pass: &Pass<'_>, packed: &Packed) -> Result<()> {
        for layer in (0..pass.weights.config.num_hidden_layers).rev() {
            self.mlp(forward, pass, layer)?;
            self.self_attention(forward, pass, layer)?;
        }
        let Some(embedding) = pass.gradients.embedding() else { return Ok(()) };
        let segments = by_token(&forward.driver, packed, pass.weights.config.pad_token_id)?;
        if segments.to.is_empty() {
            return Ok(());
        }
        kernels::add_rows(&*forward.driver, &self.dx, &segments, embedding, &forward.shape)
    }

    /// From the gradient with respect to the MLP's output, in `d`, to that with respect to its input, added to `dx`.
    fn mlp(&self, forward: &ForwardPass, pass: &Pass<'_>, layer: usize) -> Result<()> {
        let Pass { weights, batch, gradients } = pass;
        let (driver, shape, buffers, rows) = (&*forward.driver, &forward.shape, forward.buffers(), batch.rows);
        let (w, to, kept) = (weights.layer(layer), gradients.vectors(layer), &buffers.layers[layer]);
        let (d, f) = (shape.width, shape.mlp);
        let (dy, gate_up) = (self.d.matrix(0, d), kept.gate_up.matrix(0, 2 * f));
        let (act, normed) = (buffers.act.matrix(0, f), buffers.normed.matrix(0, d));

        // `normed`: the MLP's input; `gate_up`: its gate and up.
        recompute(forward, pass, layer)?;
        // `act`: the gradient of the activation.
        input_gradient(driver, dy, forward.weight(w.down, f), act, [rows, d, f])?;
        // `act`: the activation; `gate_up`: the gradient of gate and up.
        kernels::swiglu_backward(driver, rows, &kept.gate_up, &buffers.act, shape)?;
        let narrow = &self.narrow;
        gradients.add(driver, (layer, Parameter::DownProj), [dy, act], narrow, [rows, d, f])?;
        gradients.add(driver, (layer, Parameter::GateProj), [gate_up, normed], narrow, [rows, 2 * f, d])?;
        // `wide`: the gradient of `normed`.
        input_gradient(driver, gate_up, forward.weight(w.gate_up, d), wide(buffers, d), [rows, 2 * f, d])?;
        self.norm(forward, (&kept.x_mid, rows), w.post_norm, to.post_norm)
    }

    /// From the gradient with respect to the attention's output, in `d`, to that with respect to its input, added to `dx`.
    fn self_attention(&self, forward: &ForwardPass, pass: &Pass<'_>, layer: usize) -> Result<()> {
        let Pass { weights, batch, gradients } = pass;
        let (driver, shape, buffers, rows) = (&*forward.driver, &forward.shape, forward.buffers(), batch.rows);
        let (w, to, kept) = (weights.layer(layer), gradients.vectors(layer), &buffers.layers[layer]);
        let (d, width, qkv) = (shape.width, shape.attention_width(), shape.qkv());

        let dy = self.d.matrix(0, d);
        let (attended, d_attended) = (kept.attended.matrix(0, width), self.d_attended.matrix(0, width));
        input_gradient(driver, dy, forward.weight(w.o, width), d_attended, [rows, d, width])?;
        gradients.add(driver, (layer, Parameter::OProj), [dy, attended], &self.narrow, [rows, d, width])?;
        let rope = RopeTable { table: weights.rope.at(0), positions: weights.positions };
        let (log_sum, d_out) = (&*kept.log_sum, &self.d_attended);
        let saved = SavedAttention { qkv: &kept.qkv, out: &kept.attended, log_sum, d_out };
        let attention = AttentionGradients { d_qkv: &self.d_qkv, along: &self.along, partial: &self.keys };
        kernels::attend_backward(driver, batch, saved, attention, (shape, rope))?;
        if let (Some(qk), Some(weight), Some(to)) = (&kept.qk, w.head_norms, to.head_norms) {
            let d_weight = ColumnSum { partial: &self.partial, to };
            kernels::norm_heads_backward(driver, rows, (qk, weight), &self.d_qkv, d_weight, shape)?;
        }
        if let Some(to) = to.qkv_bias {
            kernels::column_sums(driver, &self.d_qkv, [rows, qkv], ColumnSum { partial: &self.partial, to })?;
        }
        // `normed`: the input of the product with the weight of queries, keys and values.
        forward.norm(NormInput::Rows(&kept.x_in), w.input_norm, rows)?;
        let dy = self.d_qkv.matrix(0, qkv);
        let normed = buffers.normed.matrix(0, d);
        gradients.add(driver, (layer, Parameter::QProj), [dy, normed], &self.narrow, [rows, qkv, d])?;
        // `wide`: the gradient of `normed`.
        input_gradient(driver, dy, forward.weight(w.qkv, d), wide(buffers, d), [rows, qkv, d])?;
        self.norm(forward, (&kept.x_in, rows), w.input_norm, to.input_norm)
    }

    /// Runs a norm backward from the gradient in `wide`, and adds the result to `dx`, and to `d` rounded.
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
        kernels::norm_backward(&*forward.driver, &norm, (&forward.buffers().wide, rows), into, of)
    }
}

/// Computes the MLP's input in `normed` again and, as far as the forward pass did not keep them, the attention, `x_mid` and `gate_up`.
fn recompute(forward: &ForwardPass, pass: &Pass<'_>, layer: usize) -> Result<()> {
    let Pass { weights, batch, .. } = pass;
    let (w, rows) = (weights.layer(layer), batch.rows);
    let kept = &forward.buffers().layers[layer];
    if forward.keep() == KeptActivations::Inputs {
        // `normed`: the attention's input; then `wide`: its output; then `normed`: the MLP's input.
        forward.norm(NormInput::Rows(&kept.x_in), w.input_norm, rows)?;
        forward.self_attention(weights, batch, layer)?;
        forward.norm(NormInput::Sum(&kept.x_in, &forward.buffers().wide, &kept.x_mid), w.post_norm, rows)?;
    } else {
        forward.norm(NormInput::Rows(&kept.x_mid), w.post_norm, rows)?;
    }
    if forward.keep() == KeptActivations::All {
        return Ok(());
    }
    forward.gate_up(weights, rows, layer)
}

/// What a backward pass runs over.
pub(super) struct Pass<'a> {
    pub weights: &'a DeviceWeights,
    pub batch: &'a PackedBatch,
    pub gradients: &'a DeviceGradients,
}

/// Groups rows by their keys, in order; with `all`, one segment for each key below it.
pub(super) fn segments(driver: &Arc<dyn Driver>, keys: &[u32], all: Option<usize>) -> Result<RowSegments> {
    group(driver, keys, all, (0..keys.len() as u32).collect())
}

fn group(driver: &Arc<dyn Driver>, keys: &[u32], all: Option<usize>, mut order: Vec<u32>) -> Result<RowSegments> {
    order.sort_by_key(|row| keys[*row as usize]); // stable, because rows are summed in their order
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
