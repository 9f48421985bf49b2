//! One transformer block, backward: the explicit chain of `block::forward`, each gradient added once, no graph.
//!
//! Norms and the MLP's activation are computed again from what the forward kept; that costs less than reading them would.

use super::attention::{self, Heads, Layout, attend_packed_backward};
use super::block::{Activations, Scratch};
use super::matmul::{self, Start, input_gradient, weight_gradient};
use super::ops::{bias_gradient, rms_norm_again, rms_norm_backward, swiglu_backward};
use super::rope::Turn;
use super::{LAYER_PARAMETERS, Model};
use crate::numbers::aligned::Floats;

/// The rows a backward runs over.
pub struct Rows<'a> {
    /// Gradient of the residual stream, `(T, D)`: after the block on entry, before it on return.
    pub d: &'a mut [f32],
    /// Position of each row.
    pub positions: &'a [u32],
    /// The sequences.
    pub layout: Layout<'a>,
}

/// Runs block `layer` backward. `kept` is used up: its buffers become gradients.
pub fn block(
    model: &Model,
    layer: usize,
    mut rows: Rows<'_>,
    kept: &mut Activations,
    scratch: &mut Scratch,
    gradients: &mut [Floats],
) {
    let first = 1 + LAYER_PARAMETERS * layer;
    let gradients: &mut [Floats; LAYER_PARAMETERS] =
        (&mut gradients[first..first + LAYER_PARAMETERS]).try_into().expect("a slice of that length");
    scratch.d_normed.reuse(rows.d.len());
    scratch.d_qkv.reuse(kept.qkv.len());
    mlp(model, layer, &mut rows, kept, scratch, gradients);
    self_attention(model, layer, &mut rows, kept, scratch, gradients);
}

fn mlp(
    model: &Model,
    layer: usize,
    rows: &mut Rows<'_>,
    kept: &mut Activations,
    scratch: &mut Scratch,
    gradients: &mut [Floats; LAYER_PARAMETERS],
) {
    let (config, w) = (model.config(), model.layer(layer));
    let (t, d, f) = (rows.positions.len(), config.hidden_size, config.intermediate_size);
    let [.., post_norm, d_gate, d_up, d_down] = gradients;

    input_gradient(matmul::Rows::new(rows.d, d, 0), w.down.plain, (t, d, f), Start::Zero, &mut scratch.act);
    swiglu_backward(&mut kept.gate, &mut kept.up, &mut scratch.act);
    weight_gradient(matmul::Rows::new(rows.d, d, 0), &scratch.act, (t, d, f), d_down);

    rms_norm_again(&kept.x_mid, &kept.scale_mid, w.post_norm, &mut scratch.normed);
    let d_normed = &mut scratch.d_normed;
    let parts = [(&kept.gate, w.gate, d_gate, Start::Zero), (&kept.up, w.up, d_up, Start::Add)];
    for (dy, weight, d_weight, start) in parts {
        let dy = matmul::Rows::new(dy, f, 0);
        weight_gradient(dy, &scratch.normed, (t, f, d), d_weight);
        input_gradient(dy, weight.plain, (t, f, d), start, d_normed);
    }
    rms_norm_backward(d_normed, &kept.x_mid, &kept.scale_mid, w.post_norm, rows.d, post_norm);
}

fn self_attention(
    model: &Model,
    layer: usize,
    rows: &mut Rows<'_>,
    kept: &mut Activations,
    scratch: &mut Scratch,
    gradients: &mut [Floats; LAYER_PARAMETERS],
) {
    let (config, heads, w) = (model.config(), Heads::of(model.config()), model.layer(layer));
    let (t, d, kv) = (rows.positions.len(), config.hidden_size, config.kv_dim());
    let [input_norm, d_q, d_q_bias, d_k, d_k_bias, d_v, d_v_bias, d_o, ..] = gradients;

    let d_attended = &mut scratch.d_normed;
    let dy = matmul::Rows::new(rows.d, d, 0);
    input_gradient(dy, w.o.plain, (t, d, d), Start::Zero, d_attended);
    weight_gradient(dy, &kept.attended, (t, d, d), d_o);

    let d_qkv = &mut scratch.d_qkv;
    let forward = attention::Kept { qkv: &kept.qkv, out: &kept.attended, log_sum: &kept.log_sum };
    attend_packed_backward(heads, forward, rows.layout, d_attended, d_qkv);
    model.rope().apply(d_qkv, heads.row(), heads.queries + heads.kv, rows.positions, Turn::Backward);

    rms_norm_again(&kept.x_in, &kept.scale_in, w.input_norm, &mut scratch.normed);
    let d_normed = d_attended; // the same shape, no longer needed
    let parts = [
        (w.q, d_q, d_q_bias, (0, d), Start::Zero),
        (w.k, d_k, d_k_bias, (d, kv), Start::Add),
        (w.v, d_v, d_v_bias, (d + kv, kv), Start::Add),
    ];
    for (weight, d_weight, d_bias, (column, width), start) in parts {
        let dy = matmul::Rows::new(d_qkv, heads.row(), column);
        bias_gradient(d_qkv, heads.row(), column, d_bias);
        weight_gradient(dy, &scratch.normed, (t, width, d), d_weight);
        input_gradient(dy, weight.plain, (t, width, d), start, d_normed);
    }
    rms_norm_backward(d_normed, &kept.x_in, &kept.scale_in, w.input_norm, rows.d, input_norm);
}
