//! Wrapper of `norm.cu`.

use super::{PartialSums, to_u32};
use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Grid};
use crate::gpu::{Buffer, DynBuffer};

/// Adds partial sums to the residual stream `x (rows, D)`, and normalises it with `weight (D)` into `normed (rows, D)`.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn add_norm(
    driver: &dyn Driver,
    x: &Buffer<f32>,
    partial: PartialSums<'_>,
    (weight, epsilon): (Address, f32),
    normed: &DynBuffer,
    [rows, width]: [usize; 2],
) -> Result<()> {
    assert!(x.len().min(normed.len()) >= rows * width && partial.sums.len() >= partial.splits * rows * width);
    let arguments = [
        x.at(0).into(),
        partial.sums.at(0).into(),
        partial.splits.into(),
        weight.into(),
        normed.at(0).into(),
        rows.into(),
        width.into(),
        epsilon.into(),
    ];
    let grid = Grid { blocks: [to_u32(rows), 1, 1], threads: 256, shared: 0, early: true };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("add_norm_{}", normed.dtype().name()), grid, &arguments) }
}
