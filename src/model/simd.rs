//! Sixteen f32 lanes on whatever the processor has: AVX-512, AVX2 with FMA, or plain code the compiler may vectorise.
//!
//! A [`Kernel`] is written once over [`Simd`] and compiled for each; [`run`] picks at run time. All three add in the same lanes and
//! reduce in the same order, so AVX-512 and AVX2 give the same bits; plain code rounds products that FMA does not.

#![allow(unsafe_code)] // intrinsics behind one dispatch; the bounds are checked by the kernels' callers in `matmul`

use std::sync::LazyLock;

/// Lanes of a [`Simd::V`].
pub const LANES: usize = 16;

/// One instruction set.
pub trait Simd: Copy {
    /// [`LANES`] numbers.
    type V: Copy;
    /// Whether `a * b + c` rounds once.
    const FUSED: bool;
    /// All lanes `x`.
    ///
    /// # Safety
    /// Here and below: the processor has the instruction set, which [`run`] checks.
    unsafe fn splat(x: f32) -> Self::V;
    /// # Safety
    /// `from` points at [`LANES`] numbers.
    unsafe fn load(from: *const f32) -> Self::V;
    /// # Safety
    /// `to` points at room for [`LANES`] numbers.
    unsafe fn store(v: Self::V, to: *mut f32);
    /// Has a cache line brought to the second-level cache, if it exists.
    #[inline(always)]
    fn prefetch(_line: *const f32) {}
    /// `a * b + c` in each lane.
    ///
    /// # Safety
    /// As [`Simd::splat`].
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sums of 4 x 4 vectors, each by halves as [`sum`] does it.
    ///
    /// # Safety
    /// As [`Simd::splat`].
    #[inline(always)]
    unsafe fn sum_block(v: &[[Self::V; 4]; 4]) -> [[f32; 4]; 4] {
        v.map(|row| row.map(|v| unsafe { sum::<Self>(v) }))
    }
    /// [`LANES`] x [`LANES`] numbers in rows of `stride` become columns in rows of `to_stride`.
    ///
    /// # Safety
    /// Both matrices are there.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        for row in 0..LANES {
            for column in 0..LANES {
                unsafe { *to.add(column * to_stride + row) = *from.add(row * stride + column) };
            }
        }
    }
}

/// A computation over any instruction set. `run` must be `#[inline(always)]`, or it is compiled without the set.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// # Safety
    /// The processor has `S`, and the kernel's own pointers are good for what it does.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// `a * b + c`, rounded once where the instruction set does so at no cost.
#[inline(always)]
pub fn mul_add<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// The sum of all lanes, by halves.
///
/// # Safety
/// As [`Simd::splat`].
#[inline(always)]
pub unsafe fn sum<S: Simd>(v: S::V) -> f32 {
    let mut lanes = [0.0f32; LANES];
    unsafe { S::store(v, lanes.as_mut_ptr()) };
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// e^x within 2 units in the last place; 0 below -87.3, never infinite (x is bounded to 88).
///
/// Cephes' `expf`: x = n ln 2 + r, a polynomial for e^r, n into the exponent. Branch-free, so that loops over it vectorise.
#[inline(always)]
pub fn exp<S: Simd>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    let bounded = x.clamp(-87.3, 88.0);
    let shifted = mul_add::<S>(bounded, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<S>(n, -0.693_359_4, bounded);
    let r = mul_add::<S>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = mul_add::<S>(p, r, c);
    }
    let p = mul_add::<S>(p * r, r, r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < -87.3 { 0.0 } else { p * scale }
}

/// Runs a kernel on the best instruction set of this processor.
///
/// # Safety
/// The kernel's pointers are good for what it does.
#[inline]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    #[cfg(target_arch = "x86_64")]
    {
        match *LEVEL {
            Level::Avx512 => return unsafe { x86::run_avx512(kernel) },
            Level::Avx2 => return unsafe { x86::run_avx2(kernel) },
            Level::Plain => {}
        }
    }
    unsafe { kernel.run::<Plain>() }
}

#[derive(Clone, Copy)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Plain,
}

static LEVEL: LazyLock<Level> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if avx2 && is_x86_feature_detected!("avx512f") {
            return Level::Avx512;
        }
        if avx2 {
            return Level::Avx2;
        }
    }
    Level::Plain
});

#[derive(Clone, Copy)]
struct Plain;

impl Simd for Plain {
    type V = [f32; LANES];
    // Where FMA is in the baseline (64-bit Arm) mul_add is one instruction; elsewhere it would be a call.
    const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(v: Self::V, to: *mut f32) {
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| mul_add::<Self>(a[i], b[i], c[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Simd};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
        unsafe { kernel.run::<Avx512>() }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
        unsafe { kernel.run::<Avx2>() }
    }

    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const FUSED: bool = true;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(v: __m512, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        fn prefetch(line: *const f32) {
            // SAFETY: a hint; it never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
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
                let eights =
                    |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
                let fours =
                    |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let twos = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
                let ones = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
                // Four parts of each row's column c side by side, in 128-bit lanes by row.
                let column = |c: usize| fours(eights(v[0][c], v[1][c]), eights(v[2][c], v[3][c]));
                let sums = ones(twos(column(0), column(1)), twos(column(2), column(3)));
                std::mem::transmute::<__m512, [[f32; 4]; 4]>(sums)
            }
        }

        /// Four rows at a time inside the 128-bit lanes, then the lanes of four such results: 64 shuffles for 256 numbers.
        #[inline(always)]
        unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
            unsafe {
                // fours[i][j], lane l: column 4 l + j of rows 4 i to 4 i + 3.
                let fours: [[__m512; 4]; 4] = std::array::from_fn(|i| {
                    let row = |r: usize| _mm512_loadu_ps(from.add((4 * i + r) * stride));
                    let (low, high) = (_mm512_unpacklo_ps(row(0), row(1)), _mm512_unpackhi_ps(row(0), row(1)));
                    let (low2, high2) = (_mm512_unpacklo_ps(row(2), row(3)), _mm512_unpackhi_ps(row(2), row(3)));
                    [
                        _mm512_shuffle_ps::<0x44>(low, low2),
                        _mm512_shuffle_ps::<0xee>(low, low2),
                        _mm512_shuffle_ps::<0x44>(high, high2),
                        _mm512_shuffle_ps::<0xee>(high, high2),
                    ]
                });
                (0..4).for_each(|j| {
                    let even = |i: usize| _mm512_shuffle_f32x4::<0x88>(fours[i][j], fours[i + 1][j]);
                    let odd = |i: usize| _mm512_shuffle_f32x4::<0xdd>(fours[i][j], fours[i + 1][j]);
                    let put = |column: usize, v| _mm512_storeu_ps(to.add(column * to_stride), v);
                    put(j, _mm512_shuffle_f32x4::<0x88>(even(0), even(2)));
                    put(4 + j, _mm512_shuffle_f32x4::<0x88>(odd(0), odd(2)));
                    put(8 + j, _mm512_shuffle_f32x4::<0xdd>(even(0), even(2)));
                    put(12 + j, _mm512_shuffle_f32x4::<0xdd>(odd(0), odd(2)));
                });
            }
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx2;

    impl Simd for Avx2 {
        type V = [__m256; 2];
        const FUSED: bool = true;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(v: Self::V, to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, v[0]);
                _mm256_storeu_ps(to.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ExpOf(f32);
    impl Kernel for ExpOf {
        type Out = f32;
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> f32 {
            exp::<S>(self.0)
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            // SAFETY: the kernel has no pointers.
            let got = unsafe { run(ExpOf(x)) };
            worst = worst.max(((f64::from(got) - want) / want).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
        // SAFETY: as above.
        unsafe {
            assert_eq!(run(ExpOf(f32::NEG_INFINITY)), 0.0);
            assert_eq!(run(ExpOf(0.0)), 1.0);
            assert!(run(ExpOf(1e30)).is_finite());
        }
    }
}
