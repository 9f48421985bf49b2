//! Sixteen f32 lanes with AVX-512, AVX2 with FMA, or plain code that the compiler may vectorise.
//!
//! A [`Kernel`] is written once over [`Simd`] and compiled for each; [`run`] picks one at run time. All three add in the same lanes and
//! reduce in the same order, so AVX-512 and AVX2 agree bit for bit; plain code rounds products that FMA does not.

#![allow(unsafe_code)] // intrinsics behind one dispatch; the bounds are checked by the kernels' callers in `matmul`

#[cfg(test)]
pub mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

use half::bf16;

use crate::numbers::aligned::Number;

/// Lanes of a [`Simd::V`].
pub const LANES: usize = 16;

/// One instruction set.
pub trait Simd: Copy {
    /// [`LANES`] numbers.
    type V: Copy;
    /// Whether `a * b + c` rounds once.
    const FUSED: bool;
    /// Runs a kernel as a function of its own, for a hot loop that needs all registers.
    ///
    /// # Safety
    /// The processor has the instruction set, and the kernel's own pointers are valid.
    unsafe fn apart<K: Kernel>(kernel: K) -> K::Out;
    /// All lanes `x`.
    ///
    /// # Safety
    /// Here and below: the processor has the instruction set, which [`run`] checks.
    unsafe fn splat(x: f32) -> Self::V;
    /// # Safety
    /// `from` points at [`LANES`] numbers.
    unsafe fn load(from: *const f32) -> Self::V;
    /// The even or the odd ones of twice [`LANES`] numbers, widened exactly. Neighbours share a 32-bit word, so that one instruction widens
    /// the even or the odd ones; widening in order takes two.
    ///
    /// # Safety
    /// `from` points at twice [`LANES`] numbers.
    unsafe fn load_bf16(from: *const bf16, odd: bool) -> Self::V;
    /// # Safety
    /// `to` points at room for [`LANES`] numbers.
    unsafe fn store(v: Self::V, to: *mut f32);
    /// Stores without reading the line into the caches first, where there is such a store. [`fence`] comes before another thread reads.
    ///
    /// # Safety
    /// `to` points at room for [`LANES`] numbers, and is a multiple of 64 bytes.
    #[inline(always)]
    unsafe fn stream(v: Self::V, to: *mut f32) {
        unsafe { Self::store(v, to) }
    }
    /// Prefetches a cache line to the second-level cache; any address is allowed.
    #[inline(always)]
    fn prefetch<T>(_line: *const T) {}
    /// Prefetches a cache line to the first-level cache; any address is allowed.
    #[inline(always)]
    fn prefetch_near<T>(_line: *const T) {}
    /// `a * b + c` in each lane.
    ///
    /// # Safety
    /// As [`Simd::splat`].
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sums of 4 x 4 vectors, each added by halves as in [`sum`].
    ///
    /// # Safety
    /// As [`Simd::splat`].
    #[inline(always)]
    unsafe fn sum_block(v: &[[Self::V; 4]; 4]) -> [[f32; 4]; 4] {
        let mut sums = [[0.0; 4]; 4];
        for (sums, row) in sums.iter_mut().zip(v) {
            for (to, &v) in sums.iter_mut().zip(row) {
                *to = unsafe { sum::<Self>(v) };
            }
        }
        sums
    }
    /// Transposes [`LANES`] x [`LANES`] numbers, from rows of `stride` to rows of `to_stride`.
    ///
    /// # Safety
    /// `from` and `to` point at [`LANES`] rows of [`LANES`] numbers with these strides.
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        for row in 0..LANES {
            for column in 0..LANES {
                unsafe { *to.add(column * to_stride + row) = *from.add(row * stride + column) };
            }
        }
    }
}

/// A computation for any instruction set. `run` must be `#[inline(always)]`, or it is compiled without the set. A closure may be too, and
/// then each instruction in it is a call: use loops.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// # Safety
    /// The processor has `S`, and the kernel's own pointers are valid.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// `a * b + c`, rounded once if the instruction set has FMA.
#[inline(always)]
pub fn mul_add<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// The sum of all lanes, added by halves.
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
/// The kernel's own pointers are valid.
#[inline]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    #[cfg(target_arch = "x86_64")]
    {
        match level() {
            Level::Avx512 => return unsafe { x86::run_avx512(kernel) },
            Level::Avx2 => return unsafe { x86::run_avx2(kernel) },
            Level::Plain => {}
        }
    }
    unsafe { kernel.run::<Plain>() }
}

/// Makes what was streamed visible before what is stored later.
#[inline(always)]
pub fn fence() {
    // SAFETY: it orders stores, and every x86-64 processor has it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Prefetches a cache line to the second-level cache; any address is allowed.
#[inline(always)]
pub fn prefetch<T>(_line: *const T) {
    #[cfg(target_arch = "x86_64")]
    <x86::Avx512 as Simd>::prefetch(_line);
}

/// The best instruction set of this processor.
pub fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = tests::FORCED.get() {
        return level;
    }
    *LEVEL
}

/// The instruction sets that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Plain,
}

impl Level {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            Self::Plain => "plain instructions",
        }
    }
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

    #[inline(never)]
    unsafe fn apart<K: Kernel>(kernel: K) -> K::Out {
        unsafe { kernel.run::<Self>() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16, odd: bool) -> Self::V {
        let pairs = unsafe { from.cast::<[[bf16; 2]; LANES]>().read_unaligned() };
        pairs.map(|pair| pair[usize::from(odd)].widen())
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
