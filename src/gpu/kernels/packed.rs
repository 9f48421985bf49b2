//! Wrappers of `packed.cu`: the forward pass over packed rows, between its matrix products.

use super::{ModelShape, RopeTable, launch_rows};
use crate::error::Result;
use crate::gpu::driver::{Address, Driver};
use crate::gpu::packed::PackedBatch;
use crate::gpu::{Buffer, DynBuffer};
use crate::numbers::dtype::Dtype;

/// `x (T, D)` = the rows of the embedding `table` that the batch's tokens select.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn embed(
    driver: &dyn Driver,
    batch: &PackedBatch,
    (table, dtype): (Address, Dtype),
    x: &Buffer<f32>,
    shape: &ModelShape,
) -> Result<()> {
    assert!(x.len() >= batch.rows * shape.width);
    let arguments = [batch.tokens().into(), table.into(), x.at(0).into(), shape.width.into()];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("embed", dtype), [batch.rows, 128], &arguments) }
}

/// The input of a norm.
#[derive(Clone, Copy)]
pub enum NormInput<'a> {
    /// All rows, in order.
    Rows(&'a Buffer<f32>),
    /// The rows of the first buffer whose indices are in the second.
    Picked(&'a Buffer<f32>, &'a Buffer<u32>),
    /// The sum of the first two buffers. It is also written to the third, which may be the first.
    Sum(&'a Buffer<f32>, &'a Buffer<f32>, &'a Buffer<f32>),
}

/// `normed (count, D)` = RMS norm of `from` with `weight (D)`.
///
/// # Errors
/// As [`embed`].
pub fn norm_rows(
    driver: &dyn Driver,
    from: NormInput<'_>,
    weight: Address,
    (normed, count): (&DynBuffer, usize),
    shape: &ModelShape,
) -> Result<()> {
    let numbers = count * shape.width;
    let (x, index, added, sums) = match from {
        NormInput::Rows(x) => (x, Address::NULL, Address::NULL, Address::NULL),
        NormInput::Picked(x, index) => {
            assert!(index.len() >= count);
            (x, index.at(0), Address::NULL, Address::NULL)
        }
        NormInput::Sum(x, added, sums) => {
            assert!(x.len().min(added.len()).min(sums.len()) >= numbers);
            (x, Address::NULL, added.at(0), sums.at(0))
        }
    };
    assert!(normed.len() >= numbers && (index != Address::NULL || x.len() >= numbers));
    let arguments = [
        x.at(0).into(),
        index.into(),
        added.into(),
        sums.into(),
        weight.into(),
        normed.at(0).into(),
        count.into(),
        shape.width.into(),
        shape.epsilon.into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("norm_rows", normed.dtype()), [count.div_ceil(4), 128], &arguments) }
}

/// `qkv` = `raw` + `bias`, or `raw` without one, with rotary embedding of queries and keys; both `(T, (H + 2 K) E)`.
///
/// # Errors
/// As [`embed`].
pub fn bias_rope(
    driver: &dyn Driver,
    batch: &PackedBatch,
    (raw, bias, rope): (&Buffer<f32>, Option<Address>, RopeTable),
    qkv: &DynBuffer,
    shape: &ModelShape,
) -> Result<()> {
    assert!(raw.len().min(qkv.len()) >= batch.rows * shape.qkv());
    let arguments = [
        raw.at(0).into(),
        bias.unwrap_or(Address(0)).into(),
        rope.table.into(),
        batch.positions().into(),
        qkv.at(0).into(),
        rope.positions.into(),
        (shape.heads + shape.kv_heads).into(),
        (shape.heads + 2 * shape.kv_heads).into(),
        shape.dim.into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("bias_rope", qkv.dtype()), [batch.rows, 128], &arguments) }
}

/// `act (T, F)` = silu(gate) * up, with `gate_up (T, 2 F)`.
///
/// # Errors
/// As [`embed`].
pub fn swiglu(
    driver: &dyn Driver,
    count: usize,
    gate_up: &DynBuffer,
    act: &DynBuffer,
    shape: &ModelShape,
) -> Result<()> {
    assert!(gate_up.len() >= 2 * count * shape.mlp && act.len() >= count * shape.mlp && act.dtype() == gate_up.dtype());
    let arguments = [gate_up.at(0).into(), act.at(0).into(), shape.mlp.into()];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("swiglu", act.dtype()), [count, 256], &arguments) }
}
