//! Draws a token from logits. The definitions and their order are those of transformers: repetition penalty, temperature, top-k, top-p,
//! min-p.

use std::cmp::Ordering;

use crate::model::{Normalizer, Sampling};

/// Tokens per block; the sums of blocks are kept to look up a draw.
const BLOCK: usize = 1024;

/// Tokens per run within a block.
const RUN: usize = 32;

/// Buffers of the size of the vocabulary that all draws share.
#[derive(Default)]
pub struct Sampler {
    weights: Vec<f32>,
    sorted: Vec<f32>,
    order: Vec<u32>,
    block_sums: Vec<f64>,
}

impl Sampler {
    /// Draws a token; returns it with its log-probability (nats) in the distribution it was drawn from, or for temperature 0 in the
    /// softmax at temperature 1. Returns `None` when a logit is not finite. Ties go to the lower id.
    ///
    /// `logits` is `(V)`; `history` holds all tokens so far, for the repetition penalty; `uniform` is the draw, in \[0, 1).
    pub fn draw(
        &mut self,
        logits: &[f32],
        history: [&[u32]; 2],
        uniform: f64,
        sampling: &Sampling,
    ) -> Option<(u32, f32)> {
        if logits.iter().fold(false, |bad, x| bad | !x.is_finite()) {
            return None;
        }
        self.weights.clear();
        self.weights.extend_from_slice(logits);
        let score = |token: u32| match sampling.repetition_penalty {
            1.0 => logits[token as usize],
            penalty => penalised(logits, history, token, penalty),
        };
        if sampling.repetition_penalty != 1.0 {
            for &token in history.into_iter().flatten() {
                self.weights[token as usize] = repeated(logits[token as usize], sampling.repetition_penalty);
            }
        }
        if sampling.temperature == 0.0 {
            let token = argmax(&self.weights);
            return Some((token, Normalizer::of(&mut self.weights, 1.0).logprob(score(token))));
        }
        self.keep_top_k(sampling.top_k);
        let mut normalizer = Normalizer::of(&mut self.weights, sampling.temperature);
        let mut total = self.sum();
        if sampling.top_p < 1.0 || sampling.min_p > 0.0 {
            let before = total;
            self.keep_top_p(sampling.top_p, before);
            self.keep_min_p(sampling.min_p);
            total = self.sum();
            normalizer = normalizer.restricted(before, total);
        }
        let token = self.find(uniform * total);
        Some((token, normalizer.logprob(score(token))))
    }

    /// Gives all but the likeliest tokens weight minus infinity; ties with the last of them stay.
    fn keep_top_k(&mut self, top_k: usize) {
        if top_k == 0 || top_k >= self.weights.len() {
            return;
        }
        self.sorted.clone_from(&self.weights);
        let (_, &mut least, _) = self.sorted.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
        self.weights.iter_mut().for_each(|x| *x = if *x < least { f32::NEG_INFINITY } else { *x });
    }

    /// Keeps a token if the likelier ones do not reach `top_p`. Sorts only as far as needed.
    fn keep_top_p(&mut self, top_p: f32, total: f64) {
        if top_p >= 1.0 {
            return;
        }
        let Self { weights, order, .. } = self;
        order.clear();
        order.extend((0..weights.len() as u32).filter(|&token| weights[token as usize] > 0.0));
        let wanted = f64::from(top_p) * total;
        let (mut from, mut mass) = (0, 0.0);
        while from < order.len() {
            let likelier =
                |a: &u32, b: &u32| -> Ordering { weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b)) };
            let rest = &mut order[from..];
            let next = rest.len().min(64.max(from));
            if next < rest.len() {
                rest.select_nth_unstable_by(next, likelier);
            }
            rest[..next].sort_unstable_by(likelier);
            for i in from..from + next {
                if mass >= wanted {
                    order[i..].iter().for_each(|&token| weights[token as usize] = 0.0);
                    return;
                }
                mass += f64::from(weights[order[i] as usize]);
            }
            from += next;
        }
    }

    /// Relies on the likeliest token's weight being 1.
    fn keep_min_p(&mut self, min_p: f32) {
        if min_p > 0.0 {
            self.weights.iter_mut().for_each(|weight| *weight = if *weight < min_p { 0.0 } else { *weight });
        }
    }

    /// Sums all weights, and keeps the sum of each block.
    fn sum(&mut self) -> f64 {
        self.block_sums.clear();
        self.block_sums.extend(self.weights.chunks(BLOCK).map(block_sum));
        self.block_sums.iter().sum()
    }

    /// Finds the token at which the running sum of weights passes `target`: first its block, then its run, then the token.
    fn find(&self, target: f64) -> u32 {
        let mut passed = 0.0;
        let block = BLOCK * pass(self.block_sums.iter().copied(), &mut passed, target);
        let weights = &self.weights[block..self.weights.len().min(block + BLOCK)];
        let sums = weights.chunks(RUN).map(|run| run.iter().fold(0.0, |sum, &weight| sum + f64::from(weight)));
        let run = RUN * pass(sums, &mut passed, target);
        let weights = weights[run..].iter().take(RUN).map(|&weight| f64::from(weight));
        (block + run + pass(weights, &mut passed, target)) as u32
    }
}

/// Adds numbers to `passed` until the next would pass `target`; returns the index of that one. Never returns the index of a zero; if the
/// sum falls short, returns the last number that is not.
fn pass(numbers: impl Iterator<Item = f64>, passed: &mut f64, target: f64) -> usize {
    let mut found = 0;
    for (i, number) in numbers.enumerate().filter(|(_, number)| *number > 0.0) {
        found = i;
        if *passed + number > target {
            break;
        }
        *passed += number;
    }
    found
}

/// Sums in eight chains, so that additions do not wait for each other.
fn block_sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    for chunk in weights.chunks(lanes.len()) {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight);
        }
    }
    lanes.iter().sum()
}

fn argmax(scores: &[f32]) -> u32 {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter().position(|&score| score == largest).expect("finite and not empty") as u32
}

fn repeated(logit: f32, penalty: f32) -> f32 {
    if logit < 0.0 { logit * penalty } else { logit / penalty }
}

fn penalised(logits: &[f32], history: [&[u32]; 2], token: u32, penalty: f32) -> f32 {
    let logit = logits[token as usize];
    let occurred = history.into_iter().any(|tokens| tokens.contains(&token));
    if occurred { repeated(logit, penalty) } else { logit }
}
