//! Prefill and decode: tokens to logits through a [`KvCache`].

use rayon::prelude::*;

use super::attention::{Heads, attend};
use super::block::{self, Activations, Scratch};
use super::matmul::{RowsMut, Start, linear};
use super::ops::rms_norm;
use super::{KvCache, Model};
use crate::floats::Floats;

/// One sequence's part in a decode step.
pub struct DecodeRow<'a> {
    /// The token whose successor is wanted.
    pub token: u32,
    /// Keys and values of the prompt, shared by its group.
    pub prompt: &'a KvCache,
    /// Keys and values of the tokens since; the step appends `token`'s.
    pub own: &'a mut KvCache,
}

impl Model {
    /// Runs a prompt of at least one token: its keys and values, and the logits `(V)` after its last token.
    #[must_use]
    pub fn prefill(&self, tokens: &[u32]) -> (KvCache, Vec<f32>) {
        let (heads, rows) = (Heads::of(self.config()), tokens.len());
        let mut cache = KvCache::new(self.config(), rows);
        let mut x = Floats::zeros(rows * self.config().hidden_size);
        self.embed(tokens, &mut x);
        let positions: Vec<u32> = (0..rows as u32).collect();
        let (mut kept, mut scratch) = (Activations::new(self, rows), Scratch::new(self, rows));
        for layer in 0..self.config().num_hidden_layers {
            let mut attend_prompt = |layer: usize, qkv: &[f32], out: &mut [f32], log_sum: &mut [f32]| {
                for (t, row) in qkv.chunks_exact(heads.row()).enumerate() {
                    cache.write(layer, t, heads, row);
                }
                attend_rows(heads, (qkv, out, log_sum), |t| vec![cache.segment(layer, t + 1)]);
            };
            block::forward(self, layer, (&mut x, &positions), &mut kept, &mut scratch, &mut attend_prompt);
        }
        cache.advance(rows);
        let mut logits = vec![0.0; self.config().vocab_size];
        self.logits(&x[(rows - 1) * self.config().hidden_size..], &mut logits);
        (cache, logits)
    }

    /// One step of many sequences: appends each row's token and writes the logits after it to `logits`, `(rows, V)`.
    ///
    /// A row's logits are the same bits whatever else is in the batch, and the same as [`Model::prefill`]'s and the trainer's.
    pub fn decode(&self, rows: &mut [DecodeRow<'_>], logits: &mut [f32]) {
        let threads = rayon::current_num_threads();
        let share = if self.fits_a_cores_cache() { rows.len().div_ceil(threads) } else { rows.len() };
        if share == rows.len() {
            return self.decode_together(rows, logits);
        }
        rows.par_chunks_mut(share)
            .zip(logits.par_chunks_mut(share * self.config().vocab_size))
            .for_each(|(rows, logits)| self.decode_together(rows, logits));
    }

    fn decode_together(&self, rows: &mut [DecodeRow<'_>], logits: &mut [f32]) {
        let heads = Heads::of(self.config());
        let tokens: Vec<u32> = rows.iter().map(|row| row.token).collect();
        let positions: Vec<u32> = rows.iter().map(|row| (row.prompt.len() + row.own.len()) as u32).collect();
        let mut x = Floats::zeros(rows.len() * self.config().hidden_size);
        self.embed(&tokens, &mut x);
        let (mut kept, mut scratch) = (Activations::new(self, rows.len()), Scratch::new(self, rows.len()));
        for layer in 0..self.config().num_hidden_layers {
            let mut attend_caches = |layer: usize, qkv: &[f32], out: &mut [f32], log_sum: &mut [f32]| {
                for (row, qkv) in rows.iter_mut().zip(qkv.chunks_exact(heads.row())) {
                    row.own.write(layer, 0, heads, qkv);
                }
                let rows = &*rows;
                attend_rows(heads, (qkv, out, log_sum), |i| {
                    vec![rows[i].prompt.segment(layer, 0), rows[i].own.segment(layer, 1)]
                });
            };
            block::forward(self, layer, (&mut x, &positions), &mut kept, &mut scratch, &mut attend_caches);
        }
        rows.iter_mut().for_each(|row| row.own.advance(1));
        self.logits(&x, logits);
    }

    /// Rows of the embedding table, `(T, D)`.
    pub(super) fn embed(&self, tokens: &[u32], x: &mut [f32]) {
        let d = self.config().hidden_size;
        for (x, &token) in x.chunks_exact_mut(d).zip(tokens) {
            x.copy_from_slice(&self.embedding()[token as usize * d..][..d]);
        }
    }

    /// Final norm and LM head: `(T, D)` to `(T, V)`.
    fn logits(&self, x: &[f32], logits: &mut [f32]) {
        let (d, v) = (self.config().hidden_size, self.config().vocab_size);
        let rows = x.len() / d;
        let (mut normed, mut scale) = (Floats::zeros(x.len()), Floats::zeros(rows));
        rms_norm(x, self.final_norm(), self.config().rms_norm_eps, &mut normed, &mut scale);
        linear(&normed, self.head(), (rows, v, d), Start::Zero, RowsMut::new(logits, v, 0));
    }
}

/// Each row of `qkv` attends over the segments that `segments(row)` names.
fn attend_rows<'c>(
    heads: Heads,
    (qkv, out, log_sum): (&[f32], &mut [f32], &mut [f32]),
    segments: impl Fn(usize) -> Vec<super::attention::Segment<'c>> + Sync,
) {
    let width = heads.queries * heads.dim;
    let rows = qkv.par_chunks(heads.row()).zip(out.par_chunks_mut(width)).zip(log_sum.par_chunks_mut(heads.queries));
    rows.enumerate().with_min_len(8).for_each(|(i, ((qkv, out), log_sum))| {
        attend(heads, &qkv[..width], &segments(i), out, log_sum);
    });
}
