//! Runs one layer forward. Prefill, decode and training share this code, and differ in how rows attend.

use super::attention::Heads;
use super::head_norms::{BeforeNorms, head_norms};
use super::matmul::{MatrixRowsMut, Operands, StartFrom, linear};
use super::ops::{rms_norm, swiglu};
use super::rope::Turn;
use super::{Config, Model};
use crate::numbers::aligned::AlignedVec;

/// What a layer computes for `T` rows and its backward needs.
#[derive(Default)]
pub struct Activations {
    /// Residual stream at the start of the layer, `(T, D)`.
    pub x_in: AlignedVec<f32>,
    /// 1 / rms of `x_in`, `(T)`.
    pub scale_in: AlignedVec<f32>,
    /// Queries and keys before the norms of their heads, `(T, (H + K) E)`; empty without such norms.
    pub qk: AlignedVec<f32>,
    /// 1 / rms of each of their heads, `(T, H + K)`; empty without such norms.
    pub scale_qk: AlignedVec<f32>,
    /// Queries, keys and values after rope, `(T, (H + 2 K) E)`.
    pub qkv: AlignedVec<f32>,
    /// Heads' outputs, `(T, H E)`.
    pub attended: AlignedVec<f32>,
    /// Log-sum-exp of the scores, `(T, H)`.
    pub log_sum: AlignedVec<f32>,
    /// Residual stream after attention, `(T, D)`.
    pub x_mid: AlignedVec<f32>,
    /// 1 / rms of `x_mid`, `(T)`.
    pub scale_mid: AlignedVec<f32>,
    /// `(T, F)`.
    pub gate: AlignedVec<f32>,
    /// `(T, F)`.
    pub up: AlignedVec<f32>,
}

/// Intermediate results for `T` rows that nothing needs later.
#[derive(Default)]
pub struct Scratch {
    /// `(T, D)`.
    pub normed: AlignedVec<f32>,
    /// `(T, F)`.
    pub act: AlignedVec<f32>,
    /// Gradient of a norm's output, `(T, D)`, or of the heads' outputs, `(T, H E)`. Only a backward allocates it and the next one.
    pub d_normed: AlignedVec<f32>,
    /// Gradient of queries, keys and values side by side, `(T, (H + 2 K) E)`.
    pub d_qkv: AlignedVec<f32>,
    /// Operands in bf16.
    pub operands: Operands,
}

impl Activations {
    /// Room for `rows` rows.
    pub fn new(config: &Config, rows: usize) -> Self {
        let mut empty = Self::default();
        empty.reuse(config, rows);
        empty
    }

    /// Resizes to `rows` rows and keeps the memory; everything is written before it is read.
    pub fn reuse(&mut self, config: &Config, rows: usize) {
        let heads = Heads::of(config);
        let normed_heads = if config.qk_norm { heads.queries + heads.kv } else { 0 };
        for (matrix, width) in [
            (&mut self.x_in, config.hidden_size),
            (&mut self.scale_in, 1),
            (&mut self.qk, normed_heads * heads.dim),
            (&mut self.scale_qk, normed_heads),
            (&mut self.qkv, heads.row()),
            (&mut self.attended, config.attention_width()),
            (&mut self.log_sum, heads.queries),
            (&mut self.x_mid, config.hidden_size),
            (&mut self.scale_mid, 1),
            (&mut self.gate, config.intermediate_size),
            (&mut self.up, config.intermediate_size),
        ] {
            matrix.reuse(rows * width);
        }
    }
}

impl Scratch {
    /// Room for `rows` rows.
    pub fn new(config: &Config, rows: usize) -> Self {
        let mut empty = Self::default();
        empty.reuse(config, rows);
        empty
    }

    /// Resizes to `rows` rows and keeps the memory.
    pub fn reuse(&mut self, config: &Config, rows: usize) {
        self.normed.reuse(rows * config.hidden_size);
        self.act.reuse(rows * config.intermediate_size);
    }
}

/// Computes the attention of a layer's rows: `(layer, qkv, attended, log_sum)`, of which it writes the last two.
pub type Attend<'a> = &'a mut dyn FnMut(usize, &[f32], &mut [f32], &mut [f32]);

/// The residual stream that a block reads and adds to.
pub struct ResidualStream<'a> {
    /// `(T, D)`.
    pub x: &'a mut [f32],
    /// Position of each row, `(T)`.
    pub positions: &'a [u32],
}

/// Runs block `layer` on the residual stream, in place.
pub fn forward(
    model: &Model,
    layer: usize,
    ResidualStream { x, positions }: ResidualStream<'_>,
    kept: &mut Activations,
    scratch: &mut Scratch,
    attend: Attend<'_>,
) {
    let (config, heads, w) = (model.config(), Heads::of(model.config()), model.layer(layer));
    let (rows, d, f, epsilon) = (positions.len(), config.hidden_size, config.intermediate_size, config.rms_norm_eps);
    let (q_width, kv_width) = (config.attention_width(), config.kv_width());

    let Scratch { normed, act, operands, .. } = scratch;
    kept.x_in.copy_from_slice(x);
    rms_norm(x, w.input_norm, epsilon, normed, &mut kept.scale_in);
    let input = w.q.input(normed, (rows, d), operands);
    let parts = [
        (w.q, w.q_bias, 0, q_width),
        (w.k, w.k_bias, q_width, kv_width),
        (w.v, w.v_bias, q_width + kv_width, kv_width),
    ];
    for (weight, bias, column, width) in parts {
        let out = MatrixRowsMut::new(&mut kept.qkv, heads.row(), column);
        linear(input, weight, (rows, width, d), bias.map_or(StartFrom::Zero, StartFrom::Bias), out);
    }
    if let Some(norms) = w.head_norms {
        let before = BeforeNorms { qk: &mut *kept.qk, scale: &mut *kept.scale_qk };
        head_norms(heads, norms, epsilon, &mut kept.qkv, before);
    }
    model.rope().apply(&mut kept.qkv, heads.row(), heads.queries + heads.kv, positions, Turn::Forward);
    attend(layer, &kept.qkv, &mut kept.attended, &mut kept.log_sum);
    let input = w.o.input(&kept.attended, (rows, q_width), operands);
    linear(input, w.o, (rows, d, q_width), StartFrom::Add, MatrixRowsMut::new(x, d, 0));

    kept.x_mid.copy_from_slice(x);
    rms_norm(x, w.post_norm, epsilon, normed, &mut kept.scale_mid);
    let input = w.gate.input(normed, (rows, d), operands);
    linear(input, w.gate, (rows, f, d), StartFrom::Zero, MatrixRowsMut::new(&mut kept.gate, f, 0));
    linear(input, w.up, (rows, f, d), StartFrom::Zero, MatrixRowsMut::new(&mut kept.up, f, 0));
    swiglu(&kept.gate, &kept.up, act);
    let input = w.down.input(act, (rows, f), operands);
    linear(input, w.down, (rows, d, f), StartFrom::Add, MatrixRowsMut::new(x, d, 0));
}
