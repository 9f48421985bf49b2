//! `kernels/{linear_rows,decode}.cu` as functions: what each reads and writes is checked before it is launched.

use super::super::buffer::{Buffer, DynBuffer};
use super::super::driver::{Address, Argument, Driver, Grid};
use super::super::kernels::PartialSums;
use super::super::weights::DeviceWeights;
use super::slots::Slots;
use crate::error::{Error, Result};

/// Numbers of the depth that a block reads at a time, and rows of the weights that it has.
const TILE: usize = 64;

/// Blocks that keep a large card busy; with fewer the depth is cut.
const BLOCKS: usize = 128;

/// In how many parts the depth of a product over few rows is summed. Follows from the weight's shape alone, so that a row's result
/// does not depend on the batch.
#[must_use]
pub fn splits(width: usize, depth: usize) -> usize {
    let (tiles, stages) = (width.div_ceil(TILE), depth.div_ceil(TILE));
    let wanted = (BLOCKS / tiles).clamp(1, stages);
    stages.div_ceil(stages.div_ceil(wanted))
}

/// Tokens a block has: the fewest that hold all rows, at most 64.
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

/// `out (splits, rows, width) = x (rows, depth) weight (width, depth)^T`, in as many parts as [`splits`] says.
///
/// # Errors
/// [`Error::Device`], as all of them.
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

/// `logits (rows, width) = x (rows, depth) weight (width, depth)^T` in one part; the largest of each row is compared with what is in
/// `largest`, where it is wanted.
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
    driver.launch(&kernel, grid(rows, width, splits, dtype.size() == 4), &arguments)
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
    driver.launch(&kernel, grid(rows, 2 * width, 1, x.dtype().size() == 4), &arguments)
}

/// The residual stream `x (rows, D)` of the slots' last tokens; zeroes `largest`, where [`head_rows`] or a
/// [`super::SoftmaxSums::find_largest`] of the same step is to compare with it.
///
/// # Errors
/// As [`linear_rows`].
pub fn embed_slots(
    driver: &dyn Driver,
    weights: &DeviceWeights,
    slots: &Slots,
    slot_of_row: &Buffer<u32>,
    x: &Buffer<f32>,
    largest: Option<&Buffer<u32>>,
) -> Result<()> {
    let (rows, width) = (slot_of_row.len(), weights.config.hidden_size);
    assert!(x.len() >= rows * width && largest.is_none_or(|largest| largest.len() >= rows));
    let arguments = [
        slots.state.at(0).into(),
        slots.count().into(),
        slot_of_row.at(0).into(),
        weights.embedding().into(),
        x.at(0).into(),
        width.into(),
        Argument::from(largest.map_or(Address(0), |largest| largest.at(0))),
    ];
    // The first kernel of a step, which the others rely on: not early.
    let grid = Grid { blocks: [rows as u32, 1, 1], threads: 128, shared: 0, early: false };
    driver.launch(&format!("embed_slots_{}", weights.matrices.dtype().name()), grid, &arguments)
}

/// How many warps share the positions of a row and key head. What they have seen is added in their order, so that a row's bits follow from
/// this choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionWarps {
    /// Hides the waiting where blocks are few.
    Eight = 8,
    /// Lets more rows run at once where they are many.
    Two = 2,
}

/// Attention of one layer of a step: `qkv` are queries, keys and values before bias and rope; keys and values go into the caches.
///
/// # Errors
/// As [`linear_rows`].
pub fn decode_attention(
    driver: &dyn Driver,
    weights: &DeviceWeights,
    (slots, layer): (&Slots, usize),
    (slot_of_row, warps): (&Buffer<u32>, AttentionWarps),
    qkv: PartialSums<'_>,
    out: &DynBuffer,
) -> Result<()> {
    let (config, rows) = (&weights.config, slot_of_row.len());
    let (heads, kv_heads, dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim());
    assert!(out.len() >= rows * heads * dim && out.dtype() == slots.dtype());
    assert!(qkv.sums.len() >= qkv.splits * rows * (heads + 2 * kv_heads) * dim);
    let [prompt_keys, prompt_values] = slots.prompt_caches(layer);
    let [keys, values] = slots.caches(layer);
    let arguments = [
        slots.state.at(0).into(),
        slots.count().into(),
        slot_of_row.at(0).into(),
        qkv.sums.at(0).into(),
        qkv.splits.into(),
        weights.layer(layer).qkv_bias.unwrap_or(Address(0)).into(),
        weights.rope.at(0).into(),
        weights.positions.into(),
        prompt_keys.into(),
        prompt_values.into(),
        slots.shape.max_prompt_tokens.into(),
        keys.into(),
        values.into(),
        slots.shape.max_completion_tokens.into(),
        out.at(0).into(),
        heads.into(),
        Argument::from(kv_heads),
    ];
    let warps = warps as u32;
    let grid = Grid { blocks: [rows as u32, kv_heads as u32, 1], threads: 32 * warps, shared: 0, early: true };
    driver.launch(&format!("decode_attention_{}_{dim}_{warps}", out.dtype().name()), grid, &arguments)
}

/// Keys and values of packed prompts into the caches of a layer: row `i` of `qkv (rows, (H + 2 K) E)` goes to the prompt and the
/// position that `places (rows, 2)` says.
///
/// # Errors
/// As [`linear_rows`].
pub fn cache_rows(
    driver: &dyn Driver,
    weights: &DeviceWeights,
    (slots, layer): (&Slots, usize),
    qkv: &DynBuffer,
    places: &Buffer<u32>,
) -> Result<()> {
    let (config, rows) = (&weights.config, places.len() / 2);
    let (heads, kv_heads, dim) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim());
    assert!(qkv.len() >= rows * (heads + 2 * kv_heads) * dim && qkv.dtype() == slots.dtype());
    let [keys, values] = slots.prompt_caches(layer);
    let arguments = [
        qkv.at(0).into(),
        places.at(0).into(),
        keys.into(),
        values.into(),
        slots.shape.max_prompt_tokens.into(),
        heads.into(),
        kv_heads.into(),
        Argument::from(dim),
    ];
    let grid = Grid { blocks: [rows as u32, 1, 1], threads: 128, shared: 0, early: false };
    driver.launch(&format!("cache_rows_{}", qkv.dtype().name()), grid, &arguments)
}

/// Refuses shapes that the kernels are not made for.
///
/// # Errors
/// [`Error::Device`] naming the number.
pub fn check(weights: &DeviceWeights) -> Result<()> {
    let (config, dim) = (&weights.config, weights.config.head_dim());
    let group = config.num_attention_heads / config.num_key_value_heads;
    if ![16, 32, 64, 128].contains(&dim) {
        return Err(Error::Device(format!("heads of width {dim}: the GPU's kernels are made for 16, 32, 64 and 128")));
    }
    if group > 8 {
        return Err(Error::Device(format!(
            "{group} query heads for a key head: the GPU's kernels are made for up to 8"
        )));
    }
    Ok(())
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    /// Shared memory of a block on the oldest card there are kernels for [bytes].
    const TURING: u32 = 64 << 10;

    /// What the compiler says that a kernel declares, on the card where it is most [bytes].
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
