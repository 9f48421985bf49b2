//! LM head, log-sum-exp, gather, entropy and their backward in one pass over chunks of rows: full logits never exist.

#![allow(unsafe_code)] // the dispatch to an instruction set

use rayon::prelude::*;

use super::attention::exp_and_sum;
use super::matmul::{Rows, RowsMut, Start, input_gradient, linear, weight_gradient};
use super::ops::dot;
use super::simd::{self, Kernel, Simd};
use super::train::TokenStats;
use super::weights::Floats;

/// Logits held at once [numbers]: 128 MiB, some 220 rows of a vocabulary of 151,936.
const CHUNK_LOGITS: usize = 32 << 20;

/// The head's inputs: hidden states after the final norm `(N, D)`, the head's weight `(V, D)`, the token wanted of each row.
pub struct Head<'a> {
    /// `(N, D)`.
    pub hidden: &'a [f32],
    /// `(V, D)`.
    pub weight: &'a [f32],
    /// `(N)`.
    pub tokens: &'a [u32],
    /// Logits are divided by it.
    pub temperature: f32,
}

/// Where gradients go, and where they come from.
pub struct HeadBackward<'a> {
    /// dLoss / dlogprob of row `i`, called once for each in order.
    pub slope: &'a mut dyn FnMut(usize, f32) -> f32,
    /// Gradient of the hidden states, `(N, D)`, added to.
    pub d_hidden: &'a mut [f32],
    /// Gradient of the weight, `(V, D)`, added to.
    pub d_weight: &'a mut [f32],
}

impl Head<'_> {
    /// Log-probability and entropy of each row; with `backward`, gradients too.
    pub fn run(&self, mut backward: Option<HeadBackward<'_>>) -> Vec<TokenStats> {
        let rows = self.tokens.len();
        if rows == 0 {
            return Vec::new();
        }
        let d = self.hidden.len() / rows;
        let v = self.weight.len() / d;
        let chunk = (CHUNK_LOGITS / v).clamp(1, rows);
        let mut logits = Floats::zeros(chunk * v);
        let mut stats = Vec::with_capacity(rows);
        for from in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - from);
            let hidden = &self.hidden[from * d..(from + n) * d];
            let logits = &mut logits[..n * v];
            linear(hidden, self.weight, (n, v, d), Start::Zero, RowsMut::new(logits, v, 0));
            let tokens = &self.tokens[from..from + n];
            stats.par_extend(logits.par_chunks_mut(v).zip(tokens).map(|(row, &token)| self.softmax(row, token)));
            let Some(backward) = &mut backward else { continue };
            let slopes: Vec<f32> = (from..from + n).map(|i| (backward.slope)(i, stats[i].logprob)).collect();
            if slopes.iter().all(|&slope| slope == 0.0) {
                continue; // groups without signal cost no backward of the head
            }
            logits.par_chunks_mut(v).zip(tokens).zip(slopes).for_each(|((row, &token), slope)| {
                let scale = slope / self.temperature;
                row.iter_mut().for_each(|p| *p *= -scale);
                row[token as usize] += scale;
            });
            let logits = Rows::new(logits, v, 0);
            input_gradient(logits, self.weight, (n, v, d), &mut backward.d_hidden[from * d..(from + n) * d]);
            weight_gradient(logits, hidden, (n, v, d), backward.d_weight);
        }
        stats
    }

    /// Turns a row of logits into probabilities.
    fn softmax(&self, row: &mut [f32], token: u32) -> TokenStats {
        // SAFETY: no pointers.
        unsafe { simd::run(Softmax { row, token: token as usize, temperature: self.temperature }) }
    }
}

struct Softmax<'a> {
    row: &'a mut [f32],
    token: usize,
    temperature: f32,
}

impl Kernel for Softmax<'_> {
    type Out = TokenStats;

    /// The entropy is log-sum-exp minus the mean logit, so that it needs no logarithm a token.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> TokenStats {
        let scale = 1.0 / self.temperature;
        let mut max = f32::NEG_INFINITY;
        for x in self.row.iter_mut() {
            *x *= scale;
            max = if *x > max { *x } else { max };
        }
        let logit = self.row[self.token];
        let shifted: Vec<f32> = self.row.iter().map(|x| x - max).collect();
        let sum = exp_and_sum::<S>(self.row, max);
        let log_sum = sum.ln();
        let mean = dot::<S>(self.row, &shifted) / sum;
        self.row.iter_mut().for_each(|p| *p /= sum);
        TokenStats { logprob: logit - max - log_sum, entropy: log_sum - mean }
    }
}
