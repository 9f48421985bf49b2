//! The product of tiles on processors without matrix units, in the order of sums that matrix units have.

use half::bf16;

use super::{BLOCK, STEP, TILE};
use crate::model::simd::{Kernel, LANES, Simd};

/// Rows and blocks of columns of the register block: two chains for each.
const ROWS: usize = 4;
const COLUMNS: usize = 2;

/// y += left right, for a few blocks of columns; `y` is row-major.
pub struct Block<const N: usize> {
    /// The first tile of a block of rows.
    pub left: *const bf16,
    /// The first tile of each block of columns.
    pub right: [*const bf16; N],
    /// Tiles along the depth.
    pub steps: usize,
    /// Rows, at most [`BLOCK`].
    pub rows: usize,
    /// The first of `N` times [`BLOCK`] columns of y.
    pub y: *mut f32,
    /// Numbers from one row of y to the next.
    pub stride: usize,
}

impl<const N: usize> Kernel for Block<N> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        const { assert!(LANES == BLOCK && N.is_multiple_of(COLUMNS)) };
        for columns in (0..N).step_by(COLUMNS) {
            for row in (0..self.rows).step_by(ROWS) {
                // SAFETY: rows and columns are inside the block, whose pointers are good for it.
                unsafe {
                    match self.rows - row {
                        1 => self.some::<S, 1>(row, columns),
                        2 => self.some::<S, 2>(row, columns),
                        3 => self.some::<S, 3>(row, columns),
                        _ => self.some::<S, ROWS>(row, columns),
                    }
                }
            }
        }
    }
}

impl<const N: usize> Block<N> {
    /// # Safety
    /// The processor has S; `R` rows from `row` on and [`COLUMNS`] blocks from `columns` on are inside the block.
    #[inline(always)]
    unsafe fn some<S: Simd, const R: usize>(&self, row: usize, columns: usize) {
        // SAFETY: `step` is below `steps`, and a tile has 16 rows of 16 pairs.
        unsafe {
            let y = |r: usize, c: usize| self.y.add((row + r) * self.stride + (columns + c) * BLOCK);
            let mut sums = [[S::splat(0.0); COLUMNS]; R];
            for r in 0..R {
                for c in 0..COLUMNS {
                    sums[r][c] = S::load(y(r, c));
                }
            }
            for step in 0..self.steps {
                let left = self.left.add(step * TILE + row * STEP).cast::<u32>();
                let mut chains = [[[S::splat(0.0); COLUMNS]; 2]; R];
                for pair in 0..BLOCK {
                    for odd in [false, true] {
                        let mut right = [S::splat(0.0); COLUMNS];
                        for c in 0..COLUMNS {
                            right[c] = S::load_bf16(self.right[columns + c].add(step * TILE + pair * STEP), odd);
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
                    S::store(sums[r][c], y(r, c));
                }
            }
        }
    }
}
