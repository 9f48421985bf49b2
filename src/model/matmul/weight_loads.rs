//! Loads a block of weights for the hot loop of dot products: as stored or, if many rows need them widened, from a copy in f32 in the
//! first-level cache.

use super::bf16_order::is_halved;
use super::{COLS, DEPTH};
use crate::model::simd::{LANES, Simd};
use crate::numbers::aligned::Number;

/// The weights of a block in f32, sixteen of each column side by side.
#[repr(C, align(64))]
pub struct Wide(pub [[[f32; LANES]; COLS]; DEPTH / LANES]);

/// How the hot loop loads weights.
pub trait WeightLoads: Copy {
    /// Sixteen of the thirty-two weights of column `c` from `i` on, the first or the second half in the order of x; see
    /// [`super::bf16_order`]. `i` is a multiple of thirty-two.
    ///
    /// # Safety
    /// The processor has S, and the column has those weights.
    unsafe fn load<S: Simd>(self, c: usize, i: usize, second: bool) -> S::V;
    /// The `len` weights, at most sixteen, from `i` on in the order of storage, padded with zeros. `i` is a multiple of sixteen.
    ///
    /// # Safety
    /// The processor has S, and the column has those weights.
    unsafe fn load_part<S: Simd>(self, c: usize, i: usize, len: usize) -> S::V;
    /// Prefetches to the first-level cache what `load` will read soon.
    fn prefetch_near<S: Simd>(self, _c: usize, _i: usize) {}
}

/// Loads them as stored. Columns beyond the block's last repeat the last.
#[derive(Clone, Copy)]
pub struct AsStored<W>(pub [*const W; COLS]);

/// Loads them as stored, and copies them widened.
#[derive(Clone, Copy)]
pub struct WidenAndCopy<W>(pub AsStored<W>, pub *mut Wide);

/// Loads the widened copy.
#[derive(Clone, Copy)]
pub struct Widened(pub *const Wide);

impl<W: Number> WeightLoads for AsStored<W> {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, c: usize, i: usize, second: bool) -> S::V {
        // SAFETY: thirty-two weights of the column from `i` on.
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
        // SAFETY: `len` weights of the column from `i` on, and as many lanes as a load takes.
        unsafe {
            (0..len).for_each(|lane| lanes[lane] = self.0[c].add(i + lane).read().widen());
            S::load(lanes.as_ptr())
        }
    }
    /// Weights in bf16 use each line twice, and arrive in time without a prefetch.
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
        // SAFETY: as for the stored weights; the copy has room for a block's depth, to which `i` belongs.
        unsafe {
            let w = self.0.load::<S>(c, i, second);
            S::store(w, (*self.1).0[i / LANES + usize::from(second)][c].as_mut_ptr());
            w
        }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(self, c: usize, i: usize, len: usize) -> S::V {
        // SAFETY: as for the stored weights; the copy has room for a block's depth, to which `i` belongs.
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
        // SAFETY: inside the copy, where `WidenAndCopy` has written what is read.
        unsafe { S::load((*self.0).0.as_ptr().cast::<f32>().add((i + usize::from(second) * LANES) * COLS + c * LANES)) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(self, c: usize, i: usize, _len: usize) -> S::V {
        // SAFETY: `WidenAndCopy` has written whole vectors.
        unsafe { self.load::<S>(c, i, false) }
    }
}
