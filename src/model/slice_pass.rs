//! One span of packed sequences through the model, forward and backward, in memory that is kept from span to span.

use super::attention::{Heads, attend_packed};
use super::backward::{self, Rows};
use super::block::{self, Activations, Scratch};
use super::head::{Head, HeadBackward};
use super::ops::{rms_norm, rms_norm_backward};
use super::train::{Packed, Target, TokenStats};
use super::{Model, Parameter};
use crate::numbers::aligned::Floats;

/// dLoss / dlogprob of a target, by its index and its log-probability; asked in any order.
pub type Slope<'a> = &'a (dyn Fn(usize, f32) -> f32 + Sync);

/// A part of a batch.
pub struct Span {
    /// Its sequences.
    pub packed: Packed,
    /// Its targets.
    pub targets: Vec<Target>,
    /// Index of the first of them among all of the batch's.
    pub first: usize,
}

/// The loss, and where its gradients go.
pub struct Backward<'a> {
    /// Of the batch's targets.
    pub slope: Slope<'a>,
    /// One buffer a parameter, added to.
    pub gradients: &'a mut [Floats],
}

/// What every family trains.
const TRAINED: &str = "`Config::trainable` lists it";

/// Memory to work in.
#[derive(Default)]
pub struct Workspace {
    /// Residual stream, `(T, D)`; then its gradient.
    x: Floats,
    kept: Vec<Activations>,
    scratch: Scratch,
    picked: Picked,
    logits: Floats,
}

impl Workspace {
    /// What the model says of each target.
    pub fn logprobs(&mut self, model: &Model, span: &Span, temperature: f32) -> Vec<TokenStats> {
        self.forward(model, span, &span.packed.positions(), 1);
        self.picked.head(model, span, temperature).run(&mut self.logits, None)
    }

    /// The same, and adds the gradients of the loss.
    pub fn accumulate(
        &mut self,
        model: &Model,
        span: &Span,
        temperature: f32,
        Backward { slope, gradients }: Backward<'_>,
    ) -> Vec<TokenStats> {
        let positions = span.packed.positions();
        self.forward(model, span, &positions, model.config().num_hidden_layers);
        let Self { x, kept, scratch, picked, logits } = self;
        let mut d_hidden = std::mem::take(&mut picked.d_hidden);
        let backward = HeadBackward {
            slope: &|i, logprob| slope(span.first + i, logprob),
            d_hidden: d_hidden.reuse_zeros(picked.hidden.len()),
            d_weight: &mut gradients[model.trainable.of_head().expect(TRAINED)],
        };
        let stats = picked.head(model, span, temperature).run(logits, Some(backward));
        // Without any slope (no group with signal) there is nothing to send back.
        if d_hidden.iter().any(|&d| d != 0.0) {
            let d_norm = model.trainable.of_model(Parameter::FinalNorm).expect(TRAINED);
            picked.backward(model, span, &d_hidden, (x, &mut gradients[d_norm]));
            for (layer, kept) in kept.iter_mut().enumerate().rev() {
                if model.stop().is_wished() {
                    break;
                }
                let rows = Rows { d: x, positions: &positions, layout: span.packed.layout() };
                backward::block(model, layer, rows, kept, scratch, gradients);
            }
            let d_embedding = model.trainable.of_model(Parameter::EmbedTokens).expect(TRAINED);
            embed_backward(model, &span.packed.tokens, x, &mut gradients[d_embedding]);
        }
        picked.d_hidden = d_hidden;
        stats
    }

    /// Up to the hidden states of the targets; of the last `keep` layers the activations stay.
    fn forward(&mut self, model: &Model, span: &Span, positions: &[u32], keep: usize) {
        let (rows, heads) = (span.packed.tokens.len(), Heads::of(model.config()));
        self.kept.resize_with(keep, Activations::default);
        self.kept.iter_mut().for_each(|kept| kept.reuse(model.config(), rows));
        self.scratch.reuse(model.config(), rows);
        self.x.reuse(rows * model.config().hidden_size);
        model.embed(&span.packed.tokens, &mut self.x);
        let mut attend = |_: usize, qkv: &[f32], out: &mut [f32], log_sum: &mut [f32]| {
            attend_packed(heads, qkv, span.packed.layout(), out, log_sum);
        };
        for layer in 0..model.config().num_hidden_layers {
            if model.stop().is_wished() {
                break;
            }
            let kept = &mut self.kept[layer % keep];
            block::forward(model, layer, (&mut self.x, positions), kept, &mut self.scratch, &mut attend);
        }
        self.picked.pick(model, &self.x, &span.targets);
    }
}

fn embed_backward(model: &Model, tokens: &[u32], dx: &[f32], gradient: &mut [f32]) {
    let (d, padding) = (model.config().hidden_size, model.config().pad_token_id);
    for (&token, dx) in tokens.iter().zip(dx.chunks_exact(d)).filter(|(token, _)| Some(**token) != padding) {
        let row = &mut gradient[token as usize * d..][..d];
        row.iter_mut().zip(dx).for_each(|(row, dx)| *row += dx);
    }
}

/// The rows that predict a target, once for each, through the final norm: the head runs on no others.
#[derive(Default)]
struct Picked {
    /// Before the norm, `(N, D)`.
    x: Floats,
    scale: Floats,
    /// After it, `(N, D)`.
    hidden: Floats,
    /// Its gradient.
    d_hidden: Floats,
    /// Gradient of `x`.
    dx: Floats,
}

impl Picked {
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

    fn head<'a>(&'a self, model: &'a Model, span: &'a Span, temperature: f32) -> Head<'a> {
        Head { hidden: &self.hidden, weight: model.head(), targets: &span.targets, temperature, stop: model.stop() }
    }

    /// `dx` becomes the gradient of all rows, zero in those that predict no target; adds to that of the norm's weight.
    fn backward(&mut self, model: &Model, span: &Span, d_hidden: &[f32], (dx, d_norm): (&mut [f32], &mut [f32])) {
        let d = model.config().hidden_size;
        let picked = self.dx.reuse_zeros(d_hidden.len());
        rms_norm_backward(d_hidden, &self.x, &self.scale, model.final_norm(), picked, d_norm);
        dx.fill(0.0);
        for (from, target) in picked.chunks_exact(d).zip(&span.targets) {
            dx[target.row * d..][..d].iter_mut().zip(from).for_each(|(dx, from)| *dx += from);
        }
    }
}
