//! Batches for training: packed sequences, the tokens whose log-probabilities are wanted, and the slices that run at once.

use super::Model;
use super::attention::PackedLayout;

/// Sequences laid end to end without padding. A sequence may continue another one, its prefix: a prompt then runs once for all of
/// its completions, and gives the same bits as if each completion had a copy.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    /// All tokens, `(T)`.
    pub tokens: Vec<u32>,
    /// First token of each sequence, and T at the end.
    pub starts: Vec<usize>,
    /// The prefix of each sequence: a sequence without a prefix of its own, with nothing in between but others that continue it.
    pub prefixes: Vec<Option<usize>>,
}

/// A token whose log-probability is wanted, given its sequence up to `row`.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Index into [`Packed::tokens`] of the token before it; several targets may follow the same token.
    pub row: usize,
    /// The token itself.
    pub token: u32,
}

/// What the head computes for a target.
#[derive(Debug, Clone, Copy)]
pub struct TokenStats {
    /// Log-probability of the token (nats).
    pub logprob: f32,
    /// Entropy of the distribution that the token is drawn from (nats).
    pub entropy: f32,
}

/// The derivatives of a loss with respect to what the head computes for a target.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenSlope {
    /// dLoss / dlogprob.
    pub logprob: f32,
    /// dLoss / dentropy.
    pub entropy: f32,
}

impl From<f32> for TokenSlope {
    /// Of a loss that does not depend on the entropy.
    fn from(logprob: f32) -> Self {
        Self { logprob, entropy: 0.0 }
    }
}

/// The slope of a target, given its index and its log-probability; called in any order.
pub type Slope<'a> = &'a (dyn Fn(usize, f32) -> TokenSlope + Sync);

/// A part of a batch that one thread runs: whole bundles of sequences.
pub struct BatchSlice {
    /// Its sequences.
    pub packed: Packed,
    /// Its targets, whose rows count from the slice's start.
    pub targets: Vec<Target>,
    /// Index of the first of them among all targets of the batch.
    pub first: usize,
}

impl Packed {
    /// Appends a sequence.
    pub(crate) fn lay<'a>(&mut self, tokens: impl IntoIterator<Item = &'a u32>, prefix: Option<usize>) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.tokens.extend(tokens);
        self.starts.push(self.tokens.len());
        self.prefixes.push(prefix);
    }

    pub(super) fn layout(&self) -> PackedLayout<'_> {
        PackedLayout { starts: &self.starts, prefixes: &self.prefixes }
    }

    /// Position of each token, counted from the start of its prefix.
    pub(crate) fn positions(&self) -> Vec<u32> {
        let len = |sequence: usize| self.starts[sequence + 1] - self.starts[sequence];
        let first = |sequence: usize| self.prefixes[sequence].map_or(0, len);
        let of = |sequence| first(sequence) as u32..(first(sequence) + len(sequence)) as u32;
        (0..self.prefixes.len()).flat_map(of).collect()
    }

    pub(super) fn check(&self, targets: &[Target], model: &Model) {
        assert_eq!(self.starts.last(), Some(&self.tokens.len()), "starts end with the number of tokens");
        assert_eq!(self.starts.len(), self.prefixes.len() + 1, "each sequence has a prefix or none");
        let mut bundle = 0;
        for (i, prefix) in self.prefixes.iter().enumerate() {
            bundle = if prefix.is_none() { i } else { bundle };
            assert!(prefix.is_none_or(|prefix| prefix == bundle && i > 0), "a sequence follows its prefix");
        }
        assert!(targets.iter().all(|target| target.row < self.tokens.len()), "targets follow a token");
        let last = self.positions().into_iter().max().unwrap_or(0) as usize;
        assert!(last < model.rope().positions(), "callers refuse sequences longer than the model's positions");
    }

    /// Cuts the batch after each bundle (a sequence and those that continue it) that brings a slice to `size` tokens.
    pub(super) fn slices(&self, targets: &[Target], size: usize) -> Vec<BatchSlice> {
        let (mut slices, mut from, mut first) = (Vec::new(), 0, 0);
        let count = self.prefixes.len();
        for to in (1..=count).filter(|&to| to == count || self.prefixes[to].is_none()) {
            let (start, end) = (self.starts[from], self.starts[to]);
            if end - start < size && to < count {
                continue;
            }
            let of_slice = targets[first..].iter().take_while(|target| target.row < end);
            let targets: Vec<_> = of_slice.map(|target| Target { row: target.row - start, ..*target }).collect();
            let packed = Self {
                tokens: self.tokens[start..end].to_vec(),
                starts: self.starts[from..=to].iter().map(|at| at - start).collect(),
                prefixes: self.prefixes[from..to].iter().map(|prefix| prefix.map(|prefix| prefix - from)).collect(),
            };
            let next = first + targets.len();
            slices.push(BatchSlice { packed, targets, first });
            (from, first) = (to, next);
        }
        assert_eq!(first, targets.len(), "targets in the order of their bundles");
        slices
    }
}
