//! The kernels of `kernels/` as functions: what each reads and writes is checked here, once, before it is launched.

use super::buffer::{Buffer, DynBuffer};
use super::driver::{Address, Argument, Driver, Grid};
use crate::error::Result;

impl From<Address> for Argument {
    fn from(at: Address) -> Self {
        Self::Address(at)
    }
}

impl From<usize> for Argument {
    fn from(number: usize) -> Self {
        Self::U32(u32::try_from(number).expect("sizes on the device are below 2^32"))
    }
}

impl From<f32> for Argument {
    fn from(number: f32) -> Self {
        Self::F32(number)
    }
}

/// Results that are still to be added up, `(splits, rows, width)`.
#[derive(Clone, Copy)]
pub struct PartialSums<'a> {
    /// Room for at least that.
    pub sums: &'a Buffer<f32>,
    /// 0 for nothing to add.
    pub splits: usize,
}

/// `kernels/norm.cu`: adds partial results to the residual stream `x (rows, D)` and normalises it with `weight (D)`.
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
    let blocks = [u32::try_from(rows).expect("blocks are below 2^32"), 1, 1];
    let grid = Grid { blocks, threads: 256, shared: 0, early: true };
    driver.launch(&format!("add_norm_{}", normed.dtype().name()), grid, &arguments)
}
