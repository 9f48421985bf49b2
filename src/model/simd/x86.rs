//! AVX-512, and AVX2 with FMA.

use super::{Kernel, Simd};
use half::bf16;
use std::arch::x86_64::*;

#[inline(never)]
#[target_feature(enable = "avx512f,avx2,fma")]
pub unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
    unsafe { kernel.run::<Avx512>() }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma")]
pub unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
    unsafe { kernel.run::<Avx2>() }
}

#[derive(Clone, Copy)]
pub struct Avx512;

/// Sums of halves, quarters, ... of two vectors, side by side. These are functions because a closure may be compiled on its own, without
/// the instruction set, and then each of its instructions is a call.
macro_rules! sums_of_parts {
    ($($name:ident $shuffle:ident $low:literal $high:literal),*) => {
        $(#[inline(always)]
        unsafe fn $name(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps($shuffle::<$low>(a, b), $shuffle::<$high>(a, b)) }
        })*
    };
}
sums_of_parts!(
    eights _mm512_shuffle_f32x4 0x44 0xee, fours _mm512_shuffle_f32x4 0x88 0xdd,
    twos _mm512_shuffle_ps 0x44 0xee, ones _mm512_shuffle_ps 0x88 0xdd
);

impl Simd for Avx512 {
    type V = __m512;
    const FUSED: bool = true;

    #[inline(always)]
    unsafe fn apart<K: Kernel>(kernel: K) -> K::Out {
        unsafe { run_avx512(kernel) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16, odd: bool) -> __m512 {
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let odds = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            _mm512_castsi512_ps(if odd { _mm512_and_si512(pairs, odds) } else { _mm512_slli_epi32::<16>(pairs) })
        }
    }
    #[inline(always)]
    unsafe fn store(v: __m512, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn stream(v: __m512, to: *mut f32) {
        unsafe { _mm512_stream_ps(to, v) }
    }
    #[inline(always)]
    fn prefetch<T>(line: *const T) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
    #[inline(always)]
    fn prefetch_near<T>(line: *const T) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    /// All sixteen at once: each step halves the vectors and adds the halves of two (then four) of them in one instruction,
    /// 45 instructions instead of sixteen times eight.
    #[inline(always)]
    unsafe fn sum_block(v: &[[__m512; 4]; 4]) -> [[f32; 4]; 4] {
        unsafe {
            // Four parts of each row's column c side by side, in 128-bit lanes by row.
            let mut columns = [_mm512_setzero_ps(); 4];
            for c in 0..4 {
                columns[c] = fours(eights(v[0][c], v[1][c]), eights(v[2][c], v[3][c]));
            }
            let sums = ones(twos(columns[0], columns[1]), twos(columns[2], columns[3]));
            std::mem::transmute::<__m512, [[f32; 4]; 4]>(sums)
        }
    }

    /// Four rows at a time inside the 128-bit lanes, then the lanes of four such results: 64 shuffles for 256 numbers.
    #[allow(clippy::needless_range_loop)] // it goes along the second index
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        unsafe {
            // groups[i][j], lane l: column 4 l + j of rows 4 i to 4 i + 3.
            let mut groups = [[_mm512_setzero_ps(); 4]; 4];
            for (i, group) in groups.iter_mut().enumerate() {
                let mut rows = [_mm512_setzero_ps(); 4];
                for (r, row) in rows.iter_mut().enumerate() {
                    *row = _mm512_loadu_ps(from.add((4 * i + r) * stride));
                }
                let (low, high) = (_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
                let (low2, high2) = (_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
                *group = [
                    _mm512_shuffle_ps::<0x44>(low, low2),
                    _mm512_shuffle_ps::<0xee>(low, low2),
                    _mm512_shuffle_ps::<0x44>(high, high2),
                    _mm512_shuffle_ps::<0xee>(high, high2),
                ];
            }
            for j in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(groups[0][j], groups[1][j]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(groups[0][j], groups[1][j]);
                let even2 = _mm512_shuffle_f32x4::<0x88>(groups[2][j], groups[3][j]);
                let odd2 = _mm512_shuffle_f32x4::<0xdd>(groups[2][j], groups[3][j]);
                _mm512_storeu_ps(to.add(j * to_stride), _mm512_shuffle_f32x4::<0x88>(even, even2));
                _mm512_storeu_ps(to.add((4 + j) * to_stride), _mm512_shuffle_f32x4::<0x88>(odd, odd2));
                _mm512_storeu_ps(to.add((8 + j) * to_stride), _mm512_shuffle_f32x4::<0xdd>(even, even2));
                _mm512_storeu_ps(to.add((12 + j) * to_stride), _mm512_shuffle_f32x4::<0xdd>(odd, odd2));
            }
        }
    }
}

#[derive(Clone, Copy)]
pub struct Avx2;

/// The even or the odd ones of sixteen numbers, widened.
#[inline(always)]
unsafe fn half_of_pairs(from: *const bf16, odd: bool) -> __m256 {
    unsafe {
        let pairs = _mm256_loadu_si256(from.cast());
        let odds = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        _mm256_castsi256_ps(if odd { _mm256_and_si256(pairs, odds) } else { _mm256_slli_epi32::<16>(pairs) })
    }
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    const FUSED: bool = true;

    #[inline(always)]
    unsafe fn apart<K: Kernel>(kernel: K) -> K::Out {
        unsafe { run_avx2(kernel) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16, odd: bool) -> Self::V {
        unsafe { [half_of_pairs(from, odd), half_of_pairs(from.add(16), odd)] }
    }
    #[inline(always)]
    unsafe fn store(v: Self::V, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn stream(v: Self::V, to: *mut f32) {
        unsafe {
            _mm256_stream_ps(to, v[0]);
            _mm256_stream_ps(to.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
}
