//! Products by dot products along the depth, sixteen lanes at a time: weights are read once, as they stand, however few the rows.

use rayon::prelude::*;

use super::{PARALLEL_FROM, Shared, Start};
use crate::model::simd::{self, Kernel, LANES, Simd};

/// y = start + x w^T, with x `(m, k)`, w `(n, k)`, y in rows of `y_stride`.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    pub x: *const f32,
    pub w: *const f32,
    pub y: *mut f32,
    pub y_stride: usize,
    pub start: Start<'a>,
    pub m: usize,
    pub k: usize,
}

impl Product<'_> {
    /// # Safety
    /// The pointers are good for the shape, `n` columns of the output, and nothing else uses `y` meanwhile.
    pub unsafe fn run(self, n: usize) {
        let (task, columns) = (Shared(self), columns_a_task(self.m, n, self.k));
        if columns >= n {
            // SAFETY: the caller's.
            return unsafe { simd::run(Columns { task: task.get(), from: 0, to: n }) };
        }
        (0..n.div_ceil(columns)).into_par_iter().for_each(|i| {
            let (from, to) = (i * columns, ((i + 1) * columns).min(n));
            // SAFETY: the caller's; each task writes its own columns.
            unsafe { simd::run(Columns { task: task.get(), from, to }) }
        });
    }
}

/// Columns of the output one task takes: all, or a part that keeps each thread busy a few times.
fn columns_a_task(m: usize, n: usize, k: usize) -> usize {
    if m * n * k < PARALLEL_FROM {
        return n;
    }
    let tasks = (m * n * k / PARALLEL_FROM * 2).clamp(2, 4 * rayon::current_num_threads());
    n.div_ceil(tasks).next_multiple_of(COLS)
}

struct Columns<'a> {
    task: Product<'a>,
    from: usize,
    to: usize,
}

/// Rows and columns of the register block: 24 accumulators of the 32 vector registers, and 10 loads for 24 multiply-adds. The more
/// columns, the seldomer x comes from the second-level cache.
const ROWS: usize = 4;
const COLS: usize = 6;
/// Depth of a block: the rows of the weight, 24 KiB, and of x, 16 KiB, stay in the first-level cache.
const DEPTH: usize = 1024;
/// Rows of x, 1 MiB of a block's depth, that stay in the second-level cache while the weight streams past.
const ROW_PANEL: usize = 256;

impl Kernel for Columns<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let t = &self.task;
        for panel in (0..t.m).step_by(ROW_PANEL) {
            let rows = panel..(panel + ROW_PANEL).min(t.m);
            for from in (0..t.k).step_by(DEPTH) {
                let depth = DEPTH.min(t.k - from);
                for col in (self.from..self.to).step_by(COLS) {
                    let cols = COLS.min(self.to - col);
                    for row in rows.clone().step_by(ROWS) {
                        let ahead = share_of_next_columns((row - panel) / ROWS, rows.len().div_ceil(ROWS), t.k);
                        let block = Block { row, col, cols, from, depth, ahead };
                        // SAFETY: the block stays inside the asserted shapes.
                        unsafe {
                            match rows.end - row {
                                ROWS.. => dot_block::<S, ROWS>(t, &block),
                                3 => dot_block::<S, 3>(t, &block),
                                2 => dot_block::<S, 2>(t, &block),
                                _ => dot_block::<S, 1>(t, &block),
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A part of the output that is made at once, from a part of the depth.
struct Block {
    row: usize,
    col: usize,
    cols: usize,
    from: usize,
    depth: usize,
    /// How far ahead of each column's weights to prefetch; 0 is what is being read.
    ahead: [usize; COLS],
}

/// The weights of the next columns come from memory while those of the present ones meet one block of rows after the other; each
/// of `blocks` fetches its share of them, so that memory is busy all the time.
fn share_of_next_columns(block: usize, blocks: usize, k: usize) -> [usize; COLS] {
    std::array::from_fn(|c| if c * blocks / COLS == block { COLS * k } else { 0 })
}

/// R x [`COLS`] dot products along the depth, sixteen lanes at a time; the tail is padded with zeros, which changes no sum. Columns beyond
/// the last are computed from the last again and dropped.
#[inline(always)]
unsafe fn dot_block<S: Simd, const R: usize>(t: &Product<'_>, block: &Block) {
    unsafe {
        let (k, depth) = (t.k, block.depth);
        let x: [*const f32; R] = std::array::from_fn(|r| t.x.add((block.row + r) * k + block.from));
        let w: [*const f32; COLS] =
            std::array::from_fn(|c| t.w.add((block.col + c.min(block.cols - 1)) * k + block.from));
        let whole = depth - depth % LANES;
        let mut acc = dot_lanes::<S, R>(x, w, whole, block.ahead);
        if whole < depth {
            let part = |from: *const f32| load_part::<S>(from.add(whole), depth - whole);
            for (acc, x) in acc.iter_mut().zip(x) {
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = S::mul_add(part(x), part(w), *acc);
                }
            }
        }
        let mut sums = [[0.0; COLS]; R];
        for first in (0..COLS).step_by(4) {
            let of = |r: usize, c: usize| if r < R && c < COLS { acc[r][c] } else { S::splat(0.0) };
            let four = S::sum_block(&std::array::from_fn(|r| std::array::from_fn(|c| of(r, first + c))));
            for (sums, four) in sums.iter_mut().zip(four) {
                sums[first..].iter_mut().zip(four).for_each(|(sum, four)| *sum = four);
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            finish(t, block, block.row + r, sums);
        }
    }
}

/// The hot loop, by itself: sums that nothing else takes the address of stay in registers.
#[inline(always)]
unsafe fn dot_lanes<S: Simd, const R: usize>(
    x: [*const f32; R],
    w: [*const f32; COLS],
    len: usize,
    ahead: [usize; COLS],
) -> [[S::V; COLS]; R] {
    unsafe {
        let mut acc = [[S::splat(0.0); COLS]; R];
        for i in (0..len).step_by(LANES) {
            (0..COLS).for_each(|c| S::prefetch(w[c].wrapping_add(ahead[c] + i)));
            let w = w.map(|w| S::load(w.add(i)));
            for r in 0..R {
                let x = S::load(x[r].add(i));
                acc[r] = std::array::from_fn(|c| S::mul_add(x, w[c], acc[r][c]));
            }
        }
        acc
    }
}

/// Adds the sums of one row to what they start from, or to those of the depth before.
#[inline(always)]
unsafe fn finish(t: &Product<'_>, block: &Block, row: usize, sums: [f32; COLS]) {
    unsafe {
        let y = t.y.add(row * t.y_stride + block.col);
        let start = match t.start {
            _ if block.from > 0 => first(y, block.cols),
            Start::Zero => [0.0; COLS],
            Start::Bias(bias) => first(bias.as_ptr().add(block.col), block.cols),
            Start::Add => first(y, block.cols),
        };
        let sums: [f32; COLS] = std::array::from_fn(|c| sums[c] + start[c]);
        if block.cols == COLS {
            y.cast::<[f32; COLS]>().write_unaligned(sums);
        } else {
            std::ptr::copy_nonoverlapping(sums.as_ptr(), y, block.cols);
        }
    }
}

/// The first `len` of some numbers, zeros after them.
#[inline(always)]
unsafe fn first(from: *const f32, len: usize) -> [f32; COLS] {
    let mut numbers = [0.0; COLS];
    unsafe {
        if len == COLS {
            return from.cast::<[f32; COLS]>().read_unaligned();
        }
        std::ptr::copy_nonoverlapping(from, numbers.as_mut_ptr(), len);
    }
    numbers
}

#[inline(always)]
unsafe fn load_part<S: Simd>(from: *const f32, len: usize) -> S::V {
    let mut lanes = [0.0f32; LANES];
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), len);
        S::load(lanes.as_ptr())
    }
}
