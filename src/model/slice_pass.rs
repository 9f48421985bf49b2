//! Runs one slice of a batch through the model, forward and backward, in memory that is kept from slice to slice.

use super::attention::{Heads, attend_packed};
use super::backward::{self, PackedRows};
use super::batch::{BatchSlice, Slope, Target, TokenStats};
use super::block::{self, Activations, ResidualStream, Scratch};
use super::head::{HeadGradients, HeadPass, HeadScratch};
use super::ops::{rms_norm, rms_norm_backward};
use super::{Model, Parameter};
use crate::numbers::aligned::AlignedVec;

/// A loss, by its derivative, and the gradients it is added to.
pub struct LossGradient<'a> {
    /// By the index of a target in the batch, not in the slice.
    pub slope: Slope<'a>,
    /// A buffer per parameter, in the order of [`Model::trained`].
    pub gradients: &'a mut [AlignedVec<f32>],
}

/// Memory to work in.
#[derive(Default)]
pub struct Workspace {
    /// Residual stream, `(T, D)`; then its gradient.
    x: AlignedVec<f32>,
    kept: Vec<Activations>,
    scratch: Scratch,
    rows: TargetRows,
    head: HeadScratch,
}

impl Workspace {
    /// Log-probability and entropy of each target.
    pub fn forward(&mut self, model: &Model, slice: &BatchSlice, temperature: f32) -> Vec<TokenStats> {
        self.run_blocks(model, slice, &slice.packed.positions(), 1);
        self.rows.head(model, slice, temperature).run(&mut self.head, None)
    }

    /// Returns what [`Self::forward`] does, and adds the gradients of the loss.
    pub fn forward_backward(
        &mut self,
        model: &Model,
        slice: &BatchSlice,
        temperature: f32,
        LossGradient { slope, gradients }: LossGradient<'_>,
    ) -> Vec<TokenStats> {
        let positions = slice.packed.positions();
        self.run_blocks(model, slice, &positions, model.config().num_hidden_layers);
        let Self { x, kept, scratch, rows, head } = self;
        let mut d_hidden = std::mem::take(&mut rows.d_hidden);
        let to = HeadGradients {
            slope: &|i, logprob| slope(slice.first + i, logprob),
            d_hidden: d_hidden.reuse_zeros(rows.hidden.len()),
            d_weight: model.head_gradient(gradients),
        };
        let stats = rows.head(model, slice, temperature).run(head, Some(to));
        // Without any slope (no group with signal) there is nothing to send back.
        if d_hidden.iter().any(|&d| d != 0.0) {
            let d_norm = model.trainable.of_model(Parameter::FinalNorm);
            rows.backward(model, slice, &d_hidden, x, d_norm.map_or(&mut [], |place| &mut gradients[place]));
            for (layer, kept) in kept.iter_mut().enumerate().rev() {
                if model.stop().is_requested() {
                    break;
                }
                let rows = PackedRows { d: x, positions: &positions, layout: slice.packed.layout() };
                backward::block(model, layer, rows, kept, scratch, gradients);
            }
            if let Some(place) = model.trainable.of_model(Parameter::EmbedTokens) {
                embed_backward(model, &slice.packed.tokens, x, &mut gradients[place]);
            }
        }
        rows.d_hidden = d_hidden;
        stats
    }

    /// Runs up to the hidden states of the targets, and keeps the activations of the last `keep` layers.
    fn run_blocks(&mut self, model: &Model, slice: &BatchSlice, positions: &[u32], keep: usize) {
        let (rows, heads) = (slice.packed.tokens.len(), Heads::of(model.config()));
        self.kept.resize_with(keep, Activations::default);
        self.kept.iter_mut().for_each(|kept| kept.reuse(model.config(), rows));
        self.scratch.reuse(model.config(), rows);
        self.x.reuse(rows * model.config().hidden_size);
        model.embed(&slice.packed.tokens, &mut self.x);
        let mut attend = |_: usize, qkv: &[f32], out: &mut [f32], log_sum: &mut [f32]| {
            attend_packed(heads, qkv, slice.packed.layout(), out, log_sum);
        };
        for layer in 0..model.config().num_hidden_layers {
            if model.stop().is_requested() {
                break;
            }
            let kept = &mut self.kept[layer % keep];
            let stream = ResidualStream { x: &mut self.x, positions };
            block::forward(model, layer, stream, kept, &mut self.scratch, &mut attend);
        }
        self.rows.pick(model, &self.x, &slice.targets);
    }
}

fn embed_backward(model: &Model, tokens: &[u32], dx: &[f32], gradient: &mut [f32]) {
    let (d, padding) = (model.config().hidden_size, model.config().pad_token_id);
    for (&token, dx) in tokens.iter().zip(dx.chunks_exact(d)).filter(|(token, _)| Some(**token) != padding) {
        let row = &mut gradient[token as usize * d..][..d];
        row.iter_mut().zip(dx).for_each(|(row, dx)| *row += dx);
    }
}

/// The rows that predict a target, one per target, through the final norm: the head runs on no others.
#[derive(Default)]
struct TargetRows {
    /// Before the norm, `(N, D)`.
    x: AlignedVec<f32>,
    /// 1 / rms of `x`, `(N)`.
    scale: AlignedVec<f32>,
    /// After the norm, `(N, D)`.
    hidden: AlignedVec<f32>,
    /// Gradient of `hidden`.
    d_hidden: AlignedVec<f32>,
    /// Gradient of `x`.
    dx: AlignedVec<f32>,
}

impl TargetRows {
    fn pick(&mut self, model: &Model, x: &[f32], targets: &[Target]) {
        let d = model.config().hidden_size;
        self.x.reuse(targets.len() * d);
        self.scale.reuse(targets.len());
        self.hidden.reuse(targets.len() * d);
        for (to, target) in self.x.chunks_exact_mut(d).zip(targets) {
            to.copy_from_slice(&x[target.row * d..][..d]);
        }
        let epsilon = model.config().rms_norm_eps;
        rms_norm(&self.x, model.final_norm(), epsilon, &mut self.hidden, &mut self.scale);
    }

    fn head<'a>(&'a self, model: &'a Model, slice: &'a BatchSlice, temperature: f32) -> HeadPass<'a> {
        HeadPass {
            hidden: &self.hidden,
            weight: model.head(),
            targets: &slice.targets,
            temperature,
            stop: model.stop(),
        }
    }

    /// Sets `dx` to the gradient of all rows, zero in those that predict no target, and adds to that of the norm's weight, if it is
    /// not empty.
    fn backward(&mut self, model: &Model, slice: &BatchSlice, d_hidden: &[f32], dx: &mut [f32], d_norm: &mut [f32]) {
        let d = model.config().hidden_size;
        let of_targets = self.dx.reuse_zeros(d_hidden.len());
        rms_norm_backward(d_hidden, &self.x, &self.scale, model.final_norm(), of_targets, d_norm);
        dx.fill(0.0);
        for (from, target) in of_targets.chunks_exact(d).zip(&slice.targets) {
            dx[target.row * d..][..d].iter_mut().zip(from).for_each(|(dx, from)| *dx += from);
        }
    }
}
