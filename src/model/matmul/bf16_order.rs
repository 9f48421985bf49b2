//! The order in which dot products meet numbers. Weights in bf16 are widened two to a word: first the even ones of thirty-two, then the
//! odd ones. Their x is brought into that order once for all columns.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::Shared;
use super::dot::ROW_PANEL;
use crate::model::simd::{self, Kernel, LANES, Simd};
use crate::numbers::aligned::{Floats, Number};
use crate::numbers::dtype::Dtype;

/// Whether such weights are loaded even ones first.
pub const fn is_halved<W: Number>() -> bool {
    const { assert!(matches!(W::DTYPE, Dtype::F32 | Dtype::Bf16), "the numbers that there are loads for") };
    matches!(W::DTYPE, Dtype::Bf16)
}

thread_local! {
    /// Memory for x in its other order. A thread that waits for others may begin another product meanwhile: it finds none here.
    static HALVED: Cell<Floats> = Cell::default();
}

/// Gives `then` the rows of x, `(m, k)`, in the order of the weights: all, or those that are halved at a time.
///
/// # Safety
/// The pointer is good for the shape.
pub unsafe fn as_weights_load<W: Number>(
    x: *const f32,
    (m, k): (usize, usize),
    then: impl Fn(Range<usize>, *const f32),
) {
    if !is_halved::<W>() {
        return then(0..m, x);
    }
    let mut halved = HALVED.take();
    for first in (0..m).step_by(ROW_PANEL) {
        let rows = first..m.min(first + ROW_PANEL);
        halved.reuse(rows.len() * k);
        // SAFETY: the caller's.
        unsafe { halve(x.add(first * k), k, &mut halved) };
        then(rows, halved.as_ptr());
    }
    HALVED.set(halved);
}

/// Numbers from which on several threads halve them, and rows that one takes at a time.
const APART_FROM: usize = 1 << 17;
const ROWS_A_TASK: usize = 16;

/// Of each thirty-two numbers of a row first the even ones, then the odd ones. What is left at its end stays as it is.
///
/// # Safety
/// There are as many numbers in `from` as in `to`.
unsafe fn halve(from: *const f32, k: usize, to: &mut [f32]) {
    let numbers = if to.len() < APART_FROM { to.len() } else { k * ROWS_A_TASK };
    let from = Shared(from);
    to.par_chunks_mut(numbers.max(1)).enumerate().for_each(|(i, to)| {
        // SAFETY: the caller's.
        unsafe { simd::run(Halve { from: std::slice::from_raw_parts(from.get().add(i * numbers), to.len()), k, to }) }
    });
}

struct Halve<'a> {
    from: &'a [f32],
    k: usize,
    to: &'a mut [f32],
}

impl Kernel for Halve<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (from, to) in self.from.chunks_exact(self.k).zip(self.to.chunks_exact_mut(self.k)) {
            let (from, rest) = from.as_chunks::<{ 2 * LANES }>();
            let (to, to_rest) = to.as_chunks_mut::<{ 2 * LANES }>();
            for (from, to) in from.iter().zip(to) {
                unsafe { S::halve(from.as_ptr(), to.as_mut_ptr()) }
            }
            to_rest.copy_from_slice(rest);
        }
    }
}
