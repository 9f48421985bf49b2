//! Wrappers of `packed.cu`: what lies between the matrix products of the forward pass over packed rows.

use super::{ModelShape, RopeTable, launch_rows};
use crate::error::Result;
use crate::gpu::driver::{Address, Driver};
use crate::gpu::packed::PackedBatch;
use crate::gpu::{Buffer, DynBuffer};
use crate::numbers::dtype::Dtype;

/// `x (T, D)` = rows of the embedding `table`.
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

/// What a norm reads.
#[derive(Clone, Copy)]
pub enum NormInput<'a> {
    /// Row by row.
    Rows(&'a Buffer<f32>),
    /// The rows of the first that the second names.
    Picked(&'a Buffer<f32>, &'a Buffer<u32>),
    /// The sum of the first two, which goes to the third; that may be the first.
    Sum(&'a Buffer<f32>, &'a Buffer<f32>, &'a Buffer<f32>),
}

/// `normed (count, D)` = norm of `from` with `weight (D)`.
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

/// `qkv` = `raw` + `bias`, queries and keys turned by the angles of their positions.
pub fn bias_rope(
    driver: &dyn Driver,
    batch: &PackedBatch,
    (raw, bias, rope): (&Buffer<f32>, Address, RopeTable),
    qkv: &DynBuffer,
    shape: &ModelShape,
) -> Result<()> {
    assert!(raw.len().min(qkv.len()) >= batch.rows * shape.qkv());
    let arguments = [
        raw.at(0).into(),
        bias.into(),
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

/// `act (T, F)` = silu(gate) * up, of `gate_up (T, 2 F)`.
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
