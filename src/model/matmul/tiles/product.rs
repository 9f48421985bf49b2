//! The product of two operands in tiles: blocks for the caches, shared out to threads.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
use super::strip::{Ahead, Strip};
use super::{BLOCK, TILE, Tiles, lanes};
use crate::model::matmul::{MatrixRowsMut, StartFrom};
use crate::model::simd;
use crate::numbers::aligned::AlignedVec;

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

/// Blocks of rows of a task.
const ROWS: usize = 32;
/// Steps of the depth at a time: two blocks of columns of this depth are 32 KiB, which stay in the first-level cache while rows stream past
/// from the second-level cache.
const DEPTH: usize = 16;
/// Steps up to which all rows of a task, 1 MiB, stay in the second-level cache while columns stream past, a strip at a time.
const SHALLOW: usize = 32;
/// Strips of a deeper product whose sums, 1 MiB, stay in the second-level cache while both operands stream past.
const STRIPS: usize = 16;
/// Blocks of rows up to which the whole depth is one part, so that weights come from memory in long runs.
const FEW: usize = 4;
/// Blocks of columns of a task: a multiple of what a unit takes at once.
const COLUMNS: usize = 4;
/// Multiply-adds, and numbers of the right operand, from which several threads share a product.
const PARALLEL_FROM: usize = 1 << 24;
const STREAMED_FROM: usize = 1 << 18;

thread_local! {
    /// Room for a task's sums.
    static SUMS: RefCell<AlignedVec<f32>> = RefCell::default();
}

/// y = start + left right.
///
/// # Shapes
/// - `left`: `(M, K)`, `right`: `(K, N)`, `y`: `(M, N)` inside rows of `y.stride`
pub fn multiply(left: &Tiles, right: &Tiles, start: StartFrom<'_>, y: MatrixRowsMut<'_>) {
    let (m, n, k) = (left.outer, right.outer, left.depth);
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0 && right.depth == k && y.stride >= n && y.data.len() >= (m - 1) * y.stride + n);
    if let StartFrom::Bias(bias) = start {
        assert!(bias.len() >= n);
    }
    let (y, stride) = (y.data.as_mut_ptr(), y.stride);
    let (left, right, steps) = (left.data.as_ptr(), right.data.as_ptr(), left.steps());
    let product = Product { left, right, steps, shape: (m, n), start, y, stride };
    let (rows, columns) = (m.div_ceil(BLOCK), n.div_ceil(BLOCK));
    let panel = rows.div_ceil(rows.div_ceil(ROWS)).next_multiple_of(2);
    let panels = rows.div_ceil(panel);
    let is_small = m * n * k < PARALLEL_FROM && n * k < STREAMED_FROM;
    let parts = if is_small { 1 } else { (8 * rayon::current_num_threads()).div_ceil(panels) };
    let width = columns.div_ceil(parts).next_multiple_of(COLUMNS);
    let parts = columns.div_ceil(width);
    let task = |i: usize| {
        let part = |i: usize, size: usize, all: usize| i * size..all.min((i + 1) * size);
        // SAFETY: the operands were checked to hold the shape, and no other task has these rows and columns.
        SUMS.with_borrow_mut(|sums| unsafe {
            product.task(part(i / parts, panel, rows), part(i % parts, width, columns), sums);
        });
    };
    if is_small {
        (0..panels * parts).for_each(task);
    } else {
        (0..panels * parts).into_par_iter().with_max_len(1).for_each(task);
    }
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

    /// Whether sums may begin at other places than they end.
    fn begins_anywhere(&self) -> bool {
        !matches!(self, Self::Lanes)
    }

    /// Blocks of rows and of columns that it takes at once, of a task with so many blocks of rows.
    fn shape(&self, rows: usize) -> (usize, usize) {
        match self {
            Self::Lanes => (1, 2),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) if rows == 1 => (1, 4),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) => (2, 2),
        }
    }
}

/// Cuts a range into parts of at most `size`.
fn parts(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size.max(1)).map(move |from| from..end.min(from + size))
}

/// Ranges are of blocks.
///
/// # Safety
/// All methods: rows and columns are inside the product's shape, its pointers are good for that, and nothing else uses this part of y.
impl Product<'_> {
    unsafe fn task(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut AlignedVec<f32>) {
        let unit = Unit::take();
        let (high, wide) = unit.shape(rows.len());
        let is_few = rows.len() <= FEW;
        let depth = if is_few { self.steps } else { self.steps.div_ceil(self.steps.div_ceil(DEPTH)) };
        let strips = if is_few || self.steps <= SHALLOW { 1 } else { STRIPS };
        // Of a strip: all rows, rounded up to what the unit takes. One more strip is still written to y.
        let (stride, size) = (wide * BLOCK, rows.len().next_multiple_of(2) * BLOCK * wide * BLOCK);
        let room = strips.max(2);
        sums.reuse(room * size);
        let sums = sums.as_mut_ptr();
        let calls = rows.len().div_ceil(high);
        let mut done: Option<Strip> = None;
        for tile in parts(columns.clone(), strips * wide) {
            for steps in parts(0..self.steps, depth) {
                for strip in parts(tile.clone(), wide) {
                    let sums = sums.wrapping_add((strip.start - columns.start) / wide % room * size);
                    let mut ahead =
                        if is_few { Ahead::default() } else { self.ahead(&rows, (&tile, &strip), &steps, calls) };
                    for rows_at_once in parts(rows.clone(), high) {
                        ahead.prefetch();
                        let sums = (sums.wrapping_add((rows_at_once.start - rows.start) * BLOCK * stride), stride);
                        let call = Call { rows: rows_at_once, columns: strip.clone(), steps: steps.clone(), sums };
                        // SAFETY: parts of the ranges; the sums have room for all rows.
                        unsafe {
                            if let Some(done) = &mut done {
                                done.write_some();
                            }
                            self.call(&unit, (high, wide), &call);
                        }
                    }
                    if steps.end == self.steps {
                        let next = Some(self.strip(&rows, &strip, (sums, stride), calls));
                        // SAFETY: as above.
                        std::mem::replace(&mut done, next)
                            .into_iter()
                            .for_each(|mut done| unsafe { done.write_rest() });
                    }
                }
            }
        }
        // SAFETY: as above.
        done.into_iter().for_each(|mut done| unsafe { done.write_rest() });
    }

    /// What to prefetch during `calls` calls of the unit on these rows and columns: the right operand of the next strip, and what its sums
    /// begin as.
    fn ahead(
        &self,
        rows: &Range<usize>,
        (tile, strip): (&Range<usize>, &Range<usize>),
        steps: &Range<usize>,
        calls: usize,
    ) -> Ahead {
        let (column, step) = match strip.end < tile.end {
            true => (strip.end, steps.start),
            false if steps.end < self.steps => (tile.start, steps.end),
            false => (tile.end, 0),
        };
        let tiles = [column, column + 1].map(|block| self.right.wrapping_add((block * self.steps + step) * TILE));
        let y = self.y.wrapping_add(rows.start * BLOCK * self.stride + column * BLOCK);
        let rows = if step == 0 && matches!(self.start, StartFrom::Add) { rows.len() * BLOCK } else { 0 };
        Ahead::new((tiles, steps.len() * TILE), (y, self.stride, rows), calls)
    }

    /// The numbers of y in these rows and columns: the first row and column, and how many there are.
    fn part_of_y(&self, rows: &Range<usize>, columns: &Range<usize>) -> ((usize, usize), (usize, usize)) {
        let (row, column) = (rows.start * BLOCK, columns.start * BLOCK);
        ((row, column), (self.shape.0.min(rows.end * BLOCK) - row, self.shape.1.min(columns.end * BLOCK) - column))
    }

    /// A strip whose sums are done.
    fn strip(&self, rows: &Range<usize>, columns: &Range<usize>, sums: (*const f32, usize), calls: usize) -> Strip {
        let ((row, column), shape) = self.part_of_y(rows, columns);
        let y = self.y.wrapping_add(row * self.stride + column);
        Strip::new(sums, (y, self.stride), shape, self.shape.0 * self.shape.1, calls)
    }

    /// Adds some steps of the depth to some blocks.
    unsafe fn call(&self, unit: &Unit, (high, wide): (usize, usize), call: &Call) {
        // SAFETY: the sums begin as y or on their own.
        unsafe {
            let begin = if call.steps.start == 0 { self.begin(unit, (high, wide), call) } else { call.sums_begin() };
            self.multiply(unit, high, call, begin);
        }
    }

    /// Where the sums begin: at y, the bias or zero if these are as wide and high as the unit takes; else they are copied.
    unsafe fn begin(&self, unit: &Unit, (high, wide): (usize, usize), call: &Call) -> (*const f32, usize) {
        let ((row, column), shape) = self.part_of_y(&call.rows, &call.columns);
        let y = (self.y.wrapping_add(row * self.stride + column).cast_const(), self.stride);
        let is_wide = shape.1 == wide * BLOCK;
        match self.start {
            StartFrom::Zero if unit.begins_anywhere() => (ZEROS.0.as_ptr(), 0),
            StartFrom::Bias(bias) if unit.begins_anywhere() && is_wide => (bias[column..].as_ptr(), 0),
            StartFrom::Add if unit.begins_anywhere() && is_wide && shape.0 == high * BLOCK => y,
            // SAFETY: rows of the sums, and parts of rows of y.
            _ => unsafe {
                for r in 0..high * BLOCK {
                    let to = call.sums.0.add(r * call.sums.1);
                    to.write_bytes(0, wide * BLOCK);
                    match self.start {
                        StartFrom::Bias(bias) => to.copy_from_nonoverlapping(bias[column..].as_ptr(), shape.1),
                        StartFrom::Add if r < shape.0 => to.copy_from_nonoverlapping(y.0.add(r * y.1), shape.1),
                        _ => {}
                    }
                }
                call.sums_begin()
            },
        }
    }

    /// sums = begin + some steps of the product. A missing block is a copy of the last one there.
    unsafe fn multiply(&self, unit: &Unit, high: usize, call: &Call, begin: (*const f32, usize)) {
        let Call { rows, columns, steps, sums } = call;
        // SAFETY: blocks and steps inside the operands.
        unsafe {
            let tile = |data: *const bf16, block: usize| data.add((block * self.steps + steps.start) * TILE);
            let left = |i: usize| tile(self.left, (rows.start + i).min(rows.end - 1));
            let right = |i: usize| tile(self.right, (columns.start + i).min(columns.end - 1));
            match unit {
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Unit::Amx(registers) if high == 1 => {
                    let right = [right(0), right(1), right(2), right(3)];
                    registers.one_by_four(left(0), right, steps.len(), &amx::Sums::new(begin, *sums));
                }
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Unit::Amx(registers) => {
                    let (left, right) = ([left(0), left(1)], [right(0), right(1)]);
                    registers.two_by_two(left, right, steps.len(), &amx::Sums::new(begin, *sums));
                }
                Unit::Lanes => {
                    let rows = BLOCK.min(self.shape.0 - rows.start * BLOCK);
                    let (left, right) = (left(0), [right(0), right(1)]);
                    simd::run(lanes::Block { left, right, steps: steps.len(), rows, sums: sums.0, stride: sums.1 });
                }
            }
        }
    }
}

/// What the unit does at once, in blocks and steps.
struct Call {
    rows: Range<usize>,
    columns: Range<usize>,
    steps: Range<usize>,
    /// The sums, and numbers from one row to the next.
    sums: (*mut f32, usize),
}

impl Call {
    fn sums_begin(&self) -> (*const f32, usize) {
        (self.sums.0, self.sums.1)
    }
}

/// A row of sums that begin as zero.
#[repr(C, align(64))]
struct Row([f32; COLUMNS * BLOCK]);

static ZEROS: Row = Row([0.0; COLUMNS * BLOCK]);
