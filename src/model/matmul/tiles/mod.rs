//! Products of bf16 matrices with sums in f32, at the speed of a processor's matrix units.
//!
//! One order of sums holds on every processor. The depth is cut into steps of [`STEP`]; y begins as zero, the bias or the residual, and
//! each step adds one number to it: the sum of two chains of multiply-adds, one over the even and one over the odd places of the step, both
//! from zero. This is what `TDPBF16PS` computes (Intel SDM, volume 2), and [`lanes`] computes the same with other instructions. An element
//! of y depends on its row, its column and the depth alone, never on the batch, the blocks or the threads.
//!
//! Rounding: both operands are rounded to bf16, to the nearest, ties to even; numbers below the smallest normal one become zero, because
//! tiles read them as zero. The product of two bf16 numbers is exact in f32, so whether a multiply-add rounds once or twice makes no
//! difference. Sums round to the nearest. Tiles flush sums below 2^-126 to zero and other instructions keep them: the one difference.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod lanes;
mod pack;
mod product;
mod strip;
#[cfg(test)]
mod tests;

use half::bf16;

use crate::numbers::aligned::{AlignedVec, Number};

pub use pack::{Part, Side, Source};
pub use product::{has_matrix_units, multiply};

/// Rows, or columns, of a tile.
pub const BLOCK: usize = 16;
/// Depth of a tile.
pub const STEP: usize = 32;
/// Numbers of a tile, 1 KiB.
const TILE: usize = BLOCK * STEP;

/// An operand of a product: blocks of [`BLOCK`] rows or columns, each a sequence of tiles along the depth, padded with zeros.
///
/// A tile of a left operand is `(16 rows, 32)`; one of a right operand is `(16 pairs of the depth, 16 columns, 2)`.
#[derive(Default)]
pub struct Tiles {
    data: AlignedVec<bf16>,
    /// Rows of a left operand, columns of a right one.
    outer: usize,
    depth: usize,
}

impl Clone for Tiles {
    fn clone(&self) -> Self {
        Self { data: self.data.clone(), ..*self }
    }
}

impl Tiles {
    /// Packs an operand.
    #[cfg(test)]
    pub fn of<T: Number>(side: Side, source: Source<'_, T>) -> Self {
        let mut tiles = Self::default();
        tiles.pack(side, source);
        tiles
    }

    /// Rows of a left operand, columns of a right one.
    pub fn outer(&self) -> usize {
        self.outer
    }

    /// What it takes (bytes).
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.data)
    }

    /// The numbers of column `column` of a right operand, `(depth)`: row `column` of the weight that it was packed from.
    pub fn column(&self, column: usize, to: &mut [f32]) {
        assert!(column < self.outer && to.len() == self.depth);
        let block = &self.data[column / BLOCK * self.steps() * TILE..];
        for (p, to) in to.iter_mut().enumerate() {
            let (tile, pair) = (p / STEP, p % STEP / 2);
            *to = block[tile * TILE + (pair * BLOCK + column % BLOCK) * 2 + p % 2].widen();
        }
    }

    /// Tiles of a block.
    fn steps(&self) -> usize {
        self.depth.div_ceil(STEP)
    }
}
