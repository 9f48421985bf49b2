//! The product of two operands in tiles: blocks for the caches, shared out to threads.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
use super::{BLOCK, TILE, Tiles, lanes};
use crate::model::matmul::{MatrixRowsMut, StartFrom};
use crate::model::simd;

/// Whether products of tiles run on matrix units.
pub fn has_matrix_units() -> bool {
    #[cfg(test)]
    if super::tests::WITHOUT_UNITS.get() {
        return false;
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return amx::is_available();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// Blocks of rows of a task, and steps of the depth that it takes at a time: 512 rows of this depth are 1 MiB, which stays in the
/// second-level cache while columns stream past.
const PANEL: usize = 32;
const PANEL_DEPTH: usize = 32;
/// Steps after which the next row is taken: two blocks of columns of this depth are 32 KiB, which stay in the first-level cache while rows
/// stream past.
const DEPTH: usize = 16;
/// Blocks of rows up to which the whole depth is one part, so that weights come from memory in long runs.
const FEW: usize = 4;
/// Blocks of columns of a task: a multiple of what the register blocks take.
const COLUMNS: usize = 4;
/// Multiply-adds, and numbers of the right operand, from which several threads share a product.
const PARALLEL_FROM: usize = 1 << 24;
const STREAMED_FROM: usize = 1 << 18;

/// y = start + left right.
///
/// # Shapes
/// - `left`: `(M, K)`, `right`: `(K, N)`, `y`: `(M, N)` inside rows of `y.stride`
pub fn multiply(left: &Tiles, right: &Tiles, start: StartFrom<'_>, y: MatrixRowsMut<'_>) {
    let (m, n, k) = (left.outer, right.outer, left.depth);
    if m == 0 || n == 0 {
        return;
    }
    assert!(right.depth == k && y.stride >= n && y.data.len() >= (m - 1) * y.stride + n);
    if let StartFrom::Bias(bias) = start {
        assert!(bias.len() >= n);
    }
    let (y, stride) = (y.data.as_mut_ptr(), y.stride);
    let (left, right, steps) = (left.data.as_ptr(), right.data.as_ptr(), left.steps());
    let product = Product { left, right, steps, shape: (m, n), start, y, stride };
    let (rows, columns) = (m.div_ceil(BLOCK), n.div_ceil(BLOCK));
    if m * n * k < PARALLEL_FROM && n * k < STREAMED_FROM {
        // SAFETY: the operands were checked to hold the shape.
        return unsafe { product.task(0..rows, 0..columns) };
    }
    let panels = rows.div_ceil(PANEL);
    let parts = (4 * rayon::current_num_threads()).div_ceil(panels);
    let width = columns.div_ceil(parts).next_multiple_of(COLUMNS);
    let parts = columns.div_ceil(width);
    (0..panels * parts).into_par_iter().with_max_len(1).for_each(|i| {
        let part = |i: usize, size: usize, all: usize| i * size..all.min((i + 1) * size);
        // SAFETY: as above, and no other task has these rows and columns.
        unsafe { product.task(part(i / parts, PANEL, rows), part(i % parts, width, columns)) }
    });
}

#[derive(Clone, Copy)]
struct Product<'a> {
    left: *const bf16,
    right: *const bf16,
    steps: usize,
    shape: (usize, usize),
    start: StartFrom<'a>,
    y: *mut f32,
    stride: usize,
}

// SAFETY: threads share it in `multiply`, where the operands are only read and each task writes its own part of y.
unsafe impl Sync for Product<'_> {}

/// What multiplies tiles.
enum Unit {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(amx::Registers),
    Lanes,
}

impl Unit {
    fn take() -> Self {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if has_matrix_units() {
            // SAFETY: they are there.
            return Self::Amx(unsafe { amx::Registers::take() });
        }
        Self::Lanes
    }

    /// Blocks of rows and of columns that it takes at once, of a task with so many blocks of rows.
    fn shape(&self, rows: usize) -> (usize, usize) {
        if matches!(self, Self::Lanes) || rows == 1 { (1, 4) } else { (2, 2) }
    }
}

/// Cuts a range into parts of at most `size`.
fn parts(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size.max(1)).map(move |from| from..end.min(from + size))
}

/// Room for the part of y that one call of a unit takes.
#[repr(C, align(64))]
struct Room([f32; 4 * BLOCK * BLOCK]);

/// Ranges are of blocks.
///
/// # Safety
/// All methods: rows and columns are inside the product's shape, its pointers are good for that, and nothing else uses this part of y.
impl Product<'_> {
    unsafe fn task(&self, rows: Range<usize>, columns: Range<usize>) {
        let (unit, mut room) = (Unit::take(), Room([0.0; 4 * BLOCK * BLOCK]));
        let (high, wide) = unit.shape(rows.len());
        let (panel, depth) = if rows.len() <= FEW { (self.steps, self.steps) } else { (PANEL_DEPTH, DEPTH) };
        for panel in parts(0..self.steps, panel) {
            for columns in parts(columns.clone(), wide) {
                if panel.start == 0 {
                    // SAFETY: a part of the ranges.
                    unsafe { self.begin(&rows, &columns) };
                }
                for steps in parts(panel.clone(), depth) {
                    for rows in parts(rows.clone(), high) {
                        // SAFETY: parts of the ranges.
                        unsafe { self.block(&unit, (high, wide), (rows, columns.clone()), &steps, &mut room) };
                    }
                }
            }
        }
    }

    /// Sets y to its start.
    unsafe fn begin(&self, rows: &Range<usize>, columns: &Range<usize>) {
        let (m, n) = self.shape;
        let columns = columns.start * BLOCK..n.min(columns.end * BLOCK);
        for row in rows.start * BLOCK..m.min(rows.end * BLOCK) {
            // SAFETY: a part of a row of y.
            let y =
                unsafe { std::slice::from_raw_parts_mut(self.y.add(row * self.stride + columns.start), columns.len()) };
            match self.start {
                StartFrom::Zero => y.fill(0.0),
                StartFrom::Bias(bias) => y.copy_from_slice(&bias[columns.clone()]),
                StartFrom::Add => {}
            }
        }
    }

    /// Adds some steps of the depth to at most `high` x `wide` blocks of y. What is not whole is computed in `room`: a missing block is a
    /// copy of the last one there, and rows and columns beyond the shape are dropped.
    unsafe fn block(
        &self,
        unit: &Unit,
        (high, wide): (usize, usize),
        (rows, columns): (Range<usize>, Range<usize>),
        steps: &Range<usize>,
        room: &mut Room,
    ) {
        let (m, n) = self.shape;
        let (row, column) = (rows.start * BLOCK, columns.start * BLOCK);
        let (height, width) = (m.min(rows.end * BLOCK) - row, n.min(columns.end * BLOCK) - column);
        // SAFETY: blocks inside the shape, and `room` holds `high * wide` blocks.
        unsafe {
            let y = self.y.add(row * self.stride + column);
            if (height, width) == (high * BLOCK, wide * BLOCK) {
                return self.multiply(unit, high, (&rows, &columns), steps, (y, self.stride));
            }
            let (own, own_stride) = (room.0.as_mut_ptr(), wide * BLOCK);
            for r in 0..height {
                std::ptr::copy_nonoverlapping(y.add(r * self.stride), own.add(r * own_stride), width);
            }
            self.multiply(unit, high, (&rows, &columns), steps, (own, own_stride));
            for r in 0..height {
                std::ptr::copy_nonoverlapping(own.add(r * own_stride), y.add(r * self.stride), width);
            }
        }
    }

    unsafe fn multiply(
        &self,
        unit: &Unit,
        high: usize,
        (rows, columns): (&Range<usize>, &Range<usize>),
        steps: &Range<usize>,
        (y, stride): (*mut f32, usize),
    ) {
        // SAFETY: blocks and steps inside the operands.
        unsafe {
            let tile = |data: *const bf16, block: usize| data.add((block * self.steps + steps.start) * TILE);
            let left = |i: usize| tile(self.left, (rows.start + i).min(rows.end - 1));
            let right = |i: usize| tile(self.right, (columns.start + i).min(columns.end - 1));
            match unit {
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Unit::Amx(registers) if high == 1 => {
                    let right = [right(0), right(1), right(2), right(3)];
                    registers.one_by_four(left(0), right, steps.len(), y, stride * size_of::<f32>());
                }
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Unit::Amx(registers) => {
                    let (left, right) = ([left(0), left(1)], [right(0), right(1)]);
                    let y = [y, y.add(BLOCK * stride)];
                    registers.two_by_two(left, right, steps.len(), y, stride * size_of::<f32>());
                }
                Unit::Lanes => {
                    let right = [right(0), right(1), right(2), right(3)];
                    let rows = BLOCK.min(self.shape.0 - rows.start * BLOCK);
                    simd::run(lanes::Block { left: left(0), right, steps: steps.len(), rows, y, stride });
                }
            }
        }
    }
}
