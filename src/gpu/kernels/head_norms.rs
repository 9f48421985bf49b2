//! Wrappers of `head_norms.cu`: the norms of heads of queries and keys, as Qwen3 has them.

use super::packed_backward::line;
use super::{BLOCKS, ColumnSum, ModelShape, RopeTable, to_u32};
use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Grid};
use crate::gpu::packed::PackedBatch;
use crate::gpu::{Buffer, DynBuffer};

/// Warps per block of `norm_heads_backward`.
const WARPS: usize = 8;

/// `qkv (T, (H + 2 K) E)` = `raw`, with heads of queries and keys normalised by `weight (2 E)`, then rotated; `qk (T, (H + K) E)` = queries
/// and keys before that.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn norm_rope(
    driver: &dyn Driver,
    batch: &PackedBatch,
    (raw, weight, rope): (&Buffer<f32>, Address, RopeTable),
    (qk, qkv): (&DynBuffer, &DynBuffer),
    shape: &ModelShape,
) -> Result<()> {
    assert!(raw.len().min(qkv.len()) >= batch.rows * shape.qkv() && qk.len() >= batch.rows * shape.normed_qk);
    if batch.rows == 0 {
        return Ok(());
    }
    let arguments = [
        raw.at(0).into(),
        weight.into(),
        rope.table.into(),
        batch.positions().into(),
        qk.at(0).into(),
        qkv.at(0).into(),
        rope.positions.into(),
        shape.heads.into(),
        shape.kv_heads.into(),
        shape.dim.into(),
        shape.epsilon.into(),
    ];
    let heads = shape.heads + 2 * shape.kv_heads;
    let blocks = [to_u32(batch.rows), to_u32(heads.div_ceil(4)), 1];
    let grid = Grid { blocks, threads: 128, shared: 0, early: false };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("norm_rope_{}", qkv.dtype()), grid, &arguments) }
}

/// Backward of the norm of [`norm_rope`]: replaces the gradients of queries and keys in `d_qkv (T, (H + 2 K) E)`, which are those before rope,
/// by the gradients of `qk (T, (H + K) E)`, and adds to that of the weight, `(2 E)`.
///
/// # Errors
/// As [`norm_rope`].
pub fn norm_heads_backward(
    driver: &dyn Driver,
    rows: usize,
    (qk, weight): (&DynBuffer, Address),
    d_qkv: &DynBuffer,
    d_weight: ColumnSum<'_>,
    shape: &ModelShape,
) -> Result<()> {
    let (units, width) = (rows * (shape.heads + shape.kv_heads), 2 * shape.dim);
    let blocks = units.div_ceil(WARPS).min(BLOCKS);
    assert!(qk.len() >= rows * shape.normed_qk && d_qkv.len() >= rows * shape.qkv() && qk.dtype() == d_qkv.dtype());
    assert!(d_weight.partial.len() >= blocks * width);
    let arguments = [
        qk.at(0).into(),
        weight.into(),
        d_qkv.at(0).into(),
        d_weight.partial.at(0).into(),
        rows.into(),
        shape.heads.into(),
        shape.kv_heads.into(),
        shape.dim.into(),
        shape.epsilon.into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe {
        driver.launch(&format!("norm_heads_backward_{}", qk.dtype()), line(blocks, 32 * WARPS as u32), &arguments)
    }?;
    d_weight.finish(driver, blocks, width)
}
