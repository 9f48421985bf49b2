//! Runs one layer backward: the derivatives of `block::forward` step by step, without a graph.
//!
//! Norms and the MLP's activation are computed again from what the forward kept, which costs less than reading them from memory.

use super::adapter::MatrixGradient;
use super::attention::{self, Heads, PackedLayout, attend_packed_backward};
use super::block::{Activations, Scratch};
use super::head_norms::{BeforeNorms, head_norms_backward};
use super::matmul::{MatrixRows, StartFrom, input_gradient};
use super::ops::{bias_gradient, rms_norm_again, rms_norm_backward, swiglu_backward};
use super::rope::Turn;
use super::{Model, Parameter};
use crate::numbers::aligned::AlignedVec;

/// The rows a backward runs over.
pub struct PackedRows<'a> {
    /// Gradient of the residual stream, `(T, D)`: after the block on entry, before it on return.
    pub d: &'a mut [f32],
    /// Position of each row.
    pub positions: &'a [u32],
    /// The sequences.
    pub layout: PackedLayout<'a>,
}

/// Gradients of one layer's parameters, found by name.
struct LayerGradients<'a> {
    model: &'a Model,
    all: &'a mut [AlignedVec<f32>],
    layer: usize,
}

impl LayerGradients<'_> {
    /// That of a matrix.
    fn matrix(&mut self, parameter: Parameter) -> MatrixGradient<'_> {
        self.model.matrix_gradient((self.layer, parameter), self.all)
    }

    /// That of a vector; empty if the layer lacks it, or it is not trained.
    fn vector(&mut self, parameter: Parameter) -> &mut [f32] {
        match self.place(parameter) {
            Some(place) => &mut self.all[place],
            None => &mut [],
        }
    }

    /// Those of the norms of query and key heads.
    fn head_norms(&mut self) -> [&mut [f32]; 2] {
        let Some(places) = self.place(Parameter::QNorm).zip(self.place(Parameter::KNorm)) else {
            return [&mut [], &mut []];
        };
        self.all.get_disjoint_mut([places.0, places.1]).expect("they are two").map(|gradient| &mut **gradient)
    }

    fn place(&self, parameter: Parameter) -> Option<usize> {
        self.model.trainable.of_layer(self.layer, parameter)
    }
}

/// Runs layer `layer` backward and overwrites `kept`, whose buffers become gradients.
pub fn block(
    model: &Model,
    layer: usize,
    mut rows: PackedRows<'_>,
    kept: &mut Activations,
    scratch: &mut Scratch,
    gradients: &mut [AlignedVec<f32>],
) {
    let (config, t) = (model.config(), rows.positions.len());
    let mut gradients = LayerGradients { model, all: gradients, layer };
    scratch.d_normed.reuse(t * config.hidden_size.max(config.attention_width()));
    scratch.d_qkv.reuse(kept.qkv.len());
    mlp(model, &mut rows, kept, scratch, &mut gradients);
    self_attention(model, &mut rows, kept, scratch, &mut gradients);
}

fn mlp(
    model: &Model,
    rows: &mut PackedRows<'_>,
    kept: &mut Activations,
    scratch: &mut Scratch,
    gradients: &mut LayerGradients<'_>,
) {
    let (config, w) = (model.config(), model.layer(gradients.layer));
    let (t, d, f) = (rows.positions.len(), config.hidden_size, config.intermediate_size);

    let Scratch { normed, act, d_normed, operands, .. } = scratch;
    let dy = MatrixRows::new(rows.d, d, 0);
    input_gradient(dy, w.down, (t, d, f), StartFrom::Zero, act, operands);
    swiglu_backward(&mut kept.gate, &mut kept.up, act);
    gradients.matrix(Parameter::DownProj).add(dy, act, w.down, (t, d, f), operands);

    rms_norm_again(&kept.x_mid, &kept.scale_mid, w.post_norm, normed);
    let d_normed = &mut d_normed[..t * d];
    let parts = [
        (&kept.gate, w.gate, Parameter::GateProj, StartFrom::Zero),
        (&kept.up, w.up, Parameter::UpProj, StartFrom::Add),
    ];
    for (dy, weight, parameter, start) in parts {
        let dy = MatrixRows::new(dy, f, 0);
        gradients.matrix(parameter).add(dy, normed, weight, (t, f, d), operands);
        input_gradient(dy, weight, (t, f, d), start, d_normed, operands);
    }
    let d_norm = gradients.vector(Parameter::PostNorm);
    rms_norm_backward(d_normed, &kept.x_mid, &kept.scale_mid, w.post_norm, rows.d, d_norm);
}

fn self_attention(
    model: &Model,
    rows: &mut PackedRows<'_>,
    kept: &mut Activations,
    scratch: &mut Scratch,
    gradients: &mut LayerGradients<'_>,
) {
    let (config, heads, w) = (model.config(), Heads::of(model.config()), model.layer(gradients.layer));
    let (t, d, q_width, kv_width) =
        (rows.positions.len(), config.hidden_size, config.attention_width(), config.kv_width());

    let Scratch { normed, d_normed, d_qkv, operands, .. } = scratch;
    let d_attended = &mut d_normed[..t * q_width];
    let dy = MatrixRows::new(rows.d, d, 0);
    input_gradient(dy, w.o, (t, d, q_width), StartFrom::Zero, d_attended, operands);
    gradients.matrix(Parameter::OProj).add(dy, &kept.attended, w.o, (t, d, q_width), operands);

    let forward = attention::SavedForward { qkv: &kept.qkv, out: &kept.attended, log_sum: &kept.log_sum };
    attend_packed_backward(heads, forward, rows.layout, d_attended, d_qkv);
    model.rope().apply(d_qkv, heads.row(), heads.queries + heads.kv, rows.positions, Turn::Backward);
    if let Some(norms) = w.head_norms {
        let before = BeforeNorms { qk: &*kept.qk, scale: &*kept.scale_qk };
        head_norms_backward(heads, norms, before, d_qkv, gradients.head_norms());
    }

    rms_norm_again(&kept.x_in, &kept.scale_in, w.input_norm, normed);
    let d_normed = &mut d_normed[..t * d]; // in the memory of `d_attended`, which is used up
    let parts = [
        (w.q, Parameter::QProj, Parameter::QBias, (0, q_width), StartFrom::Zero),
        (w.k, Parameter::KProj, Parameter::KBias, (q_width, kv_width), StartFrom::Add),
        (w.v, Parameter::VProj, Parameter::VBias, (q_width + kv_width, kv_width), StartFrom::Add),
    ];
    for (weight, parameter, bias, (column, width), start) in parts {
        let dy = MatrixRows::new(d_qkv, heads.row(), column);
        bias_gradient(d_qkv, heads.row(), column, gradients.vector(bias));
        gradients.matrix(parameter).add(dy, normed, weight, (t, width, d), operands);
        input_gradient(dy, weight, (t, width, d), start, d_normed, operands);
    }
    let d_norm = gradients.vector(Parameter::InputNorm);
    rms_norm_backward(d_normed, &kept.x_in, &kept.scale_in, w.input_norm, rows.d, d_norm);
}
