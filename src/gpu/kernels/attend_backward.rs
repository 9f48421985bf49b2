//! Wrapper of `attend_backward.cu`: the gradients of queries, keys and values.

use super::attend::launch_attention;
use super::{ModelShape, RopeTable, launch_rows};
use crate::error::Result;
use crate::gpu::driver::Driver;
use crate::gpu::packed::PackedBatch;
use crate::gpu::{Buffer, DynBuffer};

/// What the forward pass of attention saved, and the gradient of its output.
#[derive(Clone, Copy)]
pub struct SavedAttention<'a> {
    /// `(T, (H + 2 K) E)` after rope.
    pub qkv: &'a DynBuffer,
    /// `(T, H E)`.
    pub out: &'a DynBuffer,
    /// `(T, H)`.
    pub log_sum: &'a Buffer<f32>,
    /// `(T, H E)`.
    pub d_out: &'a DynBuffer,
}

/// Where the gradients of queries, keys and values go, and buffers for computing them.
#[derive(Clone, Copy)]
pub struct AttentionGradients<'a> {
    /// `(T, (H + 2 K) E)`, before rope.
    pub d_qkv: &'a DynBuffer,
    /// The sum of `d_out * out` over each head, `(T, H)`.
    pub along: &'a Buffer<f32>,
    /// Gradients of keys and values, once per sequence that reads them, `(entries, 2 K E)`.
    pub partial: &'a Buffer<f32>,
}

/// Backward of [`super::attend()`], and of the rotary embedding before it.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn attend_backward(
    driver: &dyn Driver,
    batch: &PackedBatch,
    kept: SavedAttention<'_>,
    to: AttentionGradients<'_>,
    (shape, rope): (&ModelShape, RopeTable),
) -> Result<()> {
    let (dtype, out) = (kept.qkv.dtype(), batch.rows * shape.heads * shape.dim);
    let width = 2 * shape.kv_heads * shape.dim;
    assert!(kept.qkv.len().min(to.d_qkv.len()) >= batch.rows * shape.qkv());
    assert!(kept.out.len().min(kept.d_out.len()) >= out && to.partial.len() >= batch.entries * width);
    assert!(kept.log_sum.len().min(to.along.len()) >= batch.rows * shape.heads);
    let queries = [
        kept.qkv.at(0).into(),
        kept.out.at(0).into(),
        kept.d_out.at(0).into(),
        kept.log_sum.at(0).into(),
        batch.sequences().into(),
        batch.query_tile().into(),
        rope.table.into(),
        rope.positions.into(),
        to.d_qkv.at(0).into(),
        to.along.at(0).into(),
        shape.kv_heads.into(),
        shape.scale().into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_attention(driver, shape, ("attend_queries", dtype), [batch.query_tiles, shape.heads], &queries) }?;
    let keys = [
        kept.qkv.at(0).into(),
        kept.d_out.at(0).into(),
        kept.log_sum.at(0).into(),
        to.along.at(0).into(),
        batch.sequences().into(),
        batch.key_tile().into(),
        rope.table.into(),
        rope.positions.into(),
        to.partial.at(0).into(),
        shape.heads.into(),
        shape.scale().into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_attention(driver, shape, ("attend_keys", dtype), [batch.key_tiles, shape.kv_heads], &keys) }?;
    let join = [
        to.partial.at(0).into(),
        batch.sequences().into(),
        batch.owners().into(),
        batch.positions().into(),
        to.d_qkv.at(0).into(),
        width.into(),
        shape.qkv().into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("join_keys", dtype), [batch.rows, 128], &join) }
}
