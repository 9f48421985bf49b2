//! Arrays of numbers aligned for vector loads, in huge pages where the system has them.

#![allow(unsafe_code)] // views of aligned memory

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use half::bf16;
use memmap2::MmapMut;

use crate::numbers::dtype::Dtype;

/// A type that numbers are stored as.
///
/// # Safety
/// Any bit pattern is valid, and all-zero bytes are the number zero.
pub unsafe trait Number: Copy + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// The type in which these are stored.
    const DTYPE: Dtype;
    /// Rounds to the nearest, ties to even.
    fn of(x: f32) -> Self;
    /// Converts to f32, exactly.
    fn widen(self) -> f32;
}

// SAFETY: any 32 bits are an IEEE 754 number, and zero bits are 0.0.
unsafe impl Number for f32 {
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

// SAFETY: any 16 bits are the upper half of an f32, and zero bits are 0.0.
unsafe impl Number for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    #[inline(always)]
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// A cache line: vector loads are fastest from its start.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A vector of numbers that starts at a cache line. Its memory never moves.
pub struct AlignedVec<T> {
    memory: Memory,
    len: usize,
    number: PhantomData<T>,
}

enum Memory {
    Heap(Vec<Line>),
    /// Pages mapped from the system, huge ones if it has them: fewer page faults and fewer TLB misses.
    Pages(MmapMut),
}

/// The size from which an array gets pages of its own (bytes).
const PAGES_FROM: usize = 1 << 20;

impl Default for Memory {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

/// Whether the system would allocate this much memory at once. It refuses only what it can never have.
#[must_use]
pub fn is_room_for(bytes: usize) -> bool {
    MmapMut::map_anon(bytes).is_ok()
}

impl Memory {
    fn zeros(bytes: usize) -> Self {
        if bytes >= PAGES_FROM
            && let Ok(pages) = MmapMut::map_anon(bytes)
        {
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage); // a hint
            return Self::Pages(pages);
        }
        Self::Heap(vec![Line([0; 64]); bytes.div_ceil(64)])
    }

    /// Capacity (bytes).
    fn capacity(&self) -> usize {
        match self {
            Self::Heap(lines) => size_of_val(&**lines),
            Self::Pages(pages) => pages.len(),
        }
    }
}

impl<T> Default for AlignedVec<T> {
    fn default() -> Self {
        Self { memory: Memory::default(), len: 0, number: PhantomData }
    }
}

impl<T: Number> AlignedVec<T> {
    /// `len` zeros.
    #[must_use]
    pub fn zeros(len: usize) -> Self {
        Self { memory: Memory::zeros(size_of::<T>() * len), len, number: PhantomData }
    }

    /// The numbers as bytes, in the order of this machine.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the numbers are initialised and have no padding.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), size_of_val(&**self)) }
    }

    /// The numbers as bytes, in the order of this machine.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let (start, len) = (self.as_mut_ptr().cast(), size_of_val(&**self));
        // SAFETY: the numbers are initialised and have no padding, and `Number` allows any bytes.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// Changes the length and leaves the values unspecified. The memory never shrinks, and grows with a quarter to spare: batches
    /// differ by a few tokens, and untouched pages cost nothing.
    pub fn reuse(&mut self, len: usize) {
        let bytes = size_of::<T>() * len;
        if self.memory.capacity() < bytes {
            self.memory = Memory::default(); // freed before the new one is allocated: both at once would be the peak
            self.memory = Memory::zeros(bytes + bytes / 4);
        }
        self.len = len;
    }
}

impl AlignedVec<f32> {
    /// Changes the length and sets all numbers to zero; see [`AlignedVec::reuse`].
    pub fn reuse_zeros(&mut self, len: usize) -> &mut [f32] {
        self.reuse(len);
        self.fill(0.0);
        self
    }
}

impl<T: Number> Clone for AlignedVec<T> {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }
}

impl<T: Number> PartialEq for AlignedVec<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Number> std::fmt::Debug for AlignedVec<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: Number> From<&[T]> for AlignedVec<T> {
    fn from(values: &[T]) -> Self {
        let mut numbers = Self::zeros(values.len());
        numbers.copy_from_slice(values);
        numbers
    }
}

impl<T: Number> Deref for AlignedVec<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let start = match &self.memory {
            Memory::Heap(lines) => lines.as_ptr().cast(),
            Memory::Pages(pages) => pages.as_ptr().cast(),
        };
        // SAFETY: there are at least `len` initialised numbers, aligned to a line or a page.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl<T: Number> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let start = match &mut self.memory {
            Memory::Heap(lines) => lines.as_mut_ptr().cast(),
            Memory::Pages(pages) => pages.as_mut_ptr().cast(),
        };
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}
