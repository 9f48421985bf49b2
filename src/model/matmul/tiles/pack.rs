//! Rounds a matrix to bf16 and lays it out in tiles.
//!
//! Two numbers that are neighbours along the depth make a 32-bit pair. A tile holds 16 x 16 pairs, and a right operand's is a left operand's
//! transposed.

use std::marker::PhantomData;

use rayon::prelude::*;

use super::{BLOCK, STEP, TILE, Tiles};
use crate::model::simd::{self, Kernel, Simd};
use crate::numbers::aligned::Number;

/// Which operand of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Its rows are the rows of the product.
    Left,
    /// Its columns are the columns of the product.
    Right,
}

/// A matrix to pack. "Outer" counts rows of a left operand, columns of a right one.
#[derive(Clone, Copy)]
pub enum Source<'a, T = f32> {
    /// The depth is contiguous: number (outer i, depth p) is `data[i * stride + p]`.
    Along {
        /// The numbers.
        data: &'a [T],
        /// From one outer index to the next.
        stride: usize,
        /// `(outer, depth)`.
        shape: (usize, usize),
    },
    /// The outer index is contiguous: number (outer i, depth p) is `data[p * stride + i]`.
    Across {
        /// The numbers.
        data: &'a [T],
        /// From one depth to the next.
        stride: usize,
        /// `(outer, depth)`.
        shape: (usize, usize),
    },
}

impl<T> Source<'_, T> {
    fn shape(&self) -> (usize, usize) {
        let (Self::Along { shape, .. } | Self::Across { shape, .. }) = self;
        *shape
    }

    fn check(&self) {
        let (Self::Along { data, stride, shape: (lines, width) }
        | Self::Across { data, stride, shape: (width, lines) }) = self;
        assert!(*lines == 0 || data.len() >= (lines - 1) * stride + width);
    }
}

/// Tiles below which one thread packs them all.
const PARALLEL_FROM: usize = 64;

impl Tiles {
    /// Packs an operand in the memory of another.
    pub fn pack<T: Number>(&mut self, side: Side, source: Source<'_, T>) {
        source.check();
        let (outer, depth) = source.shape();
        let (blocks, steps) = (outer.div_ceil(BLOCK), depth.div_ceil(STEP));
        (self.outer, self.depth) = (outer, depth);
        self.data.reuse(blocks * steps * TILE);
        let to = Target { tiles: self.data.as_mut_ptr().cast(), steps };
        let run = |blocks, steps| {
            // SAFETY: the source was checked to hold the shape, and no other task has these blocks and steps.
            unsafe { simd::run(Pack { source, side, to, blocks, steps }) }
        };
        if blocks * steps < PARALLEL_FROM {
            return run((0, blocks), (0, steps));
        }
        let tasks = 4 * rayon::current_num_threads();
        // Each task reads whole lines of the source.
        let part = |count: usize| move |i: usize| (count * i / tasks, count * (i + 1) / tasks);
        match source {
            Source::Along { .. } => {
                (0..tasks).into_par_iter().map(part(blocks)).for_each(|blocks| run(blocks, (0, steps)))
            }
            Source::Across { .. } => {
                (0..tasks).into_par_iter().map(part(steps)).for_each(|steps| run((0, blocks), steps))
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Target {
    tiles: *mut Pairs,
    steps: usize,
}

// SAFETY: each task of `Tiles::pack` writes its own tiles.
unsafe impl Sync for Target {}

/// A part of an operand that is packed on its own.
pub struct Part<'a> {
    to: Target,
    /// Blocks and steps that it has.
    size: (usize, usize),
    operand: PhantomData<&'a mut Tiles>,
}

// SAFETY: it is the only one that writes its tiles.
unsafe impl Send for Part<'_> {}

impl Tiles {
    /// Cuts an operand into parts of `size` blocks.
    pub fn parts_by_block(&mut self, size: usize) -> Vec<Part<'_>> {
        let (blocks, steps) = (self.outer.div_ceil(BLOCK), self.steps());
        self.parts(blocks.div_ceil(size), |i| (i * size * steps, (size.min(blocks - i * size), steps)))
    }

    /// Cuts an operand into its steps.
    pub fn parts_by_step(&mut self) -> Vec<Part<'_>> {
        let blocks = self.outer.div_ceil(BLOCK);
        self.parts(self.steps(), |i| (i, (blocks, 1)))
    }

    /// `part` gives the first tile of a part, and its blocks and steps.
    fn parts(&mut self, count: usize, part: impl Fn(usize) -> (usize, (usize, usize))) -> Vec<Part<'_>> {
        let (tiles, steps): (*mut Pairs, _) = (self.data.as_mut_ptr().cast(), self.steps());
        let one = |i| {
            let (first, size) = part(i);
            Part { to: Target { tiles: tiles.wrapping_add(first), steps }, size, operand: PhantomData }
        };
        (0..count).map(one).collect()
    }
}

impl Part<'_> {
    /// Packs the numbers of this part.
    pub fn pack(self, side: Side, source: Source<'_>) {
        source.check();
        let (outer, depth) = source.shape();
        assert_eq!((outer.div_ceil(BLOCK), depth.div_ceil(STEP)), self.size);
        let (blocks, steps) = ((0, self.size.0), (0, self.size.1));
        // SAFETY: the source was checked to hold the shape, which is this part's, and no other part has these tiles.
        unsafe { simd::run(Pack { source, side, to: self.to, blocks, steps }) }
    }
}

/// A tile, as pairs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Pairs([[u32; BLOCK]; BLOCK]);

/// Some blocks and steps of an operand, each from one to another.
struct Pack<'a, T> {
    source: Source<'a, T>,
    side: Side,
    to: Target,
    blocks: (usize, usize),
    steps: (usize, usize),
}

impl<T: Number> Kernel for Pack<'_, T> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let across = matches!(self.source, Source::Across { .. });
        // Tiles in the order in which the source lies in memory.
        let (outer, inner) = if across { (self.steps, self.blocks) } else { (self.blocks, self.steps) };
        for i in outer.0..outer.1 {
            for j in inner.0..inner.1 {
                let (block, step) = if across { (j, i) } else { (i, j) };
                let pairs = match self.source {
                    Source::Along { data, stride, shape } => pairs_along(data, stride, shape, block, step),
                    Source::Across { data, stride, shape } => pairs_across(data, stride, shape, block, step),
                };
                // SAFETY: one of this task's tiles; both sides are 16 rows of 16 words of 32 bits.
                unsafe {
                    let to = self.to.tiles.add(block * self.to.steps + step);
                    if across == (self.side == Side::Left) {
                        S::transpose(pairs.0.as_ptr().cast(), BLOCK, to.cast(), BLOCK);
                    } else {
                        *to = pairs;
                    }
                }
            }
        }
    }
}

/// Pairs (outer, depth): each row of pairs is a run of the source.
#[inline(always)]
fn pairs_along<T: Number>(
    data: &[T],
    stride: usize,
    (outer, depth): (usize, usize),
    block: usize,
    step: usize,
) -> Pairs {
    let mut pairs = Pairs([[0; BLOCK]; BLOCK]);
    let (rows, width) = (BLOCK.min(outer - block * BLOCK), STEP.min(depth - step * STEP));
    for r in 0..rows {
        let from = &data[(block * BLOCK + r) * stride + step * STEP..][..width];
        // Of a known length, it is a few vector instructions.
        if let Ok(from) = <&[T; STEP]>::try_from(from) {
            for i in 0..BLOCK {
                pairs.0[r][i] = round(from[2 * i]) | round(from[2 * i + 1]) << 16;
            }
        } else {
            for (p, x) in from.iter().enumerate() {
                pairs.0[r][p / 2] |= round(*x) << (16 * (p % 2));
            }
        }
    }
    pairs
}

/// Pairs (depth, outer): each row of pairs is two lines of the source, interleaved.
#[inline(always)]
fn pairs_across<T: Number>(
    data: &[T],
    stride: usize,
    (outer, depth): (usize, usize),
    block: usize,
    step: usize,
) -> Pairs {
    let mut pairs = Pairs([[0; BLOCK]; BLOCK]);
    let (columns, lines) = (BLOCK.min(outer - block * BLOCK), STEP.min(depth - step * STEP));
    for p in 0..lines {
        let from = &data[(step * STEP + p) * stride + block * BLOCK..][..columns];
        let shift = 16 * (p % 2);
        // As above.
        if let Ok(from) = <&[T; BLOCK]>::try_from(from) {
            for (pair, x) in pairs.0[p / 2].iter_mut().zip(from) {
                *pair |= round(*x) << shift;
            }
        } else {
            for (i, x) in from.iter().enumerate() {
                pairs.0[p / 2][i] |= round(*x) << shift;
            }
        }
    }
    pairs
}

/// The bits of a number in bf16: rounded to the nearest, ties to even; zero below the smallest normal number; NaN stays NaN.
#[inline(always)]
fn round<T: Number>(x: T) -> u32 {
    let bits = x.widen().to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        bits >> 16 | 0x40
    } else if magnitude < 0x0080_0000 {
        bits >> 16 & 0x8000
    } else {
        rounded
    }
}
