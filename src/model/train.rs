//! Packed sequences through the model: log-probabilities of chosen tokens, and the gradient of a loss over them.
//!
//! While the weights fit in a core's own cache a batch is cut into spans, and threads share out the spans. The cuts depend on the
//! batch alone, and the spans' gradients are added in order, so the sums are the same bits on any number of threads. Larger models
//! run a batch as one span, and threads share out each product.

use std::sync::Mutex;

use rayon::prelude::*;

use super::attention::Layout;
use super::slice_pass::{Backward, Slope, Span, Workspace};
use super::{Config, Model};
use crate::numbers::aligned::Floats;

/// Sequences laid end to end without padding. A sequence may go on from another: a prompt runs once for all of its completions,
/// with the same bits as if each had its own.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    /// All tokens, `(T)`.
    pub tokens: Vec<u32>,
    /// First token of each sequence, and T at the end.
    pub starts: Vec<usize>,
    /// The sequence that each goes on from: one without a prefix of its own, and nothing between the two but others that go on
    /// from it.
    pub prefixes: Vec<Option<usize>>,
}

/// A token whose log-probability is wanted, given everything of a sequence up to `row`.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Index into [`Packed::tokens`] of the token before it; several tokens may follow the same.
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

/// A buffer per parameter, in the order of [`Config::trainable`]; and the memory that filling them takes, kept from batch to batch.
pub struct Gradients(pub Vec<Floats>, Memory);

#[derive(Default)]
struct Memory {
    workspaces: Workspaces,
    /// Gradients of each span.
    parts: Vec<Vec<Floats>>,
}

impl Gradients {
    /// All zero, in the model's shapes.
    #[must_use]
    pub fn zeros(config: &Config) -> Self {
        Self(buffers(config), Memory::default())
    }

    /// Back to zero, memory kept.
    pub fn clear(&mut self) {
        self.0.par_iter_mut().for_each(|gradient| gradient.fill(0.0));
    }
}

fn buffers(config: &Config) -> Vec<Floats> {
    config.trainable().iter().map(|(_, shape)| Floats::zeros(shape.iter().product())).collect()
}

/// As many as threads ever worked at once.
#[derive(Default)]
struct Workspaces(Mutex<Vec<Workspace>>);

impl Workspaces {
    fn with<T>(&self, work: impl FnOnce(&mut Workspace) -> T) -> T {
        let free = || self.0.lock().expect("nobody panics while holding it");
        let mut workspace = free().pop().unwrap_or_default();
        let done = work(&mut workspace);
        free().push(workspace);
        done
    }
}

impl Packed {
    /// Lays a sequence behind those that are there.
    pub(crate) fn lay<'a>(&mut self, tokens: impl IntoIterator<Item = &'a u32>, prefix: Option<usize>) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.tokens.extend(tokens);
        self.starts.push(self.tokens.len());
        self.prefixes.push(prefix);
    }

    pub(super) fn layout(&self) -> Layout<'_> {
        Layout { starts: &self.starts, prefixes: &self.prefixes }
    }

    /// Position of each token, counted from the start of its prefix.
    pub(crate) fn positions(&self) -> Vec<u32> {
        let len = |sequence: usize| self.starts[sequence + 1] - self.starts[sequence];
        let first = |sequence: usize| self.prefixes[sequence].map_or(0, len);
        let of = |sequence| first(sequence) as u32..(first(sequence) + len(sequence)) as u32;
        (0..self.prefixes.len()).flat_map(of).collect()
    }

    fn check(&self, targets: &[Target], model: &Model) {
        assert_eq!(self.starts.last(), Some(&self.tokens.len()), "starts end with the number of tokens");
        assert_eq!(self.starts.len(), self.prefixes.len() + 1, "each sequence has a prefix or none");
        let mut family = 0;
        for (i, prefix) in self.prefixes.iter().enumerate() {
            family = if prefix.is_none() { i } else { family };
            assert!(prefix.is_none_or(|prefix| prefix == family && i > 0), "a sequence follows its prefix");
        }
        assert!(targets.iter().all(|target| target.row < self.tokens.len()), "targets follow a token");
        let last = self.positions().into_iter().max().unwrap_or(0) as usize;
        assert!(last < model.rope().positions(), "callers refuse sequences longer than the model's positions");
    }

    /// Cut into runs of whole families, a sequence and those that go on from it, each run ended by the family that brings it to
    /// `size` tokens.
    fn spans(&self, targets: &[Target], size: usize) -> Vec<Span> {
        let (mut spans, mut from, mut first) = (Vec::new(), 0, 0);
        let count = self.prefixes.len();
        for to in (1..=count).filter(|&to| to == count || self.prefixes[to].is_none()) {
            let (start, end) = (self.starts[from], self.starts[to]);
            if end - start < size && to < count {
                continue;
            }
            let of_span = || targets[first..].iter().take_while(|target| target.row < end);
            let packed = Self {
                tokens: self.tokens[start..end].to_vec(),
                starts: self.starts[from..=to].iter().map(|at| at - start).collect(),
                prefixes: self.prefixes[from..to].iter().map(|prefix| prefix.map(|prefix| prefix - from)).collect(),
            };
            let targets: Vec<_> = of_span().map(|target| Target { row: target.row - start, ..*target }).collect();
            let next = first + targets.len();
            spans.push(Span { packed, targets, first });
            (from, first) = (to, next);
        }
        assert_eq!(first, targets.len(), "targets in the order of their families");
        spans
    }
}

/// Tokens of a span: enough for products at full speed, few enough that every thread gets several spans of a batch.
const SPAN_TOKENS: usize = 512;

impl Model {
    /// Log-probabilities and entropies of `targets` at a temperature; nothing is kept for a backward.
    #[must_use]
    pub fn logprobs(&self, batch: &Packed, targets: &[Target], temperature: f32) -> Vec<TokenStats> {
        batch.check(targets, self);
        let workspaces = Workspaces::default();
        let one = |span: &Span| workspaces.with(|workspace| workspace.logprobs(self, span, temperature));
        self.spans(batch, targets).par_iter().with_max_len(1).map(one).collect::<Vec<_>>().concat()
    }

    /// As [`Model::logprobs`], and adds to `gradients` those of a loss given by its derivative after each log-probability:
    /// `slope(i, logprob)` = dLoss / dlogprob of `targets[i]`.
    pub fn accumulate(
        &self,
        batch: &Packed,
        targets: &[Target],
        temperature: f32,
        gradients: &mut Gradients,
        slope: Slope<'_>,
    ) -> Vec<TokenStats> {
        batch.check(targets, self);
        let Gradients(whole, Memory { workspaces, parts }) = gradients;
        let spans = self.spans(batch, targets);
        if let [span] = &spans[..] {
            let backward = Backward { slope, gradients: whole };
            return workspaces.with(|workspace| workspace.accumulate(self, span, temperature, backward));
        }
        if parts.len() < spans.len() {
            parts.resize_with(spans.len(), || buffers(self.config()));
        }
        let parts = &mut parts[..spans.len()];
        let one = |(span, part): (&Span, &mut Vec<Floats>)| {
            part.iter_mut().for_each(|gradient| gradient.fill(0.0));
            let backward = Backward { slope, gradients: part };
            workspaces.with(|workspace| workspace.accumulate(self, span, temperature, backward))
        };
        let stats: Vec<Vec<TokenStats>> = spans.par_iter().zip(&mut *parts).with_max_len(1).map(one).collect();
        whole.par_iter_mut().enumerate().for_each(|(i, sum)| {
            for part in &*parts {
                sum.iter_mut().zip(&*part[i]).for_each(|(sum, part)| *sum += part);
            }
        });
        stats.concat()
    }

    fn spans(&self, batch: &Packed, targets: &[Target]) -> Vec<Span> {
        batch.spans(targets, if self.fits_a_cores_cache() { SPAN_TOKENS } else { usize::MAX })
    }
}
