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

/// Rows and columns of the register block: 24 accumulators of the 32 vector registers, and 10 loads for 24 multiply-adds.
const ROWS: usize = 6;
const COLS: usize = 4;
/// Depth of a block: four rows of the weight, 16 KiB, stay in the first-level cache.
const LINEAR_DEPTH: usize = 1024;
/// Rows of x, at most 1 MiB of a block's depth, that stay in the second-level cache while the weight streams past.
const ROW_PANEL: usize = 252;

impl Kernel for LinearColumns<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let t = &self.task;
        for panel in (0..t.m).step_by(ROW_PANEL) {
            let rows = panel..(panel + ROW_PANEL).min(t.m);
            for from in (0..t.k).step_by(LINEAR_DEPTH) {
                let depth = LINEAR_DEPTH.min(t.k - from);
                for col in (self.from..self.to).step_by(COLS) {
                    let cols = COLS.min(self.to - col);
                    for row in rows.clone().step_by(ROWS) {
                        let ahead = share_of_next_columns((row - panel) / ROWS, rows.len().div_ceil(ROWS), t.k);
                        let block = Block { row, col, cols, from, depth, ahead };
                        // SAFETY: the block stays inside the asserted shapes.
                        unsafe {
                            match rows.end - row {
                                ROWS.. => dot_block::<S, ROWS>(t, &block),
                                5 => dot_block::<S, 5>(t, &block),
                                4 => dot_block::<S, 4>(t, &block),
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

/// R x 4 dot products along the depth, sixteen lanes at a time; the tail is padded with zeros, which changes no sum. Columns beyond
/// the last are computed from the last again and dropped.
#[inline(always)]
unsafe fn dot_block<S: Simd, const R: usize>(t: &LinearTask<'_>, block: &Block) {
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
        for (four, acc) in acc.chunks(COLS).enumerate() {
            let padded = std::array::from_fn(|r| if r < acc.len() { acc[r] } else { [S::splat(0.0); COLS] });
            for (r, sums) in S::sum_block(&padded).iter().enumerate().take(acc.len()) {
                finish(t, block, block.row + four * COLS + r, *sums);
            }
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

/// Adds four sums of one row to what they start from, or to those of the depth before.
#[inline(always)]
unsafe fn finish(t: &LinearTask<'_>, block: &Block, row: usize, sums: [f32; COLS]) {
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

/// The first `len` of four numbers, zeros after them.
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

/// Element (i, p) of the left operand is `data[i * row + p * depth]`; one of the two strides is 1.
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

/// c += a b with c `(rows, cols)`, b `(depth, cols)`: block by block, the depth always in ascending order.
fn accumulate(a: Operand, b: &[f32], (rows, depth, cols): (usize, usize, usize), c: &mut [f32]) {
    let a = Shared(a);
    let block = |first_row: usize, c: &mut [f32]| {
        let Operand { data, row, depth: deep } = a.get();
        // SAFETY: the callers asserted the shapes; c is this task's alone.
        unsafe {
            let a = Operand { data: data.add(first_row * row), row, depth: deep };
            simd::run(OuterProduct { a, b: b.as_ptr(), depth, cols, rows: c.len() / cols, c: c.as_mut_ptr() });
        }
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
        // A left operand that is contiguous along the depth is read where it stands; one that strides would meet the same few
        // cache sets over and over, and is packed.
        let pack = self.a.depth != 1;
        let row_blocks = self.rows.div_ceil(BLOCK_ROWS);
        let mut packed_a = vec![0.0f32; if pack { row_blocks * BLOCK_ROWS * DEPTH } else { 0 }];
        let mut packed_b = vec![0.0f32; DEPTH * BLOCK_COLS];
        for from in (0..self.depth).step_by(DEPTH) {
            let depth = DEPTH.min(self.depth - from);
            // SAFETY: the callers of `accumulate` asserted the shapes.
            unsafe {
                if pack {
                    self.pack_a(from, depth, &mut packed_a);
                }
                for col in (0..self.cols).step_by(BLOCK_COLS) {
                    let cols = BLOCK_COLS.min(self.cols - col);
                    let b = if self.cols == BLOCK_COLS {
                        self.b.add(from * BLOCK_COLS) // has the packed layout already
                    } else {
                        self.pack_b(from, depth, col, cols, &mut packed_b);
                        packed_b.as_ptr()
                    };
                    for block in 0..row_blocks {
                        let row = block * BLOCK_ROWS;
                        let rows = BLOCK_ROWS.min(self.rows - row);
                        let a = if pack {
                            let packed = packed_a.as_ptr().add(row * DEPTH);
                            std::array::from_fn(|r| (packed.add(r), BLOCK_ROWS))
                        } else {
                            let last = rows - 1;
                            std::array::from_fn(|r| (self.a.data.add((row + r.min(last)) * self.a.row + from), 1))
                        };
                        let acc = multiply::<S>(a, b, depth);
                        self.add_block::<S>(&acc, row, rows, col, cols);
                    }
                }
            }
        }
    }
}

/// The register block: row `r` of the left operand is `a[r].0`, in steps of `a[r].1`.
#[inline(always)]
unsafe fn multiply<S: Simd>(
    a: [(*const f32, usize); BLOCK_ROWS],
    b: *const f32,
    depth: usize,
) -> [[S::V; BLOCK_VECTORS]; BLOCK_ROWS] {
    unsafe {
        let mut acc = [[S::splat(0.0); BLOCK_VECTORS]; BLOCK_ROWS];
        for p in 0..depth {
            let b: [S::V; BLOCK_VECTORS] = std::array::from_fn(|v| S::load(b.add(p * BLOCK_COLS + v * LANES)));
            for (acc, (a, step)) in acc.iter_mut().zip(a) {
                let a = S::splat(*a.add(p * step));
                for v in 0..BLOCK_VECTORS {
                    acc[v] = S::mul_add(a, b[v], acc[v]);
                }
            }
        }
        acc
    }
}

impl OuterProduct {
    /// `packed[block][p][r]`, missing rows zero.
    #[inline(always)]
    unsafe fn pack_a(&self, from: usize, depth: usize, packed: &mut [f32]) {
        for (block, packed) in packed.chunks_exact_mut(BLOCK_ROWS * DEPTH).enumerate() {
            let first = block * BLOCK_ROWS;
            let rows = BLOCK_ROWS.min(self.rows - first);
            for (p, packed) in packed.as_chunks_mut::<BLOCK_ROWS>().0.iter_mut().take(depth).enumerate() {
                unsafe {
                    let a = self.a.data.add(first + (from + p) * self.a.depth);
                    if rows == BLOCK_ROWS {
                        *packed = a.cast::<[f32; BLOCK_ROWS]>().read_unaligned();
                    } else {
                        std::ptr::copy_nonoverlapping(a, packed.as_mut_ptr(), rows);
                    }
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
    unsafe fn add_block<S: Simd>(
        &self,
        acc: &[[S::V; BLOCK_VECTORS]; BLOCK_ROWS],
        row: usize,
        rows: usize,
        col: usize,
        cols: usize,
    ) {
        for (r, acc) in acc.iter().enumerate().take(rows) {
            unsafe {
                let c = self.c.add((row + r) * self.cols + col);
                for (v, &acc) in acc.iter().enumerate() {
                    let c = c.add(v * LANES);
                    if (v + 1) * LANES <= cols {
                        S::store(S::mul_add(acc, S::splat(1.0), S::load(c)), c);
                    } else {
                        let mut sums = [0.0f32; LANES];
                        S::store(acc, sums.as_mut_ptr());
                        for (i, sum) in sums.iter().enumerate().take(cols.saturating_sub(v * LANES)) {
                            *c.add(i) += sum;
                        }
                    }
                }
            }
        }
    }
}
