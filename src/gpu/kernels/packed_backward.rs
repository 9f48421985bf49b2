//! Wrappers of `packed_backward.cu`: norms, the MLP's activation and sums over rows, backward.

use super::{ModelShape, launch_rows, to_u32};
use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Grid};
use crate::gpu::{Buffer, DynBuffer};
use crate::numbers::dtype::Dtype;

/// Blocks that share out the rows of a sum over all rows, at most.
pub const BLOCKS: usize = 512;

/// Warps of a block of `norm_backward`, a row each; and what their sums may take of shared memory, which every card gives a block.
const WARPS: usize = 8;
const SHARED: usize = 48 << 10;

/// A sum over rows: room for the parts of [`BLOCKS`] blocks, and where their sum is added.
#[derive(Clone, Copy)]
pub struct ColumnSum<'a> {
    /// `(BLOCKS, width)`.
    pub partial: &'a Buffer<f32>,
    /// `(width)`.
    pub to: Address,
}

impl ColumnSum<'_> {
    /// Adds what the blocks left.
    fn finish(&self, driver: &dyn Driver, blocks: usize, width: usize) -> Result<()> {
        let arguments = [self.partial.at(0).into(), self.to.into(), blocks.into(), width.into()];
        // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
        unsafe { driver.launch("add_columns", line(width.div_ceil(32), 256), &arguments) }
    }
}

fn line(blocks: usize, threads: u32) -> Grid {
    Grid { blocks: [to_u32(blocks), 1, 1], threads, shared: 0, early: false }
}

/// A norm to run backward.
pub struct NormBackward<'a> {
    /// What it read, `(.., D)`.
    pub x: &'a Buffer<f32>,
    /// The row of `x` of each row, if not its own.
    pub index: Option<&'a Buffer<u32>>,
    /// `(D)`.
    pub weight: Address,
    /// Gradient of the weight.
    pub d_weight: ColumnSum<'a>,
}

/// Where the gradient of a norm's input goes.
#[derive(Clone, Copy)]
pub enum NormGradient<'a> {
    /// Added to the first, `(T, D)`; the second is the sum as the products read it.
    Added(&'a Buffer<f32>, &'a DynBuffer),
    /// In the place of the gradient of what the norm gave.
    Place,
}

/// Backward of [`super::norm_rows`] from `d_normed (count, D)`.
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

/// Adds the column sums of `x (count, width)`.
pub fn column_sums(driver: &dyn Driver, x: &DynBuffer, [rows, width]: [usize; 2], sum: ColumnSum<'_>) -> Result<()> {
    let blocks = rows.min(BLOCKS);
    assert!(x.len() >= rows * width && sum.partial.len() >= blocks * width);
    let arguments = [x.at(0).into(), sum.partial.at(0).into(), rows.into(), width.into()];
    let grid = Grid { blocks: [to_u32(width.div_ceil(128)), to_u32(blocks), 1], threads: 128, shared: 0, early: false };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("column_sums_{}", x.dtype().name()), grid, &arguments) }?;
    sum.finish(driver, blocks, width)
}

/// `gate_up (T, 2 F)` becomes its gradient, `act` (in: its gradient) the activation again.
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

/// Rows that are added to others: `order[from[i]..from[i + 1]]` to row `to[i]`.
pub struct RowSegments {
    /// Rows of the source.
    pub order: Buffer<u32>,
    /// Where each segment starts, and the end.
    pub from: Buffer<u32>,
    /// Rows of the target; none where segment i is row i's.
    pub to: Buffer<u32>,
}

/// `sums (.., D)` += the rows of `x (T, D)` that `segments` say.
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

/// `dx (T, D)` = the sums of rows of `x` that `segments` say, one for each row; `d` the same as the products read it.
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
