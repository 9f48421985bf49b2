//! The three products of a linear layer: forward, gradient of its input, gradient of its weight.
//!
//! Every output is one chain of multiply-adds in an order that depends on its own row and column alone, so a row's result has the
//! same bits whatever else is in the batch, on however many threads. That is what lets a sampled log-probability equal the
//! trainer's. A library product chooses its order by the shape of the batch.

#![allow(unsafe_code)] // pointers into disjoint parts of one output; each function checks its bounds first

use rayon::prelude::*;

use super::simd::{self, Kernel, LANES, Simd};

/// A matrix inside a larger one: row `i` is `data[i * stride..][..width]`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
}

/// As [`Rows`], to write to.
pub struct RowsMut<'a> {
    data: &'a mut [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Columns from `column` on of a matrix whose rows are `stride` long.
    pub fn new(data: &'a [f32], stride: usize, column: usize) -> Self {
        Self { data: &data[column.min(data.len())..], stride }
    }
}

impl<'a> RowsMut<'a> {
    /// Columns from `column` on of a matrix whose rows are `stride` long.
    pub fn new(data: &'a mut [f32], stride: usize, column: usize) -> Self {
        let column = column.min(data.len());
        Self { data: &mut data[column..], stride }
    }
}

/// What an output starts from.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// Zero.
    Zero,
    /// The bias, `[N]`.
    Bias(&'a [f32]),
    /// What it holds already: a residual connection.
    Add,
}

/// Multiply-adds below which a product stays on one thread: starting a second costs about as much.
const PARALLEL_FROM: usize = 1 << 20;

#[derive(Clone, Copy)]
struct Shared<T>(T);
// SAFETY: each task writes rows or columns that no other task touches; see the callers.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    fn get(&self) -> T {
        self.0
    }
}

/// y = x w^T + start: a linear layer.
///
/// # Shapes
/// - `x`: `(M, K)`, `w`: `(N, K)` without gaps, `y`: `(M, N)` inside rows of `y.stride`
pub fn linear(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), start: Start<'_>, y: RowsMut<'_>) {
    if m == 0 {
        return;
    }
    assert!(x.len() >= m * k && w.len() >= n * k && y.data.len() >= (m - 1) * y.stride + n);
    if let Start::Bias(bias) = start {
        assert!(bias.len() >= n);
    }
    let task = LinearTask { x: x.as_ptr(), w: w.as_ptr(), y: y.data.as_mut_ptr(), y_stride: y.stride, start, m, k };
    let task = Shared(task);
    let columns = columns_a_task(m, n, k);
    if columns >= n {
        // SAFETY: bounds asserted above.
        return unsafe { simd::run(LinearColumns { task: task.get(), from: 0, to: n }) };
    }
    (0..n.div_ceil(columns)).into_par_iter().for_each(|i| {
        let (from, to) = (i * columns, ((i + 1) * columns).min(n));
        // SAFETY: bounds asserted above; each task writes its own columns.
        unsafe { simd::run(LinearColumns { task: task.get(), from, to }) }
    });
}

/// Columns of the output one task takes: all, or a part that keeps each thread busy a few times.
fn columns_a_task(m: usize, n: usize, k: usize) -> usize {
    if m * n * k < PARALLEL_FROM {
        return n;
    }
    let tasks = (m * n * k / PARALLEL_FROM * 2).clamp(2, 4 * rayon::current_num_threads());
    n.div_ceil(tasks).next_multiple_of(COLS)
}

#[derive(Clone, Copy)]
struct LinearTask<'a> {
    x: *const f32,
    w: *const f32,
    y: *mut f32,
    y_stride: usize,
    start: Start<'a>,
    m: usize,
    k: usize,
}

struct LinearColumns<'a> {
    task: LinearTask<'a>,
    from: usize,
    to: usize,
}

/// Rows and columns of the register block: 16 accumulators, and 8 loads for 16 multiply-adds.
const ROWS: usize = 4;
const COLS: usize = 4;
/// Rows of x that stay in the second-level cache while the weight streams past.
const ROW_PANEL: usize = 96;

impl Kernel for LinearColumns<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let t = &self.task;
        for panel in (0..t.m).step_by(ROW_PANEL) {
            let rows = panel..(panel + ROW_PANEL).min(t.m);
            for col in (self.from..self.to).step_by(COLS) {
                for row in rows.clone().step_by(ROWS) {
                    let block = Block { row, col, rows: ROWS.min(rows.end - row), cols: COLS.min(self.to - col) };
                    // SAFETY: the block stays inside the asserted shapes.
                    unsafe {
                        match block.rows {
                            ROWS => dot_block::<S, ROWS>(t, &block),
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

/// A part of the output that is made at once.
struct Block {
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
}

/// R x 4 dot products along K, sixteen lanes at a time; the tail is padded with zeros, which changes no sum. Columns beyond the
/// last are computed from the last again and dropped.
#[inline(always)]
unsafe fn dot_block<S: Simd, const R: usize>(t: &LinearTask<'_>, block: &Block) {
    unsafe {
        let k = t.k;
        let x: [*const f32; R] = std::array::from_fn(|r| t.x.add((block.row + r) * k));
        let w: [*const f32; COLS] = std::array::from_fn(|c| t.w.add((block.col + c.min(block.cols - 1)) * k));
        let mut acc = [[S::splat(0.0); COLS]; ROWS];
        let mut i = 0;
        while i + LANES <= k {
            let w = w.map(|w| S::load(w.add(i)));
            for (acc, x) in acc.iter_mut().zip(x) {
                let x = S::load(x.add(i));
                for c in 0..COLS {
                    acc[c] = S::mul_add(x, w[c], acc[c]);
                }
            }
            i += LANES;
        }
        if i < k {
            for (acc, x) in acc.iter_mut().zip(x) {
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = S::mul_add(load_part::<S>(x.add(i), k - i), load_part::<S>(w.add(i), k - i), *acc);
                }
            }
        }
        let sums = S::sum_block(&acc);
        for (r, sums) in sums.iter().enumerate().take(R) {
            for (c, sum) in sums.iter().enumerate().take(block.cols) {
                let y = t.y.add((block.row + r) * t.y_stride + block.col + c);
                *y = sum
                    + match t.start {
                        Start::Zero => 0.0,
                        Start::Bias(bias) => *bias.get_unchecked(block.col + c),
                        Start::Add => *y,
                    };
            }
        }
    }
}

#[inline(always)]
unsafe fn load_part<S: Simd>(from: *const f32, len: usize) -> S::V {
    let mut lanes = [0.0f32; LANES];
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), len);
        S::load(lanes.as_ptr())
    }
}

/// dx += dy w: the gradient of a linear layer's input.
///
/// # Shapes
/// - `dy`: `(M, N)` rows, `w`: `(N, K)`, `dx`: `(M, K)`
pub fn input_gradient(dy: Rows<'_>, w: &[f32], (m, n, k): (usize, usize, usize), dx: &mut [f32]) {
    if m == 0 {
        return;
    }
    assert!(dy.data.len() >= (m - 1) * dy.stride + n && w.len() >= n * k && dx.len() >= m * k);
    let a = Operand { data: dy.data.as_ptr(), row: dy.stride, depth: 1 };
    accumulate(a, w, (m, n, k), dx);
}

/// dw += dy^T x: the gradient of a linear layer's weight.
///
/// # Shapes
/// - `dy`: `(M, N)` rows, `x`: `(M, K)`, `dw`: `(N, K)`
pub fn weight_gradient(dy: Rows<'_>, x: &[f32], (m, n, k): (usize, usize, usize), dw: &mut [f32]) {
    if m == 0 {
        return;
    }
    assert!(dy.data.len() >= (m - 1) * dy.stride + n && x.len() >= m * k && dw.len() >= n * k);
    let a = Operand { data: dy.data.as_ptr(), row: 1, depth: dy.stride };
    accumulate(a, x, (n, m, k), dw);
}

/// Element (i, p) of the left operand is `data[i * row + p * depth]`.
#[derive(Clone, Copy)]
struct Operand {
    data: *const f32,
    row: usize,
    depth: usize,
}

/// Depth of a packed block: 128 x 64 numbers of the right operand are 32 KiB, a first-level cache.
const DEPTH: usize = 128;
/// Rows and vectors of the register block.
const BLOCK_ROWS: usize = 6;
const BLOCK_VECTORS: usize = 4;
const BLOCK_COLS: usize = BLOCK_VECTORS * LANES;

/// c += a b with c `(rows, cols)`, b `(depth, cols)`: both operands packed block by block, the depth always in ascending order.
fn accumulate(a: Operand, b: &[f32], (rows, depth, cols): (usize, usize, usize), c: &mut [f32]) {
    let a = Shared(a);
    let block = |first_row: usize, c: &mut [f32]| {
        let task =
            OuterProduct { a: a.get(), first_row, b: b.as_ptr(), depth, cols, rows: c.len() / cols, c: c.as_mut_ptr() };
        // SAFETY: the callers asserted the shapes; c is this task's alone.
        unsafe { simd::run(task) }
    };
    let c = &mut c[..rows * cols];
    if rows * depth * cols < PARALLEL_FROM {
        return block(0, c);
    }
    let rows_a_task = rows.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(BLOCK_ROWS);
    c.par_chunks_mut(rows_a_task * cols).enumerate().for_each(|(i, c)| block(i * rows_a_task, c));
}

struct OuterProduct {
    a: Operand,
    first_row: usize,
    b: *const f32,
    depth: usize,
    cols: usize,
    rows: usize,
    c: *mut f32,
}

impl Kernel for OuterProduct {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let row_blocks = self.rows.div_ceil(BLOCK_ROWS);
        let mut packed_a = vec![0.0f32; row_blocks * BLOCK_ROWS * DEPTH];
        let mut packed_b = vec![0.0f32; DEPTH * BLOCK_COLS];
        for from in (0..self.depth).step_by(DEPTH) {
            let depth = DEPTH.min(self.depth - from);
            // SAFETY: the callers of `accumulate` asserted the shapes.
            unsafe {
                self.pack_a(from, depth, &mut packed_a);
                for col in (0..self.cols).step_by(BLOCK_COLS) {
                    let cols = BLOCK_COLS.min(self.cols - col);
                    self.pack_b(from, depth, col, cols, &mut packed_b);
                    for block in 0..row_blocks {
                        let a = packed_a.as_ptr().add(block * BLOCK_ROWS * DEPTH);
                        self.multiply::<S>(a, packed_b.as_ptr(), depth, (block * BLOCK_ROWS, col, cols));
                    }
                }
            }
        }
    }
}

impl OuterProduct {
    /// `packed[block][p][r]`, missing rows zero.
    #[inline(always)]
    unsafe fn pack_a(&self, from: usize, depth: usize, packed: &mut [f32]) {
        for (block, packed) in packed.chunks_exact_mut(BLOCK_ROWS * DEPTH).enumerate() {
            let first = block * BLOCK_ROWS;
            let rows = BLOCK_ROWS.min(self.rows - first);
            for (p, packed) in packed.chunks_exact_mut(BLOCK_ROWS).take(depth).enumerate() {
                for (r, packed) in packed.iter_mut().enumerate().take(rows) {
                    let at = (self.first_row + first + r) * self.a.row + (from + p) * self.a.depth;
                    *packed = unsafe { *self.a.data.add(at) };
                }
            }
        }
    }

    /// `packed[p][col]`, missing columns zero.
    #[inline(always)]
    unsafe fn pack_b(&self, from: usize, depth: usize, col: usize, cols: usize, packed: &mut [f32]) {
        for (p, packed) in packed.chunks_exact_mut(BLOCK_COLS).take(depth).enumerate() {
            unsafe {
                let row = self.b.add((from + p) * self.cols + col);
                std::ptr::copy_nonoverlapping(row, packed.as_mut_ptr(), cols);
            }
            packed[cols..].fill(0.0);
        }
    }

    #[inline(always)]
    unsafe fn multiply<S: Simd>(
        &self,
        a: *const f32,
        b: *const f32,
        depth: usize,
        (row, col, cols): (usize, usize, usize),
    ) {
        unsafe {
            let mut acc = [[S::splat(0.0); BLOCK_VECTORS]; BLOCK_ROWS];
            for p in 0..depth {
                let mut bv = [S::splat(0.0); BLOCK_VECTORS];
                for (v, bv) in bv.iter_mut().enumerate() {
                    *bv = S::load(b.add(p * BLOCK_COLS + v * LANES));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let av = S::splat(*a.add(p * BLOCK_ROWS + r));
                    for v in 0..BLOCK_VECTORS {
                        acc[v] = S::mul_add(av, bv[v], acc[v]);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate().take(self.rows - row) {
                let c = self.c.add((row + r) * self.cols + col);
                let mut sums = [0.0f32; BLOCK_COLS];
                for (v, &acc) in acc.iter().enumerate() {
                    S::store(acc, sums.as_mut_ptr().add(v * LANES));
                }
                for (i, sum) in sums.iter().enumerate().take(cols) {
                    *c.add(i) += sum;
                }
            }
        }
    }
}
