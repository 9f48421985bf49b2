//! Matrix products as dot products along the depth, sixteen lanes at a time. Weights are read once, as stored, however few rows there
//! are.

use std::ops::Range;

use rayon::prelude::*;

use super::{COLS, DEPTH, PARALLEL_FROM, ROW_PANEL, ROWS, StartFrom};
use crate::model::simd::{self, Kernel, LANES, Simd};

/// y = start + x w^T, with x `(m, k)`, w `(n, k)`, y in rows of `y_stride`.
#[derive(Clone, Copy)]
pub struct DotProduct<'a> {
    pub x: *const f32,
    pub w: *const f32,
    pub y: *mut f32,
    pub y_stride: usize,
    pub start: StartFrom<'a>,
    pub m: usize,
    pub k: usize,
}

// SAFETY: threads share it in `columns`, where x and w are only read and each task writes its own columns of y.
unsafe impl Sync for DotProduct<'_> {}

impl DotProduct<'_> {
    /// # Safety
    /// x points at `m * k` numbers, w at `n * k`, y at m rows of `n` numbers `y_stride` apart, which nothing else uses meanwhile.
    pub unsafe fn run(self, n: usize) {
        let columns = columns_per_task(self.m, n, self.k);
        if columns >= n {
            // SAFETY: w and y have `n` columns.
            return unsafe { simd::run(Columns { task: self, from: 0, to: n }) };
        }
        (0..n.div_ceil(columns)).into_par_iter().for_each(|i| {
            let (from, to) = (i * columns, ((i + 1) * columns).min(n));
            // SAFETY: w and y have `n` columns, of which no other task writes these.
            unsafe { simd::run(Columns { task: self, from, to }) }
        });
    }
}

/// Count of weights from which they are taken to come from memory, where even one row is worth a second thread.
const STREAMED_FROM: usize = 1 << 19;

/// Columns of the output that one task takes: all, or as many as give each thread a few tasks.
fn columns_per_task(m: usize, n: usize, k: usize) -> usize {
    if m * n * k < PARALLEL_FROM && n * k < STREAMED_FROM {
        return n;
    }
    let tasks = (m * n * k / PARALLEL_FROM * 2).clamp(2, 4 * rayon::current_num_threads());
    n.div_ceil(tasks).next_multiple_of(COLS)
}

struct Columns<'a> {
    task: DotProduct<'a>,
    from: usize,
    to: usize,
}

/// How far ahead the hot loop prefetches from the second-level cache (numbers).
const NEAR: usize = 8 * LANES;

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
                    let block = Block { col, cols: COLS.min(self.to - col), from, depth };
                    // SAFETY: columns below `to`, rows below `m` and the depth below `k`: inside what the pointers are good for.
                    unsafe { block.rows::<S>(t, rows.clone()) }
                }
            }
        }
    }
}

/// Some columns of the output, over a part of the depth.
struct Block {
    col: usize,
    cols: usize,
    from: usize,
    depth: usize,
}

/// Columns of the next block whose weights a block of rows prefetches: half of them if there are several blocks of rows, else all. A
/// prefetch costs as much as a load, so no two blocks prefetch the same columns.
const SHARE: usize = COLS / 2;
const ALL: usize = COLS;
/// # Safety
/// All methods: the processor has S; block and rows are inside the product's shape, and its pointers are good for that.
impl Block {
    #[inline(always)]
    unsafe fn rows<S: Simd>(&self, t: &DotProduct<'_>, rows: Range<usize>) {
        // SAFETY: each pointer starts a column of the block, or repeats the last one, at a depth below `k`; parts of `rows`.
        unsafe {
            let w: [*const f32; COLS] =
                std::array::from_fn(|c| t.w.add((self.col + c.min(self.cols - 1)) * t.k + self.from));
            if rows.len() <= ROWS {
                self.some_rows::<S, ALL>(t, rows, w, w.map(|w| w.wrapping_add(COLS * t.k)));
                return;
            }
            let blocks = rows.len().div_ceil(ROWS);
            for (i, row) in rows.clone().step_by(ROWS).enumerate() {
                let ahead = share_of_next_columns(w, (i, blocks), t.k);
                self.some_rows::<S, SHARE>(t, row..rows.end.min(row + ROWS), w, ahead);
            }
        }
    }

    #[inline(always)]
    unsafe fn some_rows<S: Simd, const AHEAD: usize>(
        &self,
        t: &DotProduct<'_>,
        rows: Range<usize>,
        w: [*const f32; COLS],
        ahead: [*const f32; AHEAD],
    ) {
        // SAFETY: as many rows as each instance takes.
        unsafe {
            match rows.len() {
                ROWS => self.sums::<S, ROWS, AHEAD>(t, rows.start, w, ahead),
                3 => self.sums::<S, 3, AHEAD>(t, rows.start, w, ahead),
                2 => self.sums::<S, 2, AHEAD>(t, rows.start, w, ahead),
                _ => self.sums::<S, 1, AHEAD>(t, rows.start, w, ahead),
            }
        }
    }

    /// R x [`COLS`] dot products along the depth.
    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const AHEAD: usize>(
        &self,
        t: &DotProduct<'_>,
        row: usize,
        w: [*const f32; COLS],
        ahead: [*const f32; AHEAD],
    ) {
        // SAFETY: rows below `m`, a depth below `k`, and `lanes` has room for all sums.
        unsafe {
            let x: [*const f32; R] = std::array::from_fn(|r| t.x.add((row + r) * t.k + self.from));
            let mut lanes = Lanes([[[0.0; LANES]; COLS]; R]);
            S::apart(DotLanes { x, w, len: self.depth, ahead, to: lanes.0.as_mut_ptr().cast() });
            let mut sums = [[0.0; 8]; R];
            for first in [0, 4] {
                let mut parts = [[S::splat(0.0); 4]; 4];
                for (parts, row) in parts.iter_mut().zip(&lanes.0) {
                    for (part, lanes) in parts.iter_mut().zip(&row[first..]) {
                        *part = S::load(lanes.as_ptr());
                    }
                }
                let four = S::sum_block(&parts);
                for (sums, four) in sums.iter_mut().zip(four) {
                    sums[first..first + 4].copy_from_slice(&four);
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                finish(t, self, row + r, std::array::from_fn(|c| sums[c]));
            }
        }
    }
}

/// The sixteen partial sums of each sum of a block.
#[repr(C, align(64))]
struct Lanes<const R: usize>([[[f32; LANES]; COLS]; R]);

/// The weights of the next columns that block `block` of `blocks` prefetches while it uses the present ones: each block takes a share, so
/// that memory is always busy. Beyond the share it repeats a pointer that is being read anyway.
fn share_of_next_columns(w: [*const f32; COLS], (block, blocks): (usize, usize), k: usize) -> [*const f32; SHARE] {
    let first = (block * COLS).div_ceil(blocks);
    let end = ((block + 1) * COLS).div_ceil(blocks);
    std::array::from_fn(|i| if first + i < end { w[first + i].wrapping_add(COLS * k) } else { w[0] })
}

/// The hot loop, sixteen lanes at a time; the tail is padded with zeros, which change no sum. Sums stay in registers as long as nothing
/// takes their address or indexes them with a variable, so they leave through `to`. It uses loops instead of closures: a closure may
/// be compiled on its own, without the instruction set, and each load in it would be a call. It is a kernel, and so a function of its
/// own: among other code the compiler keeps half of the sums on the stack.
struct DotLanes<const R: usize, const AHEAD: usize> {
    /// Each points at `len` numbers.
    x: [*const f32; R],
    w: [*const f32; COLS],
    len: usize,
    ahead: [*const f32; AHEAD],
    /// [`Lanes`] of R rows.
    to: *mut f32,
}

impl<const R: usize, const AHEAD: usize> Kernel for DotLanes<R, AHEAD> {
    type Out = ();

    #[allow(clippy::needless_range_loop)] // they are unrolled: no index is left
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, w, len, ahead, to } = self;
        // SAFETY: `i + 2 * LANES` is at most `len` in the first loop, and the second loads only what is left.
        unsafe {
            let mut acc = [[S::splat(0.0); COLS]; R];
            let whole = len - len % (2 * LANES);
            for i in (0..whole).step_by(2 * LANES) {
                prefetch::<S, R, AHEAD>(x, w, i, ahead);
                for second in [false, true] {
                    let mut weights = [S::splat(0.0); COLS];
                    for c in 0..COLS {
                        weights[c] = S::load(w[c].add(i + usize::from(second) * LANES));
                    }
                    for r in 0..R {
                        let x = S::load(x[r].add(i + usize::from(second) * LANES));
                        for c in 0..COLS {
                            acc[r][c] = S::mul_add(x, weights[c], acc[r][c]);
                        }
                    }
                }
            }
            for r in 0..R {
                for c in 0..COLS {
                    S::store(acc[r][c], to.add((r * COLS + c) * LANES));
                }
            }
            for i in (whole..len).step_by(LANES) {
                for c in 0..COLS {
                    let w = load_part::<S>(w[c].add(i), LANES.min(len - i));
                    for r in 0..R {
                        let x = load_part::<S>(x[r].add(i), LANES.min(len - i));
                        let to = to.add((r * COLS + c) * LANES);
                        S::store(S::mul_add(x, w, S::load(to)), to);
                    }
                }
            }
        }
    }
}

/// The first `len` numbers, at most sixteen, padded with zeros.
///
/// # Safety
/// The processor has S, and `from` points at `len` numbers.
#[inline(always)]
unsafe fn load_part<S: Simd>(from: *const f32, len: usize) -> S::V {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: `len` numbers are read, and as many lanes as a load takes.
    unsafe {
        (0..len).for_each(|lane| lanes[lane] = *from.add(lane));
        S::load(lanes.as_ptr())
    }
}

/// Prefetches for the hot loop at `i`: the next columns from memory, and its own next numbers from the second-level cache.
#[allow(clippy::needless_range_loop)] // as above
#[inline(always)]
fn prefetch<S: Simd, const R: usize, const AHEAD: usize>(
    x: [*const f32; R],
    w: [*const f32; COLS],
    i: usize,
    ahead: [*const f32; AHEAD],
) {
    for c in 0..AHEAD {
        for line in [0, LANES] {
            S::prefetch(ahead[c].wrapping_add(i + line));
        }
    }
    for i in [i + NEAR, i + NEAR + LANES] {
        for c in 0..COLS {
            S::prefetch_near(w[c].wrapping_add(i));
        }
        for r in 0..R {
            S::prefetch_near(x[r].wrapping_add(i));
        }
    }
}

/// Adds the sums of one row to their start, or to the sums over the depth before.
///
/// # Safety
/// The row and the block's columns are inside y, and inside the bias if there is one.
#[inline(always)]
unsafe fn finish(t: &DotProduct<'_>, block: &Block, row: usize, sums: [f32; COLS]) {
    // SAFETY: only `block.cols` numbers of the row are read and written.
    unsafe {
        let y = t.y.add(row * t.y_stride + block.col);
        let start = match t.start {
            _ if block.from > 0 => first(y, block.cols),
            StartFrom::Zero => [0.0; COLS],
            StartFrom::Bias(bias) => first(bias.as_ptr().add(block.col), block.cols),
            StartFrom::Add => first(y, block.cols),
        };
        let sums: [f32; COLS] = std::array::from_fn(|c| sums[c] + start[c]);
        if block.cols == COLS {
            y.cast::<[f32; COLS]>().write_unaligned(sums);
        } else {
            std::ptr::copy_nonoverlapping(sums.as_ptr(), y, block.cols);
        }
    }
}

/// The first `len` numbers, padded with zeros.
///
/// # Safety
/// `from` points at `len` numbers, of which there are at most [`COLS`].
#[inline(always)]
unsafe fn first(from: *const f32, len: usize) -> [f32; COLS] {
    let mut numbers = [0.0; COLS];
    // SAFETY: at most `len` numbers are read, and `numbers` has room for them.
    unsafe {
        if len == COLS {
            return from.cast::<[f32; COLS]>().read_unaligned();
        }
        std::ptr::copy_nonoverlapping(from, numbers.as_mut_ptr(), len);
    }
    numbers
}
