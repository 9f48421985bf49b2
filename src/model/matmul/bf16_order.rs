//! Puts x into the order in which dot products load bf16 weights: of each thirty-two, first the even ones, then the odd ones. A
//! 32-bit word holds two weights, and one instruction widens the even or the odd ones of sixteen words.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::ROW_PANEL;
use crate::model::simd::{self, Kernel, LANES, Simd};
use crate::numbers::aligned::{AlignedVec, Number};
use crate::numbers::dtype::Dtype;

/// Whether weights of this type are loaded even ones first.
pub const fn is_halved<W: Number>() -> bool {
    const { assert!(matches!(W::DTYPE, Dtype::F32 | Dtype::Bf16), "the numbers that there are loads for") };
    matches!(W::DTYPE, Dtype::Bf16)
}

thread_local! {
    /// Memory for x in the other order. A thread that waits for others may start another product, which finds an empty buffer here.
    static HALVED: Cell<AlignedVec<f32>> = Cell::default();
}

/// Calls `then` with the rows of x, `(m, k)`, in the order of the weights: all at once, or a panel at a time if they are reordered.
///
/// # Safety
/// `x` points at `m * k` numbers.
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
        // SAFETY: rows `first..` of the `m` rows of `k` numbers that x points at.
        let from = unsafe { std::slice::from_raw_parts(x.add(first * k), rows.len() * k) };
        halve(from, k, &mut halved);
        then(rows, halved.as_ptr());
    }
    HALVED.set(halved);
}

/// Count of numbers from which several threads share the work, and the rows that one thread takes at a time.
const PARALLEL_FROM: usize = 1 << 17;
const ROWS_PER_TASK: usize = 16;

/// Writes the even ones of each thirty-two numbers of a row, then the odd ones. The rest of a row is copied as it is.
fn halve(from: &[f32], k: usize, to: &mut [f32]) {
    let numbers = if to.len() < PARALLEL_FROM { to.len() } else { k * ROWS_PER_TASK }.max(1);
    // SAFETY: the kernel stays inside its two slices, which are of one length.
    from.par_chunks(numbers).zip(to.par_chunks_mut(numbers)).for_each(|(from, to)| unsafe {
        simd::run(Halve { from, k, to });
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
                // SAFETY: twice `LANES` numbers on both sides, and the caller runs under S.
                unsafe { S::halve(from.as_ptr(), to.as_mut_ptr()) }
            }
            to_rest.copy_from_slice(rest);
        }
    }
}
