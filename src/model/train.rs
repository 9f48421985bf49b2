//! Log-probabilities of a batch's targets, and the gradient of a loss over them.
//!
//! While the weights fit in a core's own cache a batch is cut into slices, and threads share out the slices. The cuts depend on the
//! batch alone, and the slices' gradients are added in order, so the sums are the same bits on any number of threads. A larger model
//! runs a batch as one slice, and threads share out each product.

use std::ops::Deref;
use std::sync::Mutex;

use rayon::prelude::*;

use super::Model;
use super::matmul::StartFrom;
use super::batch::{BatchSlice, Packed, Slope, Target, TokenStats};
use super::slice_pass::{LossGradient, Workspace};
use crate::numbers::aligned::AlignedVec;

/// A gradient per parameter, in the order of [`Model::trained`]; and the memory that computing them takes, kept from batch to batch.
pub struct Gradients(pub Vec<GradientSum>, Memory);

/// The gradient of a parameter, a sum over batches. What begins it overwrites it: to set all gradients of a large model to zero first, and to
/// read them again, would take a tenth of a step.
pub struct GradientSum {
    values: AlignedVec<f32>,
    has_begun: bool,
}

impl GradientSum {
    fn new(len: usize) -> Self {
        Self { values: AlignedVec::zeros(len), has_begun: false }
    }

    /// The sum, to be added to; zeros if it has not begun.
    pub(super) fn begun(&mut self) -> &mut [f32] {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.values.fill(0.0);
        }
        &mut self.values
    }

    /// The numbers of the sum, and what to start from to add all of them: its numbers mean nothing before it has begun.
    pub(super) fn next(&mut self) -> (StartFrom<'static>, &mut [f32]) {
        let has_begun = std::mem::replace(&mut self.has_begun, true);
        (if has_begun { StartFrom::Add } else { StartFrom::Zero }, &mut self.values)
    }
}

impl Deref for GradientSum {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        assert!(self.has_begun, "`Gradients::settle` begins all");
        &self.values
    }
}

#[derive(Default)]
struct Memory {
    workspaces: Workspaces,
    /// Gradients of each slice.
    parts: Vec<Vec<GradientSum>>,
}

impl Gradients {
    /// Sums that have not begun, in the shapes of what a model trains.
    #[must_use]
    pub fn new(model: &Model) -> Self {
        Self(buffers(model), Memory::default())
    }

    /// Begins all sums anew and keeps the memory.
    pub fn clear(&mut self) {
        clear(&mut self.0);
    }

    /// Sets those to zero that nothing was added to.
    pub fn settle(&mut self) {
        self.0.par_iter_mut().for_each(|gradient| {
            gradient.begun();
        });
    }
}

fn clear(gradients: &mut [GradientSum]) {
    gradients.iter_mut().for_each(|gradient| gradient.has_begun = false);
}

fn buffers(model: &Model) -> Vec<GradientSum> {
    model.trained().iter().map(|(_, shape)| GradientSum::new(shape.iter().product())).collect()
}

/// One per thread that worked at the same time as others.
#[derive(Default)]
struct Workspaces(Mutex<Vec<Workspace>>);

impl Workspaces {
    fn with<T>(&self, work: impl FnOnce(&mut Workspace) -> T) -> T {
        let free = || self.0.lock().expect("no thread panics while it holds the lock");
        let mut workspace = free().pop().unwrap_or_default();
        let done = work(&mut workspace);
        free().push(workspace);
        done
    }
}

/// Tokens of a slice: enough for products at full speed, few enough that every thread gets several slices of a batch.
const SLICE_TOKENS: usize = 512;

impl Model {
    /// Log-probabilities and entropies of `targets` at a temperature; keeps nothing for a backward.
    #[must_use]
    pub fn logprobs(&self, batch: &Packed, targets: &[Target], temperature: f32) -> Vec<TokenStats> {
        batch.check(targets, self);
        let workspaces = Workspaces::default();
        let one = |slice: &BatchSlice| workspaces.with(|workspace| workspace.forward(self, slice, temperature));
        self.slices(batch, targets).par_iter().with_max_len(1).map(one).collect::<Vec<_>>().concat()
    }

    /// Returns what [`Model::logprobs`] does, and adds to `gradients` those of a loss given by its derivative with respect to each
    /// log-probability: `slope(i, logprob)` is that of the loss at `targets[i]`.
    pub fn accumulate_gradients(
        &self,
        batch: &Packed,
        targets: &[Target],
        temperature: f32,
        gradients: &mut Gradients,
        slope: Slope<'_>,
    ) -> Vec<TokenStats> {
        batch.check(targets, self);
        let Gradients(whole, Memory { workspaces, parts }) = gradients;
        let slices = self.slices(batch, targets);
        if let [slice] = &slices[..] {
            let loss = LossGradient { slope, gradients: whole };
            return workspaces.with(|workspace| workspace.forward_backward(self, slice, temperature, loss));
        }
        if parts.len() < slices.len() {
            parts.resize_with(slices.len(), || buffers(self));
        }
        let parts = &mut parts[..slices.len()];
        let one = |(slice, part): (&BatchSlice, &mut Vec<GradientSum>)| {
            clear(part);
            let loss = LossGradient { slope, gradients: part };
            workspaces.with(|workspace| workspace.forward_backward(self, slice, temperature, loss))
        };
        let stats: Vec<Vec<TokenStats>> = slices.par_iter().zip(&mut *parts).with_max_len(1).map(one).collect();
        whole.par_iter_mut().enumerate().for_each(|(i, sum)| {
            let sum = sum.begun();
            for part in parts.iter().map(|part| &part[i]).filter(|part| part.has_begun) {
                sum.iter_mut().zip(&**part).for_each(|(sum, part)| *sum += part);
            }
        });
        stats.concat()
    }

    fn slices(&self, batch: &Packed, targets: &[Target]) -> Vec<BatchSlice> {
        batch.slices(targets, if self.fits_a_cores_cache() { SLICE_TOKENS } else { usize::MAX })
    }
}
