//! The product of two operands in tiles: blocks for the caches, shared out to threads.

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
use super::{BLOCK, TILE, Tiles, lanes};
use crate::model::matmul::{MatrixRowsMut, StartFrom};
use crate::model::simd::{self, Kernel, LANES, Simd};

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
/// Steps after which the next rows are taken: two blocks of columns of this depth are 16 KiB, which stay in the first-level cache while
/// rows stream past.
const DEPTH: usize = 8;
/// Blocks of rows up to which the whole depth is one part, so that weights come from memory in long runs.
const FEW: usize = 4;
/// Blocks of columns of a task: a multiple of what a unit takes at once.
const COLUMNS: usize = 4;
/// Multiply-adds, and numbers of the right operand, from which several threads share a product.
const PARALLEL_FROM: usize = 1 << 24;
const STREAMED_FROM: usize = 1 << 18;
/// Numbers of y from which it is written past the caches: logits, which are far larger than any cache of a core.
const WRITTEN_PAST_CACHES_FROM: usize = 1 << 23;

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
    let panel = rows.div_ceil(rows.div_ceil(PANEL)).next_multiple_of(2);
    let panels = rows.div_ceil(panel);
    let is_small = m * n * k < PARALLEL_FROM && n * k < STREAMED_FROM;
    let parts = if is_small { 1 } else { (8 * rayon::current_num_threads()).div_ceil(panels) };
    let width = columns.div_ceil(parts).next_multiple_of(COLUMNS);
    let parts = columns.div_ceil(width);
    let task = |i: usize| {
        let part = |i: usize, size: usize, all: usize| i * size..all.min((i + 1) * size);
        // SAFETY: the operands were checked to hold the shape, and no other task has these rows and columns.
        unsafe { product.task(part(i / parts, panel, rows), part(i % parts, width, columns)) }
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

/// Sums of all rows of a task over a few blocks of columns, in whole blocks side by side: in y they would be lines far apart.
#[repr(C, align(64))]
struct Sums(MaybeUninit<[f32; PANEL * BLOCK * 2 * BLOCK]>);

/// Copies rows of a matrix into a larger one.
struct CopyRows {
    from: (*const f32, usize),
    to: (*mut f32, usize),
    shape: (usize, usize),
    /// Whether to write past the caches; rows are then whole vectors at multiples of 64 bytes.
    streamed: bool,
}

impl Kernel for CopyRows {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (rows, columns) = self.shape;
        for r in 0..rows {
            // SAFETY: a row of each matrix.
            unsafe {
                let (from, to) = (self.from.0.add(r * self.from.1), self.to.0.add(r * self.to.1));
                for c in (0..columns).step_by(LANES) {
                    if self.streamed {
                        S::stream(S::load(from.add(c)), to.add(c));
                    } else if columns - c >= LANES {
                        S::store(S::load(from.add(c)), to.add(c));
                    } else {
                        (c..columns).for_each(|c| *to.add(c) = *from.add(c));
                    }
                }
            }
        }
        if self.streamed {
            simd::fence();
        }
    }
}

/// Numbers of a cache line.
const LINE: usize = 32;

/// What the next columns will read, on its way from memory to the second-level cache: some at every call of the unit.
struct Ahead {
    /// The runs of tiles of the right operand.
    tiles: [*const bf16; 2],
    /// Lines of each run.
    lines: Share,
    /// The first row of y, and numbers from one row to the next.
    y: (*const f32, usize),
    rows: Share,
}

/// A count that is divided among calls.
struct Share {
    count: usize,
    next: usize,
    at_once: usize,
}

impl Share {
    fn of(count: usize, calls: usize) -> Self {
        Self { count, next: 0, at_once: count.div_ceil(calls.max(1)) }
    }

    fn take(&mut self) -> Range<usize> {
        let from = self.next;
        self.next = self.count.min(from + self.at_once);
        from..self.next
    }
}

impl Ahead {
    #[inline(always)]
    fn prefetch(&mut self) {
        for line in self.lines.take() {
            for tiles in self.tiles {
                simd::prefetch(tiles.wrapping_add(line * LINE));
            }
        }
        for row in self.rows.take() {
            for column in [0, BLOCK] {
                simd::prefetch(self.y.0.wrapping_add(row * self.y.1 + column));
            }
        }
    }
}

/// Ranges are of blocks.
///
/// # Safety
/// All methods: rows and columns are inside the product's shape, its pointers are good for that, and nothing else uses this part of y.
impl Product<'_> {
    unsafe fn task(&self, rows: Range<usize>, columns: Range<usize>) {
        assert!(rows.len() <= PANEL, "the sums have room for a panel");
        let (unit, mut sums) = (Unit::take(), Sums(MaybeUninit::uninit()));
        let (high, wide) = unit.shape(rows.len());
        let (panel, depth) = if rows.len() <= FEW { (self.steps, self.steps) } else { (PANEL_DEPTH, DEPTH) };
        let (sums, stride) = (sums.0.as_mut_ptr().cast::<f32>(), wide * BLOCK);
        for panel in parts(0..self.steps.max(1), panel) {
            let start = if panel.start == 0 { self.start } else { StartFrom::Add };
            for columns in parts(columns.clone(), wide) {
                // SAFETY: parts of the ranges; the sums have room for all rows of a panel, rounded up to what the unit takes.
                unsafe {
                    self.begin(start, &rows, &columns, (sums, stride));
                    let calls = rows.len().div_ceil(high) * panel.len().div_ceil(depth);
                    let mut ahead = self.ahead(start, (&rows, &columns), &panel, calls);
                    for steps in parts(panel.start..panel.end.min(self.steps), depth) {
                        for rows_at_once in parts(rows.clone(), high) {
                            ahead.prefetch();
                            let sums = sums.add((rows_at_once.start - rows.start) * BLOCK * stride);
                            self.multiply(&unit, high, (&rows_at_once, &columns), &steps, (sums, stride));
                        }
                    }
                    self.finish(&rows, &columns, (sums, stride));
                }
            }
        }
    }

    /// What to prefetch during `calls` calls of the unit on these rows and columns.
    fn ahead(
        &self,
        start: StartFrom<'_>,
        (rows, columns): (&Range<usize>, &Range<usize>),
        panel: &Range<usize>,
        calls: usize,
    ) -> Ahead {
        let next = columns.end * self.steps + panel.start;
        let tiles = [next, next + self.steps].map(|tile| self.right.wrapping_add(tile * TILE));
        let y = self.y.wrapping_add(rows.start * BLOCK * self.stride + columns.end * BLOCK);
        // A task of few rows waits for memory all the time: it would only wait for the same lines earlier.
        let lines = if rows.len() <= FEW { 0 } else { panel.len() * TILE / LINE };
        let rows = if matches!(start, StartFrom::Add) { rows.len() * BLOCK } else { 0 };
        Ahead { tiles, lines: Share::of(lines, calls), y: (y, self.stride), rows: Share::of(rows, calls) }
    }

    /// The numbers of y in these rows and columns: the first row and column, and how many there are.
    fn part_of_y(&self, rows: &Range<usize>, columns: &Range<usize>) -> ((usize, usize), (usize, usize)) {
        let (row, column) = (rows.start * BLOCK, columns.start * BLOCK);
        ((row, column), (self.shape.0.min(rows.end * BLOCK) - row, self.shape.1.min(columns.end * BLOCK) - column))
    }

    /// Sets sums to their start. Those beyond the shape may be anything: they are dropped.
    unsafe fn begin(
        &self,
        start: StartFrom<'_>,
        rows: &Range<usize>,
        columns: &Range<usize>,
        (sums, stride): (*mut f32, usize),
    ) {
        let ((row, column), (height, width)) = self.part_of_y(rows, columns);
        for r in 0..rows.len().next_multiple_of(2) * BLOCK {
            // SAFETY: a row of the sums, and a part of a row of y.
            unsafe {
                let to = sums.add(r * stride);
                if width < stride || r >= height || matches!(start, StartFrom::Zero) {
                    to.write_bytes(0, stride);
                }
                match start {
                    StartFrom::Bias(bias) => to.copy_from_nonoverlapping(bias[column..].as_ptr(), width),
                    StartFrom::Add if r < height => {
                        to.copy_from_nonoverlapping(self.y.add((row + r) * self.stride + column), width);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Writes the sums to y.
    unsafe fn finish(&self, rows: &Range<usize>, columns: &Range<usize>, (sums, stride): (*mut f32, usize)) {
        let ((row, column), (height, width)) = self.part_of_y(rows, columns);
        // SAFETY: a part of y, and as many sums.
        unsafe {
            let y = self.y.add(row * self.stride + column);
            let is_aligned = y.addr().is_multiple_of(64) && self.stride.is_multiple_of(LANES);
            let streamed = is_aligned && width == stride && self.shape.0 * self.shape.1 >= WRITTEN_PAST_CACHES_FROM;
            simd::run(CopyRows { from: (sums, stride), to: (y, self.stride), shape: (height, width), streamed });
        }
    }

    /// Adds some steps of the depth to at most `high` blocks of rows. A missing block is a copy of the last one there.
    unsafe fn multiply(
        &self,
        unit: &Unit,
        high: usize,
        (rows, columns): (&Range<usize>, &Range<usize>),
        steps: &Range<usize>,
        (sums, stride): (*mut f32, usize),
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
                    registers.one_by_four(left(0), right, steps.len(), sums, stride * size_of::<f32>());
                }
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Unit::Amx(registers) => {
                    let (left, right) = ([left(0), left(1)], [right(0), right(1)]);
                    let sums = [sums, sums.add(BLOCK * stride)];
                    registers.two_by_two(left, right, steps.len(), sums, stride * size_of::<f32>());
                }
                Unit::Lanes => {
                    let rows = BLOCK.min(self.shape.0 - rows.start * BLOCK);
                    let (left, right) = (left(0), [right(0), right(1)]);
                    simd::run(lanes::Block { left, right, steps: steps.len(), rows, sums, stride });
                }
            }
        }
    }
}
