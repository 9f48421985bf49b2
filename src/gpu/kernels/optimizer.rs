//! Wrappers of `optimizer.cu`: sums of squares, and the AdamW update.

use super::to_u32;
use crate::error::Result;
use crate::gpu::driver::{Argument, Driver, Grid};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer};
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

/// What an update of AdamW reads and writes, in the order of one [`crate::gpu::ParameterLayout`].
#[derive(Clone, Copy)]
pub struct AdamWState<'a> {
    /// The f32 weights in training.
    pub weights: &'a Buffer<f32>,
    /// Set to zero by the update.
    pub gradients: &'a Buffer<f32>,
    /// Running means of the gradients and of their squares.
    pub moments: &'a [DynBuffer; 2],
    /// The copy of the weights that products read.
    pub copy: &'a DeviceWeights,
}

/// Updates all parameters by `rule`.
///
/// # Errors
/// As [`square_sums`].
pub fn adamw(driver: &dyn Driver, rule: &Rule, state: AdamWState<'_>) -> Result<()> {
    let AdamWState { weights, gradients, moments: [first, second], copy } = state;
    let (all, matrices) = (weights.len(), copy.matrices.len());
    assert!(gradients.len() == all && first.len() == all && second.len() == all && first.dtype() == second.dtype());
    assert!(matrices + copy.vectors.len() == all);
    let arguments = [
        weights.at(0).into(),
        gradients.at(0).into(),
        first.at(0).into(),
        second.at(0).into(),
        copy.matrices.at(0).into(),
        copy.vectors.at(0).into(),
        Argument::U64(all as u64),
        Argument::U64(matrices as u64),
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
    let name = format!("adamw_{}_{}", copy.matrices.dtype(), first.dtype());
    let grid = Grid { blocks: [to_u32(all.div_ceil(4 * 256)), 1, 1], threads: 256, shared: 0, early: false };
    // SAFETY: the asserts above check the lengths of all buffers.
    unsafe { driver.launch(&name, grid, &arguments) }
}
