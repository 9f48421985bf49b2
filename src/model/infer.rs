//! Prefill and decode: tokens to logits through a [`KvCache`].

use rayon::prelude::*;

use super::attention::{Heads, attend, attend_packed};
use super::block::{self, Activations, ResidualStream, Scratch};
use super::matmul::{MatrixRowsMut, Operands, StartFrom, linear};
use super::ops::rms_norm;
use super::threads::keep_threads_spinning;
use super::{KvCache, Model, Packed};
use crate::numbers::aligned::AlignedVec;

/// A sequence in a decode step.
pub struct DecodeRow<'a> {
    /// The last token.
    pub token: u32,
    /// Keys and values of the prompt, shared by its group.
    pub prompt: &'a KvCache,
    /// Keys and values of the completion so far; the step appends those of `token`.
    pub own: &'a mut KvCache,
}

impl Model {
    /// Runs prompts that share the first tokens, `stem`; `prompts` are the rest of each, at least one token. The stem runs once for all.
    /// Returns the KV cache of each whole prompt, and the logits `(V)` after its last token.
    #[must_use]
    pub fn prefill(&self, stem: &[u32], prompts: &[&[u32]]) -> Vec<(KvCache, Vec<f32>)> {
        let (heads, d) = (Heads::of(self.config()), self.config().hidden_size);
        let mut packed = Packed::default();
        let prefix = (!stem.is_empty()).then_some(0);
        if prefix.is_some() {
            packed.lay(stem, None);
        }
        prompts.iter().for_each(|prompt| packed.lay(*prompt, prefix));
        let capacity = |prompt: &&[u32]| KvCache::new(self.config(), stem.len() + prompt.len());
        let mut caches: Vec<_> = prompts.iter().map(capacity).collect();
        let x = self.run_packed(&packed, &mut |layer, qkv| {
            let (shared, own) = qkv.split_at(stem.len() * heads.row());
            let mut own = own.chunks_exact(heads.row());
            for (cache, prompt) in caches.iter_mut().zip(prompts) {
                let rows = shared.chunks_exact(heads.row()).chain(own.by_ref().take(prompt.len()));
                rows.enumerate().for_each(|(t, row)| cache.write(layer, t, heads, row));
            }
        });
        let ends = &packed.starts[packed.starts.len() - prompts.len()..];
        let last: Vec<f32> = ends.iter().flat_map(|end| &x[(end - 1) * d..end * d]).copied().collect();
        let vocabulary = self.config().vocab_size;
        let mut logits = vec![0.0; prompts.len() * vocabulary];
        self.logits(&last, &mut logits);
        let run = caches.into_iter().zip(prompts).zip(logits.chunks_exact(vocabulary));
        run.map(|((mut cache, prompt), logits)| {
            cache.advance(stem.len() + prompt.len());
            (cache, logits.to_vec())
        })
        .collect()
    }

    /// The first layer with numbers that are not finite when it runs these tokens: it names the culprit when logits are not finite.
    #[must_use]
    pub fn first_not_finite(&self, tokens: &[u32]) -> Option<usize> {
        let (mut packed, mut first) = (Packed::default(), None);
        packed.lay(tokens, None);
        let _ = self.run_packed(&packed, &mut |layer, qkv| {
            if first.is_none() && !qkv.iter().all(|x| x.is_finite()) {
                first = Some(layer);
            }
        });
        first
    }

    /// The residual stream `(T, D)` of packed sequences after all layers. `each` is called with every layer's queries, keys and values
    /// after rope.
    fn run_packed(&self, packed: &Packed, each: &mut dyn FnMut(usize, &[f32])) -> AlignedVec<f32> {
        let (heads, tokens) = (Heads::of(self.config()), packed.tokens.len());
        let mut x = AlignedVec::zeros(tokens * self.config().hidden_size);
        self.embed(&packed.tokens, &mut x);
        let positions = packed.positions();
        let (mut kept, mut scratch) = (Activations::new(self.config(), tokens), Scratch::new(self.config(), tokens));
        for layer in 0..self.config().num_hidden_layers {
            if self.stop().is_requested() {
                break;
            }
            let mut attend_prompts = |layer: usize, qkv: &[f32], out: &mut [f32], log_sum: &mut [f32]| {
                each(layer, qkv);
                attend_packed(heads, qkv, packed.layout(), out, log_sum);
            };
            let stream = ResidualStream { x: &mut x, positions: &positions };
            block::forward(self, layer, stream, &mut kept, &mut scratch, &mut attend_prompts);
        }
        x
    }

    /// Runs one step of many sequences: appends each row's token and writes the logits after it to `logits`, `(rows, V)`.
    ///
    /// A row's logits are bit-identical whatever else is in the batch, and equal those of [`Model::prefill`] and of training.
    pub fn decode(&self, rows: &mut [DecodeRow<'_>], logits: &mut [f32]) {
        if !self.fits_a_cores_cache() {
            return keep_threads_spinning(|| self.decode_together(rows, logits));
        }
        let share = rows.len().div_ceil(rayon::current_num_threads()).max(1);
        rows.par_chunks_mut(share)
            .zip(logits.par_chunks_mut(share * self.config().vocab_size))
            .for_each(|(rows, logits)| self.decode_together(rows, logits));
    }

    fn decode_together(&self, rows: &mut [DecodeRow<'_>], logits: &mut [f32]) {
        let heads = Heads::of(self.config());
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        let positions: Vec<u32> = rows.iter().map(|row| (row.prompt.len() + row.own.len()) as u32).collect();
        let mut x = AlignedVec::zeros(rows.len() * self.config().hidden_size);
        self.embed(&tokens, &mut x);
        let (mut kept, mut scratch) =
            (Activations::new(self.config(), rows.len()), Scratch::new(self.config(), rows.len()));
        for layer in 0..self.config().num_hidden_layers {
            let mut attend_caches = |layer: usize, qkv: &[f32], out: &mut [f32], log_sum: &mut [f32]| {
                let width = heads.queries * heads.dim;
                let rows = rows.par_iter_mut().zip(qkv.par_chunks(heads.row()));
                let outputs = out.par_chunks_mut(width).zip(log_sum.par_chunks_mut(heads.queries));
                rows.zip(outputs).with_min_len(8).for_each(|((row, qkv), (out, log_sum))| {
                    row.own.write(layer, 0, heads, qkv);
                    let segments = [row.prompt.segment(layer, 0), row.own.segment(layer, 1)];
                    attend(heads, &qkv[..width], &segments, out, log_sum);
                });
            };
            let stream = ResidualStream { x: &mut x, positions: &positions };
            block::forward(self, layer, stream, &mut kept, &mut scratch, &mut attend_caches);
        }
        rows.iter_mut().for_each(|row| row.own.advance(1));
        self.logits(&x, logits);
    }

    /// Looks up the tokens in the embedding table, into `x`, `(T, D)`.
    pub(super) fn embed(&self, tokens: &[u32], x: &mut [f32]) {
        let d = self.config().hidden_size;
        for (x, &token) in x.chunks_exact_mut(d).zip(tokens) {
            self.embedding(token, x);
        }
    }

    /// Applies the final norm and the LM head: `(T, D)` to `(T, V)`.
    fn logits(&self, x: &[f32], logits: &mut [f32]) {
        let (d, v) = (self.config().hidden_size, self.config().vocab_size);
        let rows = x.len() / d;
        let (mut normed, mut scale) = (AlignedVec::zeros(x.len()), AlignedVec::zeros(rows));
        rms_norm(x, self.final_norm(), self.config().rms_norm_eps, &mut normed, &mut scale);
        let mut operands = Operands::default();
        let input = self.head().input(&normed, (rows, d), &mut operands);
        linear(input, self.head(), (rows, v, d), StartFrom::Zero, MatrixRowsMut::new(logits, v, 0));
    }
}
