//! Wrappers of `head.cu`: the softmax over some rows of logits, and its backward.

use super::{ModelShape, launch_rows, to_u32};
use crate::error::Result;
use crate::gpu::Buffer;
use crate::gpu::driver::{Address, Driver, Grid};
use crate::numbers::dtype::Dtype;

/// Some rows of logits, with their tokens and statistics.
#[derive(Clone, Copy)]
pub struct LogitChunk<'a> {
    /// `(rows, stride)`.
    pub logits: &'a Buffer<f32>,
    /// The target token of each row, `(rows)`.
    pub tokens: Address,
    /// `(rows, 4)`: log-probability, entropy, and two numbers for the backward pass.
    pub stats: &'a Buffer<f32>,
    /// How many rows.
    pub rows: usize,
    /// Divides the logits.
    pub temperature: f32,
}

/// Distance from one row of logits to the next (numbers), rounded up to whole packs of the products' type.
#[must_use]
pub fn stride(shape: &ModelShape) -> usize {
    shape.vocabulary.next_multiple_of(8)
}

/// Computes log-probability and entropy of each row.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn head_stats(driver: &dyn Driver, chunk: LogitChunk<'_>, shape: &ModelShape) -> Result<()> {
    let LogitChunk { logits, tokens, stats, rows, temperature } = chunk;
    assert!(logits.len() >= rows * stride(shape) && stats.len() >= 4 * rows);
    let arguments = [
        logits.at(0).into(),
        tokens.into(),
        stats.at(0).into(),
        shape.vocabulary.into(),
        stride(shape).into(),
        (1.0 / temperature).into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe {
        driver.launch(
            "head_stats",
            Grid { blocks: [to_u32(rows), 1, 1], threads: 256, shared: 0, early: false },
            &arguments,
        )
    }
}

/// Replaces the logits by their gradient in `dtype`, which products read, from `slopes` `(rows, 2)`: dLoss / dlogprob and dLoss / dentropy.
/// Each row of it lies at the start of the row's memory.
///
/// # Errors
/// As [`head_stats`].
pub fn head_backward(
    driver: &dyn Driver,
    chunk: LogitChunk<'_>,
    slopes: Address,
    (shape, dtype): (&ModelShape, Dtype),
) -> Result<()> {
    assert!(chunk.logits.len() >= chunk.rows * stride(shape) && chunk.stats.len() >= 4 * chunk.rows);
    let arguments = [
        chunk.logits.at(0).into(),
        chunk.tokens.into(),
        chunk.stats.at(0).into(),
        slopes.into(),
        shape.vocabulary.into(),
        stride(shape).into(),
        (1.0 / chunk.temperature).into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("head_backward", dtype), [chunk.rows, 512], &arguments) }
}
