//! Matrix products as rank-one updates: a number of the left operand times sixteen columns of the right one, along the depth.

use rayon::prelude::*;

use super::{PARALLEL_FROM, StartFrom};
use crate::model::simd::{self, Kernel, LANES, Simd};
use crate::numbers::aligned::AlignedVec;

/// c = start + a b, with c `(rows, cols)` in rows of `c_stride`.
#[derive(Clone, Copy)]
pub struct OuterProduct<'a> {
    pub a: Left,
    pub b: Right,
    /// `(rows, depth, cols)`.
    pub shape: (usize, usize, usize),
    pub start: StartFrom<'a>,
    pub c: *mut f32,
    pub c_stride: usize,
}

/// Element (i, p) is `data[i * row + p * depth]`; one of the two strides is 1.
#[derive(Clone, Copy)]
pub struct Left {
    pub data: *const f32,
    pub row: usize,
    pub depth: usize,
}

/// The right operand.
#[derive(Clone, Copy)]
pub enum Right {
    /// `(depth, cols)` without gaps.
    RowMajor(*const f32),
    /// As [`panels`] packs it.
    Panels(*const f32),
}

/// The weight of a linear layer, `(cols, depth)`, transposed in panels: `(depth, BLOCK_COLS)` for each [`BLOCK_COLS`] of its columns.
pub fn panels(weight: &[f32], depth: usize) -> AlignedVec<f32> {
    let cols = weight.len() / depth;
    let mut panels = AlignedVec::zeros(cols.next_multiple_of(BLOCK_COLS) * depth);
    for (weight, panel) in weight.chunks(BLOCK_COLS * depth).zip(panels.chunks_exact_mut(BLOCK_COLS * depth)) {
        // SAFETY: no pointers.
        unsafe { simd::run(Transpose { weight, depth, panel }) };
    }
    panels
}

/// At most [`BLOCK_COLS`] columns.
struct Transpose<'a> {
    weight: &'a [f32],
    depth: usize,
    panel: &'a mut [f32],
}

impl Kernel for Transpose<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (depth, cols) = (self.depth, self.weight.len() / self.depth);
        for c in (0..cols).step_by(LANES) {
            for p in (0..depth).step_by(LANES) {
                let (from, to) = (&self.weight[c * depth + p..], &mut self.panel[p * BLOCK_COLS + c..]);
                let (cols, depths) = (LANES.min(cols - c), LANES.min(depth - p));
                if (cols, depths) == (LANES, LANES) {
                    // SAFETY: sixteen rows of sixteen numbers in both.
                    unsafe { S::transpose(from.as_ptr(), depth, to.as_mut_ptr(), BLOCK_COLS) };
                    continue;
                }
                for c in 0..cols {
                    (0..depths).for_each(|p| to[p * BLOCK_COLS + c] = from[c * depth + p]);
                }
            }
        }
    }
}

/// Depth of a packed block: 128 x 64 numbers of the right operand are 32 KiB, a first-level cache.
pub const DEPTH: usize = 128; // also in src/gpu/kernels/optimizer.cu
/// Rows and vectors of the register block: 24 accumulators of the 32 vector registers, and 10 loads for 24 multiply-adds.
const BLOCK_ROWS: usize = 6;
const BLOCK_VECTORS: usize = 4;
pub const BLOCK_COLS: usize = BLOCK_VECTORS * LANES;

// SAFETY: threads share it in `run`, where a and b are only read and each task writes its own rows or columns of c.
unsafe impl Sync for OuterProduct<'_> {}

impl OuterProduct<'_> {
    /// # Safety
    /// a, b and c point at matrices of the shape, and nothing else uses c meanwhile.
    pub unsafe fn run(self) {
        let (rows, depth, cols) = self.shape;
        if rows * depth * cols < PARALLEL_FROM {
            // SAFETY: the matrices are there.
            return unsafe { simd::run(self) };
        }
        let tasks = 2 * rayon::current_num_threads();
        if rows >= cols {
            let size = rows.div_ceil(tasks).next_multiple_of(BLOCK_ROWS);
            (0..rows.div_ceil(size)).into_par_iter().for_each(|i| {
                // SAFETY: rows of a and c that no other task writes.
                unsafe { simd::run(self.part_of_rows(i * size, size.min(rows - i * size))) }
            });
        } else {
            let size = cols.div_ceil(tasks).next_multiple_of(BLOCK_COLS);
            (0..cols.div_ceil(size)).into_par_iter().for_each(|i| {
                let part = Part { from: i * size, to: (i * size + size).min(cols), product: self };
                // SAFETY: columns of b and c that no other task writes.
                unsafe { simd::run(part) }
            });
        }
    }

    /// # Safety
    /// There are `from + rows` rows.
    unsafe fn part_of_rows(self, from: usize, rows: usize) -> Self {
        let (_, depth, cols) = self.shape;
        // SAFETY: both pointers stay inside their matrices, which have more than `from` rows.
        let (a, c) = unsafe { (self.a.data.add(from * self.a.row), self.c.add(from * self.c_stride)) };
        Self { a: Left { data: a, ..self.a }, c, shape: (rows, depth, cols), ..self }
    }
}

/// Columns `from..to` of a product.
struct Part<'a> {
    product: OuterProduct<'a>,
    from: usize,
    to: usize,
}

impl Kernel for OuterProduct<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let to = self.shape.2;
        // SAFETY: all columns of the matrices that this kernel's pointers are good for.
        unsafe { Part { product: self, from: 0, to }.run::<S>() }
    }
}

/// A block of the output, over a part of the depth.
struct Block {
    col: usize,
    cols: usize,
    from: usize,
    depth: usize,
}

impl Kernel for Part<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (rows, all, cols) = self.product.shape;
        // A left operand that is contiguous along the depth is read in place. One with a stride would hit the same few cache sets
        // again and again, so it is packed.
        let pack = self.product.a.depth != 1;
        let row_blocks = rows.div_ceil(BLOCK_ROWS);
        let mut packed_a = vec![0.0f32; if pack { row_blocks * BLOCK_ROWS * DEPTH } else { 0 }];
        let pack_b = matches!(self.product.b, Right::RowMajor(_)) && cols != BLOCK_COLS;
        let mut packed_b = vec![0.0f32; if pack_b { DEPTH * BLOCK_COLS } else { 0 }];
        for from in (0..all).step_by(DEPTH) {
            let depth = DEPTH.min(all - from);
            // SAFETY: all rows, columns up to `to` and the depth up to `all`: inside the matrices.
            unsafe {
                if pack {
                    self.product.pack_a(from, depth, &mut packed_a);
                }
                for col in (self.from..self.to).step_by(BLOCK_COLS) {
                    let block = Block { col, cols: BLOCK_COLS.min(self.to - col), from, depth };
                    let b = match self.product.b {
                        Right::RowMajor(b) if !pack_b => b.add(from * BLOCK_COLS), // has the packed layout already
                        Right::RowMajor(b) => self.product.pack_b(b, &block, &mut packed_b),
                        Right::Panels(b) => b.add(col * all + from * BLOCK_COLS),
                    };
                    let a = pack.then_some(packed_a.as_ptr());
                    match block.cols.div_ceil(LANES) {
                        1 => self.product.rows::<S, 1>(&block, a, b),
                        2 => self.product.rows::<S, 2>(&block, a, b),
                        3 => self.product.rows::<S, 3>(&block, a, b),
                        _ => self.product.rows::<S, BLOCK_VECTORS>(&block, a, b),
                    }
                }
            }
        }
    }
}

/// # Safety
/// All methods: the processor has S; block and rows are inside the product's shape, and its pointers are good for that.
impl OuterProduct<'_> {
    /// All rows of a block's columns.
    #[inline(always)]
    unsafe fn rows<S: Simd, const VECTORS: usize>(&self, block: &Block, packed_a: Option<*const f32>, b: *const f32) {
        for row in (0..self.shape.0).step_by(BLOCK_ROWS) {
            let rows = BLOCK_ROWS.min(self.shape.0 - row);
            let last = rows - 1;
            // SAFETY: rows below `shape.0`, the last of them repeated; a packed operand has its missing rows as zeros.
            unsafe {
                let a = match packed_a {
                    Some(packed) => std::array::from_fn(|r| (packed.add(row * DEPTH + r), BLOCK_ROWS)),
                    None => {
                        std::array::from_fn(|r| (self.a.data.add((row + r.min(last)) * self.a.row + block.from), 1))
                    }
                };
                let acc = multiply::<S, VECTORS>(a, b, block.depth);
                self.finish::<S, VECTORS>(&acc, (row, rows), block);
            }
        }
    }

    /// `packed[block][p][r]`, missing rows zero.
    #[inline(always)]
    unsafe fn pack_a(&self, from: usize, depth: usize, packed: &mut [f32]) {
        for (block, packed) in packed.chunks_exact_mut(BLOCK_ROWS * DEPTH).enumerate() {
            let first = block * BLOCK_ROWS;
            let rows = BLOCK_ROWS.min(self.shape.0 - first);
            for (p, packed) in packed.as_chunks_mut::<BLOCK_ROWS>().0.iter_mut().take(depth).enumerate() {
                // SAFETY: `rows` rows from `first` on at a depth below `from + depth`.
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

    /// `packed[p][col]`; missing columns hold anything, and their results are dropped.
    #[inline(always)]
    unsafe fn pack_b(&self, b: *const f32, block: &Block, packed: &mut [f32]) -> *const f32 {
        for (p, packed) in packed.chunks_exact_mut(BLOCK_COLS).take(block.depth).enumerate() {
            // SAFETY: `block.cols` columns of a row of b, and each chunk has room for `BLOCK_COLS`.
            unsafe {
                let row = b.add((block.from + p) * self.shape.2 + block.col);
                std::ptr::copy_nonoverlapping(row, packed.as_mut_ptr(), block.cols);
            }
        }
        packed.as_ptr()
    }

    /// Adds the sums of a register block to their start, or to the sums over the depth before.
    #[inline(always)]
    unsafe fn finish<S: Simd, const VECTORS: usize>(
        &self,
        acc: &[[S::V; VECTORS]; BLOCK_ROWS],
        (row, rows): (usize, usize),
        block: &Block,
    ) {
        for (r, acc) in acc.iter().enumerate().take(rows) {
            for (v, &acc) in acc.iter().enumerate() {
                // SAFETY: whole vectors only where the block has as many columns left, else number by number.
                unsafe {
                    let col = block.col + v * LANES;
                    let c = self.c.add((row + r) * self.c_stride + col);
                    let start = match self.start {
                        StartFrom::Zero if block.from == 0 => None,
                        StartFrom::Bias(bias) if block.from == 0 => Some(bias.as_ptr().add(col)),
                        _ => Some(c.cast_const()),
                    };
                    let lanes = block.cols - v * LANES;
                    if lanes >= LANES {
                        let start = start.map_or(S::splat(0.0), |start| S::load(start));
                        S::store(S::mul_add(acc, S::splat(1.0), start), c);
                    } else {
                        let mut sums = [0.0f32; LANES];
                        S::store(acc, sums.as_mut_ptr());
                        for (i, sum) in sums.iter().enumerate().take(lanes) {
                            *c.add(i) = sum + start.map_or(0.0, |start| *start.add(i));
                        }
                    }
                }
            }
        }
    }
}

/// The register block: row `r` of the left operand is `a[r].0`, in steps of `a[r].1`.
///
/// # Safety
/// The processor has S. Each row has `depth` numbers, and b has `depth` rows of [`BLOCK_COLS`].
#[inline(always)]
unsafe fn multiply<S: Simd, const VECTORS: usize>(
    a: [(*const f32, usize); BLOCK_ROWS],
    b: *const f32,
    depth: usize,
) -> [[S::V; VECTORS]; BLOCK_ROWS] {
    // SAFETY: `p` is below `depth`, and VECTORS vectors are at most `BLOCK_COLS` columns.
    unsafe {
        let mut acc = [[S::splat(0.0); VECTORS]; BLOCK_ROWS];
        for p in 0..depth {
            let b: [S::V; VECTORS] = std::array::from_fn(|v| S::load(b.add(p * BLOCK_COLS + v * LANES)));
            for (acc, (a, step)) in acc.iter_mut().zip(a) {
                let a = S::splat(*a.add(p * step));
                for v in 0..VECTORS {
                    acc[v] = S::mul_add(a, b[v], acc[v]);
                }
            }
        }
        acc
    }
}
