//! Log-probabilities of a batch's targets, and the gradient of a loss over them.
//!
//! While the weights fit in a core's own cache a batch is cut into slices, and threads share out the slices. The cuts depend on the
//! batch alone, and the slices' gradients are added in order, so the sums are the same bits on any number of threads. A larger model
//! runs a batch as one slice, and threads share out each product.

use std::sync::Mutex;

use rayon::prelude::*;

use super::Model;
use super::batch::{BatchSlice, Packed, Slope, Target, TokenStats};
use super::slice_pass::{LossGradient, Workspace};
use crate::numbers::aligned::AlignedVec;

/// A buffer per parameter, in the order of [`Model::trained`]; and the memory that filling them takes, kept from batch to batch.
pub struct Gradients(pub Vec<AlignedVec<f32>>, Memory);

#[derive(Default)]
struct Memory {
    workspaces: Workspaces,
    /// Gradients of each slice.
    parts: Vec<Vec<AlignedVec<f32>>>,
}

impl Gradients {
    /// All zero, in the shapes of what a model trains.
    #[must_use]
    pub fn zeros(model: &Model) -> Self {
        Self(buffers(model), Memory::default())
    }

    /// Sets them to zero and keeps the memory.
    pub fn clear(&mut self) {
        self.0.par_iter_mut().for_each(|gradient| gradient.fill(0.0));
    }
}

fn buffers(model: &Model) -> Vec<AlignedVec<f32>> {
    model.trained().iter().map(|(_, shape)| AlignedVec::zeros(shape.iter().product())).collect()
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
        let one = |(slice, part): (&BatchSlice, &mut Vec<AlignedVec<f32>>)| {
            part.iter_mut().for_each(|gradient| gradient.fill(0.0));
            let loss = LossGradient { slope, gradients: part };
            workspaces.with(|workspace| workspace.forward_backward(self, slice, temperature, loss))
        };
        let stats: Vec<Vec<TokenStats>> = slices.par_iter().zip(&mut *parts).with_max_len(1).map(one).collect();
        whole.par_iter_mut().enumerate().for_each(|(i, sum)| {
            for part in &*parts {
                sum.iter_mut().zip(&*part[i]).for_each(|(sum, part)| *sum += part);
            }
        });
        stats.concat()
    }

    fn slices(&self, batch: &Packed, targets: &[Target]) -> Vec<BatchSlice> {
        batch.slices(targets, if self.fits_a_cores_cache() { SLICE_TOKENS } else { usize::MAX })
    }
}
