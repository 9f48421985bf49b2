//! Wrappers of `packed_backward.cu`: the backward pass over packed rows, between its matrix products.

use super::{ModelShape, launch_rows, to_u32};
use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Grid};
use crate::gpu::{Buffer, DynBuffer};
use crate::numbers::dtype::Dtype;

/// Most blocks that share the rows of a sum over all rows.
pub const BLOCKS: usize = 512;

/// Warps per block of `norm_backward`, each with one row at a time, and the shared memory for their sums (bytes): as much as a block
/// may have on every GPU.
const WARPS: usize = 8;
const SHARED: usize = 48 << 10;

/// A sum over rows: a buffer for the partial sums of [`BLOCKS`] blocks, and where the total is added.
#[derive(Clone, Copy)]
pub struct ColumnSum<'a> {
    /// `(BLOCKS, width)`.
    pub partial: &'a Buffer<f32>,
    /// `(width)`.
    pub to: Address,
}

impl ColumnSum<'_> {
    /// Adds up the partial sums.
    pub(super) fn finish(&self, driver: &dyn Driver, blocks: usize, width: usize) -> Result<()> {
        let arguments = [self.partial.at(0).into(), self.to.into(), blocks.into(), width.into()];
        // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
        unsafe { driver.launch("add_columns", line(width.div_ceil(32), 256), &arguments) }
    }
}

pub(super) fn line(blocks: usize, threads: u32) -> Grid {
    Grid { blocks: [to_u32(blocks), 1, 1], threads, shared: 0, early: false }
}

/// A norm to differentiate.
pub struct NormBackward<'a> {
    /// Its input, `(.., D)`.
    pub x: &'a Buffer<f32>,
    /// The row of `x` that each row was computed from, if it is not the row of the same index.
    pub index: Option<&'a Buffer<u32>>,
    /// The weight, `(D)`.
    pub weight: Address,
    /// The gradient of the weight, `(D)`.
    pub d_weight: ColumnSum<'a>,
}

/// Where the gradient with respect to a norm's input goes.
#[derive(Clone, Copy)]
pub enum NormGradient<'a> {
    /// It is added to the first buffer, `(T, D)`, and the sum is rounded into the second, which products read.
    Added(&'a Buffer<f32>, &'a DynBuffer),
    /// It replaces the gradient with respect to the norm's output.
    Place,
}

/// Backward of [`super::norm_rows`] from `d_normed (count, D)`.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn norm_backward(
    driver: &dyn Driver,
    norm: &NormBackward<'_>,
    (d_normed, count): (&Buffer<f32>, usize),
    into: NormGradient<'_>,
    (shape, dtype): (&ModelShape, Dtype),
) -> Result<()> {
    let numbers = count * shape.width;
    let warps = (SHARED / (4 * shape.width)).clamp(1, WARPS);
    let blocks = count.div_ceil(warps).min(BLOCKS);
    let (dx, d, fresh) = match into {
        NormGradient::Added(dx, d) => {
            assert!(dx.len().min(d.len()) >= numbers && d.dtype() == dtype);
            (dx, d.at(0), 0usize)
        }
        NormGradient::Place => (d_normed, Address(0), 1),
    };
    assert!(d_normed.len() >= numbers && norm.d_weight.partial.len() >= blocks * shape.width);
    assert!(norm.index.map_or(norm.x.len() >= numbers, |index| index.len() >= count));
    let arguments = [
        d_normed.at(0).into(),
        norm.x.at(0).into(),
        norm.index.map_or(Address(0), |index| index.at(0)).into(),
        norm.weight.into(),
        dx.at(0).into(),
        d.into(),
        norm.d_weight.partial.at(0).into(),
        count.into(),
        shape.width.into(),
        shape.epsilon.into(),
        fresh.into(),
        warps.into(),
    ];
    let grid = Grid { shared: to_u32(4 * warps * shape.width), ..line(blocks, 32 * WARPS as u32) };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("norm_backward_{}", dtype.name()), grid, &arguments) }?;
    norm.d_weight.finish(driver, blocks, shape.width)
}

/// Adds the column sums of `x (rows, width)` to `sum`.
///
/// # Errors
/// As [`norm_backward`].
pub fn column_sums(driver: &dyn Driver, x: &DynBuffer, [rows, width]: [usize; 2], sum: ColumnSum<'_>) -> Result<()> {
    let blocks = rows.min(BLOCKS);
    assert!(x.len() >= rows * width && sum.partial.len() >= blocks * width);
    let arguments = [x.at(0).into(), sum.partial.at(0).into(), rows.into(), width.into()];
    let grid = Grid { blocks: [to_u32(width.div_ceil(128)), to_u32(blocks), 1], threads: 128, shared: 0, early: false };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("column_sums_{}", x.dtype().name()), grid, &arguments) }?;
    sum.finish(driver, blocks, width)
}

/// Backward of [`super::swiglu`]. Replaces `gate_up (T, 2 F)` by its gradient, and `act (T, F)`, which holds its own gradient, by the
/// activation.
///
/// # Errors
/// As [`norm_backward`].
pub fn swiglu_backward(
    driver: &dyn Driver,
    count: usize,
    gate_up: &DynBuffer,
    act: &DynBuffer,
    shape: &ModelShape,
) -> Result<()> {
    assert!(gate_up.len() >= 2 * count * shape.mlp && act.len() >= count * shape.mlp && act.dtype() == gate_up.dtype());
    let arguments = [gate_up.at(0).into(), act.at(0).into(), shape.mlp.into()];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("swiglu_backward", act.dtype()), [count, 256], &arguments) }
}

/// Which rows are added up: rows `order[from[i]..from[i + 1]]` of the source are added to row `to[i]` of the target.
pub struct RowSegments {
    /// Rows of the source.
    pub order: Buffer<u32>,
    /// Where each segment starts in `order`, and the end of the last.
    pub from: Buffer<u32>,
    /// Rows of the target; empty if segment i belongs to row i.
    pub to: Buffer<u32>,
}

/// `sums (.., D)` += rows of `x (T, D)`, as `segments` lists them.
///
/// # Errors
/// As [`norm_backward`].
pub fn add_rows(
    driver: &dyn Driver,
    x: &Buffer<f32>,
    segments: &RowSegments,
    sums: Address,
    shape: &ModelShape,
) -> Result<()> {
    let RowSegments { order, from, to } = segments;
    assert!(from.len() == to.len() + 1 && x.len() >= order.len() * shape.width);
    let arguments =
        [x.at(0).into(), order.at(0).into(), from.at(0).into(), to.at(0).into(), sums.into(), shape.width.into()];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch("add_rows", line(to.len(), 256), &arguments) }
}

/// `dx (T, D)` = sums of rows of `x`, as `segments` lists them; `d` is the same, rounded for products.
///
/// # Errors
/// As [`norm_backward`].
pub fn scatter_rows(
    driver: &dyn Driver,
    x: &Buffer<f32>,
    segments: &RowSegments,
    (dx, d): (&Buffer<f32>, &DynBuffer),
    shape: &ModelShape,
) -> Result<()> {
    let count = segments.from.len() - 1;
    assert!(x.len() >= segments.order.len() * shape.width && dx.len().min(d.len()) >= count * shape.width);
    let arguments = [
        x.at(0).into(),
        segments.order.at(0).into(),
        segments.from.at(0).into(),
        dx.at(0).into(),
        d.at(0).into(),
        shape.width.into(),
    ];
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { launch_rows(driver, ("scatter_rows", d.dtype()), [count, 256], &arguments) }
}
