//! Packed sequences through the model: log-probabilities of chosen tokens, and the gradient of a loss over them.

use rayon::prelude::*;

use super::attention::{Heads, attend_packed};
use super::backward::{self, Rows};
use super::block::{self, Activations, Scratch};
use super::head::{Head, HeadBackward};
use super::ops::{rms_norm, rms_norm_backward};
use super::{Config, Model};
use crate::floats::Floats;

/// Sequences laid end to end without padding.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    /// All tokens, `(T)`.
    pub tokens: Vec<u32>,
    /// First token of each sequence, and T at the end.
    pub starts: Vec<usize>,
}

/// A token whose log-probability is wanted: `tokens[row + 1]` given everything of its sequence up to `row`.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Index into [`Packed::tokens`] of the token before it.
    pub row: usize,
    /// The token itself.
    pub token: u32,
}

/// What the head says of one target.
#[derive(Debug, Clone, Copy)]
pub struct TokenStats {
    /// Log-probability of the token [nats].
    pub logprob: f32,
    /// Entropy of its distribution [nats].
    pub entropy: f32,
}

/// One buffer a parameter, in the order of [`Config::parameters`]; and the memory that making them takes, kept from batch to batch.
pub struct Gradients(pub Vec<Floats>, Workspace);

#[derive(Default)]
struct Workspace {
    kept: Vec<Activations>,
    scratch: Scratch,
    logits: Floats,
}

impl Gradients {
    /// All zero, in the model's shapes.
    #[must_use]
    pub fn zeros(config: &Config) -> Self {
        let buffers = config.parameters().iter().map(|(_, shape)| Floats::zeros(shape.iter().product())).collect();
        Self(buffers, Workspace::default())
    }

    /// Back to zero, memory kept.
    pub fn clear(&mut self) {
        self.0.par_iter_mut().for_each(|gradient| gradient.fill(0.0));
    }
}

impl Packed {
    /// Position of each token in its sequence.
    fn positions(&self) -> Vec<u32> {
        self.starts.windows(2).flat_map(|span| 0..(span[1] - span[0]) as u32).collect()
    }

    fn check(&self, targets: &[Target], model: &Model) {
        assert_eq!(self.starts.last(), Some(&self.tokens.len()), "starts end with the number of tokens");
        assert!(targets.is_sorted_by(|a, b| a.row < b.row), "targets in ascending order, each row once");
        let longest = self.starts.windows(2).map(|span| span[1] - span[0]).max().unwrap_or(0);
        assert!(longest <= model.rope().positions(), "callers refuse sequences longer than the model's positions");
    }
}

impl Model {
    /// Log-probabilities and entropies of `targets` (in ascending `row` order) at a temperature; nothing is kept for a backward.
    #[must_use]
    pub fn logprobs(&self, batch: &Packed, targets: &[Target], temperature: f32) -> Vec<TokenStats> {
        batch.check(targets, self);
        let rows = batch.tokens.len();
        let (mut kept, mut scratch) = (Activations::new(self, rows), Scratch::new(self, rows));
        let mut x = self.embed(&batch.tokens);
        let positions = batch.positions();
        for layer in 0..self.config().num_hidden_layers {
            self.block(layer, (&mut x, &positions), &mut kept, &mut scratch, &batch.starts);
        }
        let picked = Picked::of(self, &x, targets);
        self.head_of(&picked, temperature).run(&mut Floats::default(), None)
    }

    /// As [`Model::logprobs`], and adds to `gradients` those of a loss given by its derivative after each log-probability:
    /// `slope(i, logprob)` = dLoss / dlogprob of `targets[i]`, called once for each target in order.
    pub fn accumulate(
        &self,
        batch: &Packed,
        targets: &[Target],
        temperature: f32,
        gradients: &mut Gradients,
        slope: &mut dyn FnMut(usize, f32) -> f32,
    ) -> Vec<TokenStats> {
        batch.check(targets, self);
        let (rows, layers) = (batch.tokens.len(), self.config().num_hidden_layers);
        let Workspace { mut kept, mut scratch, mut logits } = std::mem::take(&mut gradients.1);
        kept.resize_with(layers, Activations::default);
        kept.iter_mut().for_each(|kept| kept.reuse(self, rows));
        scratch.reuse(self, rows);
        let mut x = self.embed(&batch.tokens);
        let positions = batch.positions();
        for (layer, kept) in kept.iter_mut().enumerate() {
            self.block(layer, (&mut x, &positions), kept, &mut scratch, &batch.starts);
        }
        let picked = Picked::of(self, &x, targets);
        let mut d_hidden = Floats::zeros(picked.hidden.len());
        let backward = HeadBackward { slope, d_hidden: &mut d_hidden, d_weight: &mut gradients.0[self.head_index()] };
        let stats = self.head_of(&picked, temperature).run(&mut logits, Some(backward));
        // Without any slope (no group with signal) there is nothing to send back.
        if d_hidden.iter().any(|&d| d != 0.0) {
            x.fill(0.0);
            picked.backward(self, &d_hidden, &mut x, &mut gradients.0[self.final_norm_index()]);
            for (layer, kept) in kept.iter_mut().enumerate().rev() {
                let rows = Rows { d: &mut x, positions: &positions, starts: &batch.starts };
                backward::block(self, layer, rows, kept, &mut scratch, gradients);
            }
            self.embed_backward(&batch.tokens, &x, &mut gradients.0[0]);
        }
        gradients.1 = Workspace { kept, scratch, logits };
        stats
    }

    fn block(
        &self,
        layer: usize,
        rows: (&mut [f32], &[u32]),
        kept: &mut Activations,
        scratch: &mut Scratch,
        starts: &[usize],
    ) {
        let heads = Heads::of(self.config());
        let mut attend = |_: usize, qkv: &[f32], out: &mut [f32], log_sum: &mut [f32]| {
            attend_packed(heads, qkv, starts, out, log_sum);
        };
        block::forward(self, layer, rows, kept, scratch, &mut attend);
    }

    fn head_of<'a>(&'a self, picked: &'a Picked, temperature: f32) -> Head<'a> {
        Head { hidden: &picked.hidden, weight: self.head(), tokens: &picked.tokens, temperature }
    }

    fn embed_backward(&self, tokens: &[u32], dx: &[f32], gradient: &mut [f32]) {
        let d = self.config().hidden_size;
        for (&token, dx) in tokens.iter().zip(dx.chunks_exact(d)) {
            let row = &mut gradient[token as usize * d..][..d];
            row.iter_mut().zip(dx).for_each(|(row, dx)| *row += dx);
        }
    }
}

/// The rows that predict a target, through the final norm: the head runs on no others.
struct Picked {
    rows: Vec<usize>,
    tokens: Vec<u32>,
    /// Before the norm, `(N, D)`.
    x: Floats,
    scale: Floats,
    /// After it, `(N, D)`.
    hidden: Floats,
}

impl Picked {
    fn of(model: &Model, x: &[f32], targets: &[Target]) -> Self {
        let d = model.config().hidden_size;
        let mut picked = Self {
            rows: targets.iter().map(|target| target.row).collect(),
            tokens: targets.iter().map(|target| target.token).collect(),
            x: Floats::zeros(targets.len() * d),
            scale: Floats::zeros(targets.len()),
            hidden: Floats::zeros(targets.len() * d),
        };
        for (to, &row) in picked.x.chunks_exact_mut(d).zip(&picked.rows) {
            to.copy_from_slice(&x[row * d..][..d]);
        }
        let epsilon = model.config().rms_norm_eps;
        rms_norm(&picked.x, model.final_norm(), epsilon, &mut picked.hidden, &mut picked.scale);
        picked
    }

    fn backward(&self, model: &Model, d_hidden: &[f32], dx: &mut [f32], d_norm: &mut [f32]) {
        let d = model.config().hidden_size;
        let mut picked_dx = Floats::zeros(d_hidden.len());
        rms_norm_backward(d_hidden, &self.x, &self.scale, model.final_norm(), &mut picked_dx, d_norm);
        for (from, &row) in picked_dx.chunks_exact(d).zip(&self.rows) {
            dx[row * d..][..d].copy_from_slice(from);
        }
    }
}
