//! Wrappers of `decode.cu`: the state of the slots, and attention over their KV caches.

use super::{PartialSums, to_u32};
use crate::error::{Error, Result};
use crate::gpu::decode::Slots;
use crate::gpu::driver::{Address, Argument, Driver, Grid};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer};

/// Starts the first `count` samples in `slots.starts`.
///
/// # Errors
/// [`Error::Device`], as for all wrappers in this module.
pub fn start_slots(driver: &dyn Driver, slots: &Slots, count: usize) -> Result<()> {
    assert!(count <= slots.count());
    let arguments = [
        slots.state.at(0).into(),
        slots.count().into(),
        slots.starts.at(0).into(),
        slots.prompt_seen.at(0).into(),
        slots.seen.at(0).into(),
        Argument::from(slots.words),
    ];
    let grid = Grid { blocks: [to_u32(count), 1, 1], threads: 128, shared: 0, early: false };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch("start_slots", grid, &arguments) }
}

/// Stores which of `tokens` the prompt in place `prompt` contains.
///
/// # Errors
/// As [`start_slots`].
pub fn mark_seen(driver: &dyn Driver, slots: &Slots, prompt: usize, tokens: &Buffer<u32>) -> Result<()> {
    assert!(prompt < slots.count());
    let seen = slots.prompt_seen.at(prompt * slots.words);
    let arguments = [tokens.at(0).into(), tokens.len().into(), seen.into(), Argument::from(slots.words)];
    let grid = Grid { blocks: [1, 1, 1], threads: 256, shared: 0, early: false };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch("mark_seen", grid, &arguments) }
}

/// Embeds the slots' last tokens into the residual stream `x (rows, D)`. Sets `largest` to zero, for [`super::head_rows`] or
/// [`super::SoftmaxSums::find_largest`] in the same step.
///
/// # Errors
/// As [`start_slots`].
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
    // The first kernel of a step must not start early, because the others rely on that.
    let grid = Grid { blocks: [rows as u32, 1, 1], threads: 128, shared: 0, early: false };
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("embed_slots_{}", weights.matrices.dtype().name()), grid, &arguments) }
}

/// How many warps share the positions of a row and key head. Their results are added in a fixed order, so this choice determines the
/// bits of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionWarps {
    /// For few blocks: hides memory latency.
    Eight = 8,
    /// For many blocks: lets more rows run at once.
    Two = 2,
}

/// Attention of one layer in a decode step. `qkv` holds queries, keys and values before bias, norms and rope; the keys and values are
/// added to the caches.
///
/// # Errors
/// As [`start_slots`].
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
        weights.layer(layer).head_norms.unwrap_or(Address(0)).into(),
        config.rms_norm_eps.into(),
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
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("decode_attention_{}_{dim}_{warps}", out.dtype().name()), grid, &arguments) }
}

/// Copies keys and values of packed prompts into the caches of a layer. Row `i` of `qkv (rows, (H + 2 K) E)` goes to the prompt and the
/// position in row `i` of `places (rows, 2)`.
///
/// # Errors
/// As [`start_slots`].
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
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe { driver.launch(&format!("cache_rows_{}", qkv.dtype().name()), grid, &arguments) }
}

/// Refuses shapes that no kernel was compiled for.
///
/// # Errors
/// [`Error::Device`] with the unsupported number.
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
