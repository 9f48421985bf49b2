//! Wrapper of `attend.cu`: causal attention in packed sequences.

use super::{ModelShape, to_u32};
use crate::error::Result;
use crate::gpu::driver::{Argument, Driver, Grid};
use crate::gpu::packed::PackedBatch;
use crate::gpu::{Buffer, DynBuffer};
use crate::numbers::dtype::Dtype;

/// Causal attention in each sequence and over its prefix. Writes `out (T, H E)` and `log_sum (T, H)`.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn attend(
    driver: &dyn Driver,
    batch: &PackedBatch,
    qkv: &DynBuffer,
    (out, log_sum): (&DynBuffer, &Buffer<f32>),
    shape: &ModelShape,
) -> Result<()> {
    assert!(qkv.len() >= batch.rows * shape.qkv() && out.len() >= batch.rows * shape.heads * shape.dim);
    assert!(log_sum.len() >= batch.rows * shape.heads && out.dtype() == qkv.dtype());
    let arguments = [
        qkv.at(0).into(),
        batch.sequences().into(),
        batch.query_tile().into(),
        out.at(0).into(),
        log_sum.at(0).into(),
        shape.kv_heads.into(),
        shape.scale().into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_attention(driver, shape, ("attend", qkv.dtype()), [batch.query_tiles, shape.heads], &arguments) }
}

/// Launches one block of an attention kernel per tile and head.
///
/// # Safety
/// As for [`Driver::launch`].
pub(super) unsafe fn launch_attention(
    driver: &dyn Driver,
    shape: &ModelShape,
    (name, dtype): (&str, Dtype),
    [tiles, heads]: [usize; 2],
    arguments: &[Argument],
) -> Result<()> {
    let threads = 32 * shape.attention_warps(dtype) as u32;
    let grid = Grid { blocks: [to_u32(tiles), to_u32(heads), 1], threads, shared: 0, early: false };
    // SAFETY: the caller's promise.
    unsafe { driver.launch(&format!("{name}_{dtype}_{}", shape.dim), grid, arguments) }
}
