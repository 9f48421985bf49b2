//! Kernels as Rust functions: `x.rs` wraps the kernels of `x.cu`, which lies beside it.
//!
//! The wrappers are the only callers of [`Driver::launch`] and [`Driver::multiply`]. A wrapper checks the length of every buffer that
//! it is given. A bare [`Address`](crate::gpu::driver::Address) or [`Matrix`](crate::gpu::driver::Matrix) is a part of the weights, of the
//! gradients or of a batch; there the wrapper relies on its caller for the shape that its documentation states.

#![allow(unsafe_code)] // launches; each says what it has checked

mod attend;
mod attend_backward;
mod decode;
mod draw;
mod head;
mod head_norms;
mod linear_rows;
mod norm;
mod optimizer;
mod packed;
mod packed_backward;
mod products;
mod shape;

pub use attend::attend;
pub use attend_backward::{AttentionGradients, SavedAttention, attend_backward};
pub use decode::{AttentionWarps, cache_rows, check, decode_attention, embed_slots, mark_seen, start_slots};
pub use draw::{DrawOutput, DrawRows, Logits, SoftmaxSums, draw};
pub use head::{LogitChunk, head_backward, head_stats, stride};
pub use head_norms::{norm_heads_backward, norm_rope};
pub use linear_rows::{head_rows, linear_rows, splits, swiglu_rows};
pub use norm::add_norm;
pub use optimizer::{AdamWState, adamw, merge_adapter, square_sums};
pub use packed::{NormInput, bias_rope, embed, norm_rows, swiglu};
pub use packed_backward::{
    BLOCKS, ColumnSum, NormBackward, NormGradient, RowSegments, add_rows, column_sums, norm_backward, scatter_rows,
    swiglu_backward,
};
pub use products::{input_gradient, linear, weight_gradient};
pub use shape::{ModelShape, RopeTable};

use crate::error::Result;
use crate::gpu::Buffer;
use crate::gpu::driver::{Argument, Driver, Grid};
use crate::numbers::dtype::Dtype;

/// Results of a product whose depth was split: `(splits, rows, width)`, still to be added up.
#[derive(Clone, Copy)]
pub struct PartialSums<'a> {
    /// At least as long as the shape says.
    pub sums: &'a Buffer<f32>,
    /// 0 if there is nothing to add.
    pub splits: usize,
}

/// A size as a [`Grid`] takes it.
fn to_u32(count: usize) -> u32 {
    u32::try_from(count).expect("sizes on the device are below 2^32")
}

/// Launches a kernel with one block of `threads` threads per row; does nothing if there are no rows.
///
/// # Safety
/// As for [`Driver::launch`].
unsafe fn launch_rows(
    driver: &dyn Driver,
    (name, dtype): (&str, Dtype),
    [rows, threads]: [usize; 2],
    arguments: &[Argument],
) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    let grid = Grid { blocks: [to_u32(rows), 1, 1], threads: to_u32(threads), shared: 0, early: false };
    // SAFETY: the caller's promise.
    unsafe { driver.launch(&format!("{name}_{dtype}"), grid, arguments) }
}
