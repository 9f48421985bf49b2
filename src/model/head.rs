//! Computes LM head, log-probability, entropy and their backward a chunk of rows at a time, so that the full logits never exist.

#![allow(unsafe_code)] // the dispatch to an instruction set

use rayon::prelude::*;

use super::adapter::MatrixGradient;
use super::attention::exp_and_sum;
use super::batch::{Slope, Target, TokenSlope, TokenStats};
use super::matmul::{MatrixRows, MatrixRowsMut, Operands, StartFrom, Weight, input_gradient, linear};
use super::simd::{self, Kernel, LANES, Simd};
use crate::numbers::aligned::AlignedVec;
use crate::process::cancel::Stop;

/// Logits held at once, 128 MiB (numbers): some 220 rows of a vocabulary of 151,936.
const CHUNK_LOGITS: usize = 32 << 20;

/// A pass of the LM head over the rows that predict a target.
pub struct HeadPass<'a> {
    /// Hidden states after the final norm, `(N, D)`.
    pub hidden: &'a [f32],
    /// `(V, D)`.
    pub weight: Weight<'a>,
    /// The target of each row, `(N)`.
    pub targets: &'a [Target],
    /// The logits are divided by it.
    pub temperature: f32,
    /// Ends the pass early, with fewer stats than targets.
    pub stop: &'a Stop,
}

/// What the backward of the head starts from, and where its gradients go.
pub struct HeadGradients<'a> {
    /// The slope of row `i`.
    pub slope: Slope<'a>,
    /// Gradient of the hidden states, `(N, D)`, zero on entry.
    pub d_hidden: &'a mut [f32],
    /// Where that of the weight, `(V, D)`, goes.
    pub d_weight: MatrixGradient<'a>,
}

/// Memory that a pass works in, kept from pass to pass.
#[derive(Default)]
pub struct HeadScratch {
    logits: AlignedVec<f32>,
    operands: Operands,
}

impl HeadPass<'_> {
    /// Returns log-probability and entropy of each row; with `backward`, computes gradients too. `scratch` is memory to work in.
    pub fn run(&self, scratch: &mut HeadScratch, mut backward: Option<HeadGradients<'_>>) -> Vec<TokenStats> {
        let rows = self.targets.len();
        if rows == 0 {
            return Vec::new();
        }
        let d = self.hidden.len() / rows;
        let v = self.weight.outputs(d);
        let HeadScratch { logits, operands } = scratch;
        let chunk = (CHUNK_LOGITS / v).clamp(1, rows);
        logits.reuse(chunk * v);
        let mut stats = Vec::with_capacity(rows);
        for from in (0..rows).step_by(chunk) {
            if self.stop.is_requested() {
                break;
            }
            let n = chunk.min(rows - from);
            let hidden = &self.hidden[from * d..(from + n) * d];
            let logits = &mut logits[..n * v];
            let input = self.weight.input(hidden, (n, d), operands);
            linear(input, self.weight, (n, v, d), StartFrom::Zero, MatrixRowsMut::new(logits, v, 0));
            let targets = &self.targets[from..from + n];
            stats
                .par_extend(logits.par_chunks_mut(v).zip(targets).map(|(row, target)| self.softmax(row, target.token)));
            let Some(backward) = &mut backward else { continue };
            let slopes: Vec<_> = (from..from + n).map(|i| (backward.slope)(i, stats[i].logprob)).collect();
            if slopes.iter().all(|&slope| slope == TokenSlope::default()) {
                continue; // groups without signal cost no backward of the head
            }
            let rows = logits.par_chunks_mut(v).zip(targets).zip(&stats[from..]).zip(slopes);
            rows.for_each(|(((row, target), stats), slope)| {
                let [to_logprob, to_entropy] = [slope.logprob, slope.entropy].map(|slope| slope / self.temperature);
                match slope.entropy == 0.0 {
                    true => row.iter_mut().for_each(|p| *p *= -to_logprob),
                    // The entropy H falls by p (ln p + H) for each unit of a logit.
                    false => row.iter_mut().filter(|p| **p > 0.0).for_each(|p| {
                        *p *= -to_logprob - to_entropy * (p.ln() + stats.entropy);
                    }),
                }
                row[target.token as usize] += to_logprob;
            });
            let logits = MatrixRows::new(logits, v, 0);
            let d_hidden = &mut backward.d_hidden[from * d..(from + n) * d];
            input_gradient(logits, self.weight, (n, v, d), StartFrom::Zero, d_hidden, operands);
            backward.d_weight.add(logits, hidden, self.weight, (n, v, d), operands);
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

    /// Computes the entropy as log-sum-exp minus the mean logit, which needs no logarithm per token.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> TokenStats {
        let logit = self.row[self.token];
        let scale = 1.0 / self.temperature;
        let max = scale_and_max(self.row, scale);
        let (sum, weighted) = exp_and_sums::<S>(self.row, max);
        let normalizer = Normalizer { scale, max, log_sum: sum.ln() };
        self.row.iter_mut().for_each(|p| *p /= sum);
        TokenStats { logprob: normalizer.logprob(logit), entropy: normalizer.log_sum - weighted / sum }
    }
}

/// Replaces x by e^(x - max); returns their sum, added as in [`exp_and_sum`], and the sum of e^(x - max) (x - max).
#[inline(always)]
fn exp_and_sums<S: Simd>(x: &mut [f32], max: f32) -> (f32, f32) {
    let (mut sums, mut weighted) = ([0.0f32; LANES], [0.0f32; LANES]);
    let mut chunks = x.chunks_exact_mut(LANES);
    let mut step = |chunk: &mut [f32]| {
        for ((x, sum), weighted) in chunk.iter_mut().zip(&mut sums).zip(&mut weighted) {
            let shifted = *x - max;
            *x = simd::exp::<S>(shifted);
            *sum += *x;
            *weighted = simd::mul_add::<S>(*x, shifted, *weighted);
        }
    };
    chunks.by_ref().for_each(&mut step);
    step(chunks.into_remainder());
    // SAFETY: as many lanes as a load takes.
    unsafe { (simd::sum::<S>(S::load(sums.as_ptr())), simd::sum::<S>(S::load(weighted.as_ptr()))) }
}

/// Turns a logit into a log-probability. Sampler and trainer share it, so that the trainer recomputes what the sampler recorded, bit
/// for bit.
#[derive(Debug, Clone, Copy)]
pub struct Normalizer {
    scale: f32,
    max: f32,
    log_sum: f32,
}

impl Normalizer {
    /// Replaces a row of logits `(V)` by e^(logit / temperature - max): probabilities before the division by their sum. A NaN among the
    /// logits makes every log-probability NaN.
    #[must_use]
    pub fn of(row: &mut [f32], temperature: f32) -> Self {
        // SAFETY: no pointers.
        unsafe { simd::run(Exponentials { row, scale: 1.0 / temperature }) }
    }

    /// The normalizer over fewer tokens, which have `to` of the sum `from`.
    #[must_use]
    pub fn restricted(self, from: f64, to: f64) -> Self {
        Self { log_sum: self.log_sum + (to / from).ln() as f32, ..self }
    }

    /// The log-probability of a logit of the row (nats).
    #[must_use]
    pub fn logprob(&self, logit: f32) -> f32 {
        logit * self.scale - self.max - self.log_sum
    }
}

struct Exponentials<'a> {
    row: &'a mut [f32],
    scale: f32,
}

impl Kernel for Exponentials<'_> {
    type Out = Normalizer;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Normalizer {
        let max = scale_and_max(self.row, self.scale);
        Normalizer { scale: self.scale, max, log_sum: exp_and_sum::<S>(self.row, max).ln() }
    }
}

/// Multiplies x by `scale`; returns the largest, found in [`LANES`] chains.
#[inline(always)]
fn scale_and_max(x: &mut [f32], scale: f32) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    let mut step = |chunk: &mut [f32]| {
        for (max, x) in lanes.iter_mut().zip(chunk) {
            *x *= scale;
            *max = if *x > *max { *x } else { *max };
        }
    };
    chunks.by_ref().for_each(&mut step);
    step(chunks.into_remainder());
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}
