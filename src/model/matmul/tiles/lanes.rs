//! The product of tiles on processors without matrix units, in the order of sums that matrix units have.

use half::bf16;

use super::{BLOCK, STEP, TILE};
use crate::model::simd::{Kernel, LANES, Simd};

/// Rows and blocks of columns of the register block: two chains for each.
const ROWS: usize = 4;
const COLUMNS: usize = 2;

/// sums += left right, for [`COLUMNS`] blocks of columns.
pub struct Block {
    /// The first tile of a block of rows.
    pub left: *const bf16,
    /// The first tile of each block of columns.
    pub right: [*const bf16; COLUMNS],
    /// Tiles along the depth.
    pub steps: usize,
    /// Rows, at most [`BLOCK`].
    pub rows: usize,
    /// `(rows, COLUMNS * BLOCK)` in rows of `stride`.
    pub sums: *mut f32,
    /// Numbers from one row to the next.
    pub stride: usize,
}

impl Kernel for Block {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        const { assert!(LANES == BLOCK) };
        for row in (0..self.rows).step_by(ROWS) {
            // SAFETY: rows are inside the block, whose pointers are good for it.
            unsafe {
                match self.rows - row {
                    1 => self.some::<S, 1>(row),
                    2 => self.some::<S, 2>(row),
                    3 => self.some::<S, 3>(row),
                    _ => self.some::<S, ROWS>(row),
                }
            }
        }
    }
}

impl Block {
    /// # Safety
    /// The processor has S, and `R` rows from `row` on are inside the block.
    #[allow(clippy::needless_range_loop)] // they are unrolled: no index is left
    #[inline(always)]
    unsafe fn some<S: Simd, const R: usize>(&self, row: usize) {
        // SAFETY: `step` is below `steps`, and a tile has 16 rows of 16 pairs.
        unsafe {
            let at = |r: usize, c: usize| self.sums.add((row + r) * self.stride + c * BLOCK);
            let mut sums = [[S::splat(0.0); COLUMNS]; R];
            for r in 0..R {
                for c in 0..COLUMNS {
                    sums[r][c] = S::load(at(r, c));
                }
            }
            for step in 0..self.steps {
                let left = self.left.add(step * TILE + row * STEP).cast::<u32>();
                let mut chains = [[[S::splat(0.0); COLUMNS]; 2]; R];
                for pair in 0..BLOCK {
                    for odd in [false, true] {
                        let mut right = [S::splat(0.0); COLUMNS];
                        for c in 0..COLUMNS {
                            right[c] = S::load_bf16(self.right[c].add(step * TILE + pair * STEP), odd);
                        }
                        for r in 0..R {
                            let x = *left.add(r * BLOCK + pair);
                            let x = S::splat(f32::from_bits(if odd { x & 0xffff_0000 } else { x << 16 }));
                            for c in 0..COLUMNS {
                                let chain = &mut chains[r][usize::from(odd)][c];
                                *chain = S::mul_add(x, right[c], *chain);
                            }
                        }
                    }
                }
                for r in 0..R {
                    for c in 0..COLUMNS {
                        let both = S::mul_add(chains[r][0][c], S::splat(1.0), chains[r][1][c]);
                        sums[r][c] = S::mul_add(both, S::splat(1.0), sums[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..COLUMNS {
                    S::store(sums[r][c], at(r, c));
                }
            }
        }
    }
}
