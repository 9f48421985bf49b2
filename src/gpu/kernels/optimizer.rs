//! Wrappers of `optimizer.cu`: sums of squares, the AdamW update, and the sum of a matrix and its adapter.

use super::to_u32;
use crate::error::Result;
use crate::gpu::driver::{Address, Argument, Driver, Grid, Matrix};
use crate::gpu::{Buffer, DynBuffer};
use crate::optim::Rule;

/// `sums[i]` = the sum of the squares of `x[ranges[i][0]..ranges[i][1]]`; both ends are multiples of 4.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn square_sums(driver: &dyn Driver, x: &Buffer<f32>, ranges: &Buffer<[u64; 2]>, sums: &Buffer<f64>) -> Result<()> {
    assert!(sums.len() >= ranges.len());
    let arguments = [x.at(0).into(), ranges.at(0).into(), sums.at(0).into()];
    let grid = Grid { blocks: [to_u32(ranges.len()), 1, 1], threads: 256, shared: 0, early: false };
    // SAFETY: as the assert above checks; the ranges are parameters of the layout that `x` has.
    unsafe { driver.launch("square_sums", grid, &arguments) }
}

/// What an update of AdamW reads and writes, in the same order of numbers.
#[derive(Clone, Copy)]
pub struct AdamWState<'a> {
    /// The f32 weights in training.
    pub weights: &'a Buffer<f32>,
    /// Set to zero by the update.
    pub gradients: &'a Buffer<f32>,
    /// Running means of the gradients and of their squares.
    pub moments: &'a [DynBuffer; 2],
    /// The copies that products read: of the matrices, which come first, and of the vectors, if there are any.
    pub copies: (&'a DynBuffer, Option<&'a Buffer<f32>>),
}

/// Updates all parameters by `rule`.
///
/// # Errors
/// As [`square_sums`].
pub fn adamw(driver: &dyn Driver, rule: &Rule, state: AdamWState<'_>) -> Result<()> {
    let AdamWState { weights, gradients, moments: [first, second], copies: (matrices, vectors) } = state;
    let all = weights.len();
    assert!(gradients.len() == all && first.len() == all && second.len() == all && first.dtype() == second.dtype());
    assert!(matrices.len() + vectors.map_or(0, Buffer::len) == all);
    let arguments = [
        weights.at(0).into(),
        gradients.at(0).into(),
        first.at(0).into(),
        second.at(0).into(),
        matrices.at(0).into(),
        vectors.map_or(Address::NULL, |vectors| vectors.at(0)).into(),
        Argument::U64(all as u64),
        Argument::U64(matrices.len() as u64),
        rule.gradient_scale.into(),
        rule.keep.into(),
        rule.first_rate.into(),
        rule.second_keep.into(),
        rule.second_rate.into(),
        rule.correction_root.into(),
        rule.epsilon.into(),
        rule.step_size.into(),
        Argument::U32(rule.key[0]),
        Argument::U32(rule.key[1]),
    ];
    let name = format!("adamw_{}_{}", matrices.dtype(), first.dtype());
    let grid = Grid { blocks: [to_u32(all.div_ceil(4 * 256)), 1, 1], threads: 256, shared: 0, early: false };
    // SAFETY: the asserts above check the lengths of all buffers.
    unsafe { driver.launch(&name, grid, &arguments) }
}

/// `sum` = `base` + `factor` b a, for an adapter `a (rank, in)` and `b (out, rank)` of a matrix `(out, in)`, all in f32 but the sum. The bits are
/// those of the CPU's sum, where it has fused multiply-adds.
///
/// # Errors
/// As [`square_sums`].
pub fn merge_adapter(
    driver: &dyn Driver,
    (base, [a, b], sum): (Address, [Address; 2], Matrix),
    ([out, width], rank): ([usize; 2], usize),
    factor: f32,
) -> Result<()> {
    const ROWS: usize = 8;
    assert!(out.is_multiple_of(ROWS) && width.is_multiple_of(4) && sum.stride == width);
    let arguments =
        [base.into(), a.into(), b.into(), sum.at.into(), Argument::from(width), Argument::from(rank), factor.into()];
    let blocks = [to_u32(out / ROWS), to_u32(width.div_ceil(4 * 256)), 1];
    let grid = Grid { blocks, threads: 256, shared: 0, early: false };
    // SAFETY: the caller's arrays have the shapes above, which the assert holds to what a block computes.
    unsafe { driver.launch(&format!("merge_adapter_{}", sum.dtype), grid, &arguments) }
}
