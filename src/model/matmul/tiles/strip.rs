//! The traffic between the caches of a core and memory while a unit multiplies: finished sums go out, what comes next comes in.

use std::ops::Range;

use half::bf16;

use super::BLOCK;
use crate::model::simd::{self, Kernel, LANES, Simd};

/// Numbers of y from which it is written past the caches, which it would not stay in.
const WRITTEN_PAST_CACHES_FROM: usize = 1 << 20;

/// A count that is divided among calls.
#[derive(Default)]
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

    fn rest(&mut self) -> Range<usize> {
        std::mem::replace(&mut self.next, self.count)..self.count
    }
}

/// Finished sums of all rows of a task over a few blocks of columns, in whole blocks side by side: in y they would be lines far apart. They
/// are copied to y while the next ones are computed.
pub struct Strip {
    sums: (*const f32, usize),
    y: (*mut f32, usize),
    width: usize,
    rows: Share,
    is_streamed: bool,
}

impl Strip {
    /// From and to pointers with the numbers from one row to the next, for a `(rows, columns)` part of y, which has `size` numbers in all.
    pub fn new(
        sums: (*const f32, usize),
        y: (*mut f32, usize),
        (height, width): (usize, usize),
        size: usize,
        calls: usize,
    ) -> Self {
        let is_aligned = y.0.addr().is_multiple_of(64) && y.1.is_multiple_of(LANES);
        let is_streamed = is_aligned && width == sums.1 && size >= WRITTEN_PAST_CACHES_FROM;
        Self { sums, y, width, rows: Share::of(height, calls), is_streamed }
    }

    /// Writes the rows of one call.
    ///
    /// # Safety
    /// The pointers are good, and nothing else uses this part of y.
    pub unsafe fn write_some(&mut self) {
        let rows = self.rows.take();
        // SAFETY: rows of the strip.
        unsafe { self.write(rows) }
    }

    /// Writes the rows that are left.
    ///
    /// # Safety
    /// As [`Self::write_some`].
    pub unsafe fn write_rest(&mut self) {
        let rows = self.rows.rest();
        // SAFETY: rows of the strip.
        unsafe { self.write(rows) }
        if self.is_streamed {
            simd::fence();
        }
    }

    unsafe fn write(&self, rows: Range<usize>) {
        if rows.is_empty() {
            return;
        }
        let from = (self.sums.0.wrapping_add(rows.start * self.sums.1), self.sums.1);
        let to = (self.y.0.wrapping_add(rows.start * self.y.1), self.y.1);
        // SAFETY: rows of both.
        unsafe { simd::run(CopyRows { from, to, shape: (rows.len(), self.width), is_streamed: self.is_streamed }) }
    }
}

/// Copies rows of a matrix into a larger one.
struct CopyRows {
    from: (*const f32, usize),
    to: (*mut f32, usize),
    shape: (usize, usize),
    /// Whether to write past the caches; rows are then whole vectors at multiples of 64 bytes.
    is_streamed: bool,
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
                    if self.is_streamed {
                        S::stream(S::load(from.add(c)), to.add(c));
                    } else if columns - c >= LANES {
                        S::store(S::load(from.add(c)), to.add(c));
                    } else {
                        (c..columns).for_each(|c| *to.add(c) = *from.add(c));
                    }
                }
            }
        }
    }
}

/// Numbers of a cache line of bf16.
const LINE: usize = 32;

/// What the next strip will read, on its way from memory to the second-level cache: some at every call of the unit.
#[derive(Default)]
pub struct Ahead {
    /// The runs of tiles of the right operand.
    tiles: [*const bf16; 2],
    /// Lines of each run.
    lines: Share,
    /// The first row of y, and numbers from one row to the next.
    y: (*const f32, usize),
    rows: Share,
}

impl Ahead {
    /// Two runs of so many numbers, and so many rows of y, during `calls` calls.
    pub fn new(tiles: ([*const bf16; 2], usize), (y, stride, rows): (*const f32, usize, usize), calls: usize) -> Self {
        let lines = Share::of(tiles.1.div_ceil(LINE), calls);
        Self { tiles: tiles.0, lines, y: (y, stride), rows: Share::of(rows, calls) }
    }

    /// Prefetches what is one call's.
    #[inline(always)]
    pub fn prefetch(&mut self) {
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
