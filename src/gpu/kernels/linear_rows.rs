//! Wrappers of `linear_rows.cu`, which multiplies the few rows of a decode step with a weight.

use super::PartialSums;
use crate::error::Result;
use crate::gpu::driver::{Address, Argument, Driver, Grid};
use crate::gpu::{Buffer, DynBuffer};

/// How much of the depth a block reads at a time, and how many rows of the weight it computes.
const TILE: usize = 64;

/// Enough blocks to keep a large GPU busy. With fewer, the depth is split.
const BLOCKS: usize = 128;

/// Into how many parts the depth of a product is split. This depends on the weight's shape alone, so that the result of a row does
/// not depend on the batch.
#[must_use]
pub fn splits(width: usize, depth: usize) -> usize {
    let (tiles, stages) = (width.div_ceil(TILE), depth.div_ceil(TILE));
    let wanted = (BLOCKS / tiles).clamp(1, stages);
    stages.div_ceil(stages.div_ceil(wanted))
}

/// Tokens per block: the smallest power of two that holds all rows, from 8 to 64.
fn tokens(rows: usize) -> usize {
    rows.next_power_of_two().clamp(8, TILE)
}

fn grid(rows: usize, width: usize, splits: usize, dtype_is_plain: bool) -> Grid {
    let tokens = tokens(rows);
    let shared = if dtype_is_plain { 0 } else { 4 * (TILE + tokens) * TILE * 2 };
    let blocks = [width.div_ceil(TILE), rows.div_ceil(tokens), splits].map(|n| n as u32);
    let threads = if tokens < 16 { 128 } else { 256 };
    Grid { blocks, threads, shared: shared as u32, early: true }
}

/// `out (splits, rows, width) = x (rows, depth) weight (width, depth)^T`, as [`splits`] partial sums.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn linear_rows<'o>(
    driver: &dyn Driver,
    factors: (Address, &DynBuffer),
    out: &'o Buffer<f32>,
    shape: [usize; 3],
) -> Result<PartialSums<'o>> {
    let splits = splits(shape[1], shape[2]);
    product_rows(driver, factors, out, (splits, None), shape)?;
    Ok(PartialSums { sums: out, splits })
}

/// `logits (rows, width) = x (rows, depth) weight (width, depth)^T`, not split. Raises `largest`, if given, to the largest logit of each
/// row.
///
/// # Errors
/// As [`linear_rows`].
pub fn head_rows(
    driver: &dyn Driver,
    factors: (Address, &DynBuffer),
    logits: &Buffer<f32>,
    largest: Option<&Buffer<u32>>,
    shape: [usize; 3],
) -> Result<()> {
    assert!(largest.is_none_or(|largest| largest.len() >= shape[0]));
    product_rows(driver, factors, logits, (1, largest), shape)
}

fn product_rows(
    driver: &dyn Driver,
    (weight, x): (Address, &DynBuffer),
    out: &Buffer<f32>,
    (splits, largest): (usize, Option<&Buffer<u32>>),
    [rows, width, depth]: [usize; 3],
) -> Result<()> {
    let dtype = x.dtype();
    assert!(x.len() >= rows * depth && out.len() >= splits * rows * width);
    let arguments = [
        weight.into(),
        x.at(0).into(),
        out.at(0).into(),
        rows.into(),
        width.into(),
        depth.into(),
        splits.into(),
        Argument::from(largest.map_or(Address(0), |largest| largest.at(0))),
    ];
    let kernel = format!("linear_rows_{}_{}", dtype.name(), tokens(rows));
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&kernel, grid(rows, width, splits, dtype.size() == 4), &arguments) }
}

/// `out (rows, width) = silu(gate) * up` with gate and up from `x (rows, depth)` and `weight (2 width, depth)`.
///
/// # Errors
/// As [`linear_rows`].
pub fn swiglu_rows(
    driver: &dyn Driver,
    (weight, x): (Address, &DynBuffer),
    out: &DynBuffer,
    [rows, width, depth]: [usize; 3],
) -> Result<()> {
    assert!(x.len() >= rows * depth && out.len() >= rows * width && out.dtype() == x.dtype());
    let arguments = [weight.into(), x.at(0).into(), out.at(0).into(), rows.into(), width.into(), Argument::from(depth)];
    let kernel = format!("swiglu_rows_{}_{}", x.dtype().name(), tokens(rows));
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&kernel, grid(rows, 2 * width, 1, x.dtype().size() == 4), &arguments) }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    /// Shared memory per block on the oldest supported GPU (bytes).
    const TURING: u32 = 64 << 10;

    /// The static shared memory of a kernel in the compiler's report, the most of all architectures (bytes).
    fn declared(kernel: &str) -> u32 {
        let report = include_str!(concat!(env!("OUT_DIR"), "/kernels.txt"));
        let of_kernel =
            report.split("Compiling entry function '").filter(|part| part.starts_with(&format!("{kernel}'")));
        let smem = |part: &str| {
            let (before, _) = part.split_once(" bytes smem")?;
            before.rsplit(' ').next()?.parse::<u32>().ok()
        };
        let all: Vec<u32> = of_kernel.map(|part| smem(part).unwrap_or(0)).collect();
        *all.iter().max().unwrap_or_else(|| panic!("no {kernel} in the compiler's report"))
    }

    #[test]
    fn shared_memory_of_products_fits_the_oldest_card_of_cuda() {
        assert!(declared("decode_attention_bf16_64_8") > 0, "the report names what a kernel declares");
        for rows in [1, 9, 17, 33] {
            for kind in ["linear", "swiglu"] {
                let kernel = format!("{kind}_rows_f16_{}", tokens(rows));
                let bytes = declared(&kernel) + grid(rows, 896, 1, false).shared;
                assert!(bytes <= TURING, "{kernel}: {bytes}");
            }
        }
    }
}
