//! Memory for many numbers, aligned for vector loads.

#![allow(unsafe_code)] // views of aligned memory

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// One cache line, the unit vector loads want to start at.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Numbers that start at a cache line.
#[derive(Default)]
pub struct Floats {
    memory: Memory,
    len: usize,
}

enum Memory {
    Heap(Vec<Line>),
    /// Pages of the system's own, large ones where it has them: fewer faults, fewer misses of the translation buffer.
    Pages(MmapMut),
}

/// From this size on numbers get pages of their own [bytes].
const PAGES_FROM: usize = 1 << 20;

impl Default for Memory {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

impl Memory {
    fn zeros(len: usize) -> Self {
        let bytes = size_of::<f32>() * len;
        if bytes >= PAGES_FROM
            && let Ok(pages) = MmapMut::map_anon(bytes)
        {
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage); // a wish
            return Self::Pages(pages);
        }
        Self::Heap(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    /// Numbers there is room for.
    fn capacity(&self) -> usize {
        match self {
            Self::Heap(lines) => 16 * lines.len(),
            Self::Pages(pages) => pages.len() / size_of::<f32>(),
        }
    }
}

impl Floats {
    /// `len` zeros.
    #[must_use]
    pub fn zeros(len: usize) -> Self {
        Self { memory: Memory::zeros(len), len }
    }

    /// Changes the length; the numbers are whatever was there before. Memory once taken is kept, and taken with room for a little
    /// more: batches differ by a few tokens, and pages that nobody touches cost nothing.
    pub fn reuse(&mut self, len: usize) {
        if self.memory.capacity() < len {
            self.memory = Memory::default(); // first give back, then take: both at once would be the peak
            self.memory = Memory::zeros(len + len / 4);
        }
        self.len = len;
    }

    /// As [`Floats::reuse`], and all zero.
    pub fn reuse_zeros(&mut self, len: usize) -> &mut [f32] {
        self.reuse(len);
        self.fill(0.0);
        self
    }
}

impl Clone for Floats {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }
}

impl PartialEq for Floats {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl std::fmt::Debug for Floats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

impl From<&[f32]> for Floats {
    fn from(values: &[f32]) -> Self {
        let mut floats = Self::zeros(values.len());
        floats.copy_from_slice(values);
        floats
    }
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        let start = match &self.memory {
            Memory::Heap(lines) => lines.as_ptr().cast(),
            Memory::Pages(pages) => pages.as_ptr().cast(),
        };
        // SAFETY: there are at least `len` initialised numbers, aligned to a line or a page.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        let start = match &mut self.memory {
            Memory::Heap(lines) => lines.as_mut_ptr().cast(),
            Memory::Pages(pages) => pages.as_mut_ptr().cast(),
        };
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}
