//! Runs the LM head on the rows that predict a target, one chunk at a time, so that the logits of all rows never exist at once.
//!
//! Between the softmax and the backward pass of a chunk, the host computes slopes from log-probabilities. The round trip takes about ten
//! microseconds per chunk; computing the logits a second time instead would cost a third of the head's products.

use std::sync::Arc;

use super::backward::{BackwardPass, segments};
use super::forward::ForwardPass;
use super::gradients::DeviceGradients;
use crate::error::Result;
use crate::gpu::driver::{Driver, Matrix};
use crate::gpu::kernels::{self, ColumnSum, LogitChunk, NormBackward, NormGradient, input_gradient, weight_gradient};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer};
use crate::model::{Slope, Target, TokenSlope, TokenStats};
use crate::numbers::dtype::Dtype;

/// The LM head, with its buffers.
pub struct LmHead {
    driver: Arc<dyn Driver>,
    /// Rows per chunk of logits.
    chunk: usize,
    logits: Buffer<f32>,
    stats: Buffer<f32>,
}

/// The targets of a batch on the device.
pub(super) struct Targets {
    rows: Buffer<u32>,
    tokens: Buffer<u32>,
    /// Hidden states after the final norm, `(N, D)`.
    hidden: DynBuffer,
}

/// How a loss is differentiated, and where its gradients go.
pub(super) struct LmHeadGradients<'a> {
    pub slope: Slope<'a>,
    pub gradients: &'a DeviceGradients,
    pub backward: &'a BackwardPass,
    /// T, the number of packed rows.
    pub rows: usize,
}

impl LmHead {
    /// Allocates logits for as many rows as fit into `bytes`, and at least one.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory.
    pub fn new(forward: &ForwardPass, bytes: usize) -> Result<Self> {
        let (driver, stride) = (Arc::clone(&forward.driver), kernels::stride(&forward.shape));
        let chunk = (bytes / (4 * stride)).max(1);
        let (logits, stats) = (Buffer::new(&driver, chunk * stride)?, Buffer::new(&driver, 4 * chunk)?);
        Ok(Self { driver, chunk, logits, stats })
    }

    /// Returns log-probability and entropy of each target, after the forward pass of its batch. With `learning`, it also adds the head's
    /// gradient and writes that of the residual stream. The flag says whether any target had a slope other than 0.
    pub(super) fn run(
        &self,
        forward: &ForwardPass,
        weights: &DeviceWeights,
        (targets, temperature): (&[Target], f32),
        learning: Option<&LmHeadGradients<'_>>,
    ) -> Result<(Vec<TokenStats>, bool)> {
        let (mut all, mut learned) = (Vec::with_capacity(targets.len()), false);
        if targets.is_empty() {
            return Ok((all, learned));
        }
        let on_device = self.pick(forward, weights, targets)?;
        let d_hidden =
            learning.map(|_| Buffer::zeros(&self.driver, targets.len() * forward.shape.width)).transpose()?;
        // Chunks of nearly equal size, because a short last chunk would be slow.
        let size = targets.len().div_ceil(targets.len().div_ceil(self.chunk));
        for from in (0..targets.len()).step_by(size) {
            let rows = size.min(targets.len() - from);
            let tokens = on_device.tokens.at(from);
            let chunk = LogitChunk { logits: &self.logits, tokens, stats: &self.stats, rows, temperature };
            self.softmax(forward, weights, &on_device, (from, chunk), &mut all)?;
            let (Some(learning), Some(d_hidden)) = (learning, &d_hidden) else { continue };
            let of = |(i, stats): (usize, &TokenStats)| (learning.slope)(from + i, stats.logprob);
            let slopes: Vec<TokenSlope> = all[from..].iter().enumerate().map(of).collect();
            if slopes.iter().all(|slope| *slope == TokenSlope::default()) {
                continue; // groups without a signal skip the head's backward pass
            }
            learned = true;
            let to = (d_hidden, learning.gradients);
            self.backward(forward, weights, (&on_device.hidden, from, chunk), &slopes, to)?;
        }
        if let (true, Some(learning), Some(d_hidden)) = (learned, learning, d_hidden) {
            self.to_stream(forward, weights, (targets, &on_device.rows), &d_hidden, learning)?;
        }
        Ok((all, learned))
    }

    fn pick(&self, forward: &ForwardPass, weights: &DeviceWeights, targets: &[Target]) -> Result<Targets> {
        let column = |of: &dyn Fn(&Target) -> u32| {
            let numbers: Vec<u32> = targets.iter().map(of).collect();
            Buffer::from_slice(&self.driver, &numbers)
        };
        let rows = column(&|target| target.row as u32)?;
        let hidden = DynBuffer::new(&self.driver, forward.dtype, targets.len() * forward.shape.width)?;
        forward.hidden(weights, &rows, &hidden)?;
        Ok(Targets { rows, tokens: column(&|target| target.token)?, hidden })
    }

    fn softmax(
        &self,
        forward: &ForwardPass,
        weights: &DeviceWeights,
        targets: &Targets,
        (from, chunk): (usize, LogitChunk<'_>),
        all: &mut Vec<TokenStats>,
    ) -> Result<()> {
        let (shape, d) = (&forward.shape, forward.shape.width);
        let logits = Matrix { at: self.logits.at(0), stride: kernels::stride(shape), dtype: Dtype::F32 };
        let size = [chunk.rows, shape.vocabulary, d];
        let head = forward.weight(weights.head(), d);
        kernels::linear(&*self.driver, targets.hidden.matrix(from * d, d), head, logits, size)?;
        kernels::head_stats(&*self.driver, chunk, shape)?;
        let mut stats = vec![0.0; 4 * chunk.rows];
        self.stats.download(0, &mut stats)?;
        all.extend(stats.as_chunks::<4>().0.iter().map(|row| TokenStats { logprob: row[0], entropy: row[1] }));
        Ok(())
    }

    fn backward(
        &self,
        forward: &ForwardPass,
        weights: &DeviceWeights,
        (hidden, from, chunk): (&DynBuffer, usize, LogitChunk<'_>),
        slopes: &[TokenSlope],
        (d_hidden, gradients): (&Buffer<f32>, &DeviceGradients),
    ) -> Result<()> {
        let (driver, shape, dtype, d) = (&*self.driver, &forward.shape, forward.dtype, forward.shape.width);
        let slopes: Vec<f32> = slopes.iter().flat_map(|slope| [slope.logprob, slope.entropy]).collect();
        let slopes = Buffer::from_slice(&self.driver, &slopes)?;
        kernels::head_backward(driver, chunk, slopes.at(0), (shape, dtype))?;
        let stride = kernels::stride(shape) * 4 / dtype.size();
        let d_logits = Matrix { at: self.logits.at(0), stride, dtype };
        let size = [chunk.rows, shape.vocabulary, d];
        let to = Matrix { at: d_hidden.at(from * d), stride: d, dtype: Dtype::F32 };
        input_gradient(driver, d_logits, forward.weight(weights.head(), d), to, size)?;
        let Some(to) = gradients.head() else { return Ok(()) };
        weight_gradient(driver, d_logits, hidden.matrix(from * d, d), to, size)
    }

    /// Runs the final norm backward, and adds the result up per row of the residual stream.
    fn to_stream(
        &self,
        forward: &ForwardPass,
        weights: &DeviceWeights,
        (targets, rows): (&[Target], &Buffer<u32>),
        d_hidden: &Buffer<f32>,
        learning: &LmHeadGradients<'_>,
    ) -> Result<()> {
        let (shape, backward) = (&forward.shape, learning.backward);
        let norm = NormBackward {
            x: &forward.buffers().x_out,
            index: Some(rows),
            weight: weights.final_norm(),
            d_weight: ColumnSum { partial: &backward.partial, to: learning.gradients.final_norm() },
        };
        let of = (shape, forward.dtype);
        kernels::norm_backward(&*self.driver, &norm, (d_hidden, targets.len()), NormGradient::Place, of)?;
        let keys: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let by_row = segments(&self.driver, &keys, Some(learning.rows))?;
        kernels::scatter_rows(&*self.driver, d_hidden, &by_row, (&backward.dx, &backward.d), shape)
    }
}
