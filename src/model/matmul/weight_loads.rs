//! Where the hot loop of dot products gets a block of weights from: where they stand, or, if they are to be widened for many rows,
//! from a copy in f32 in the first-level cache.

use super::bf16_order::is_halved;
use super::dot::{COLS, DEPTH};
use crate::model::simd::{LANES, Simd};
use crate::numbers::aligned::Number;

/// The weights of a block in f32, sixteen of each column side by side.
#[repr(C, align(64))]
pub struct Wide(pub [[[f32; LANES]; COLS]; DEPTH / LANES]);

/// Where the hot loop gets weights from.
pub trait WeightLoads: Copy {
    /// Sixteen of the thirty-two of column `c` from `i`, a multiple of that, on: the first or the second as x has them, see [`super::halves`].
    unsafe fn load<S: Simd>(self, c: usize, i: usize, second: bool) -> S::V;
    /// The `len`, at most sixteen, from `i`, a multiple of that, on as they stand, and zeros.
    unsafe fn load_part<S: Simd>(self, c: usize, i: usize, len: usize) -> S::V;
    /// Has what `load` will want soon brought to the first-level cache.
    fn prefetch_near<S: Simd>(self, _c: usize, _i: usize) {}
}

/// As they stand. Columns beyond the block's last are the last again.
#[derive(Clone, Copy)]
pub struct AsStored<W>(pub [*const W; COLS]);

/// As they stand; and keeps them, widened.
#[derive(Clone, Copy)]
pub struct WidenAndCopy<W>(pub AsStored<W>, pub *mut Wide);

/// Those that were kept.
#[derive(Clone, Copy)]
pub struct Widened(pub *const Wide);

impl<W: Number> WeightLoads for AsStored<W> {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, c: usize, i: usize, second: bool) -> S::V {
        unsafe {
            let w = self.0[c].add(i);
            if is_halved::<W>() {
                S::load_bf16(w.cast(), second)
            } else {
                S::load(w.cast::<f32>().add(usize::from(second) * LANES))
            }
        }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(self, c: usize, i: usize, len: usize) -> S::V {
        let mut lanes = [0.0f32; LANES];
        unsafe {
            (0..len).for_each(|lane| lanes[lane] = self.0[c].add(i + lane).read().widen());
            S::load(lanes.as_ptr())
        }
    }
    /// Of half as many bytes a line is used twice, and they come in time by themselves.
    #[inline(always)]
    fn prefetch_near<S: Simd>(self, c: usize, i: usize) {
        if size_of::<W>() == size_of::<f32>() {
            S::prefetch_near(self.0[c].wrapping_add(i));
        }
    }
}

impl<W: Number> WeightLoads for WidenAndCopy<W> {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, c: usize, i: usize, second: bool) -> S::V {
        unsafe {
            let w = self.0.load::<S>(c, i, second);
            S::store(w, (*self.1).0[i / LANES + usize::from(second)][c].as_mut_ptr());
            w
        }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(self, c: usize, i: usize, len: usize) -> S::V {
        unsafe {
            let w = self.0.load_part::<S>(c, i, len);
            S::store(w, (*self.1).0[i / LANES][c].as_mut_ptr());
            w
        }
    }
    #[inline(always)]
    fn prefetch_near<S: Simd>(self, c: usize, i: usize) {
        self.0.prefetch_near::<S>(c, i);
    }
}

impl WeightLoads for Widened {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, c: usize, i: usize, second: bool) -> S::V {
        unsafe { S::load((*self.0).0.as_ptr().cast::<f32>().add((i + usize::from(second) * LANES) * COLS + c * LANES)) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(self, c: usize, i: usize, _len: usize) -> S::V {
        unsafe { self.load::<S>(c, i, false) }
    }
}
