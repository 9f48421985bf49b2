//! What the device has drawn, as the host reads it while the device goes on.

#![allow(unsafe_code)] // memory that the device writes

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::super::driver::{Address, Driver, PinnedMemory};
use crate::error::Result;

/// Flags of an entry's first word; 0 is no entry yet. `kernels/draw.cu` writes them.
const DRAWN: u32 = 1 << 30;
const NOT_FINITE: u32 = 1 << 31;

/// Entries of two words for each position of each slot: the token with a flag, the bits of its log-probability.
pub struct DrawLog {
    memory: PinnedMemory,
    limit: usize,
}

/// An entry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LogEntry {
    /// A token and its log-probability [nats].
    Token(u32, f32),
    /// The logits were not finite.
    NotFinite,
}

impl DrawLog {
    /// Room for `limit` entries of each slot, all empty.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is no room.
    pub fn new(driver: &Arc<dyn Driver>, slots: usize, limit: usize) -> Result<Self> {
        Ok(Self { memory: driver.allocate_pinned(8 * slots * limit)?, limit })
    }

    /// As kernels name it.
    #[must_use]
    pub fn at(&self) -> Address {
        self.memory.at
    }

    /// Entries there is room for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.bytes / 8
    }

    /// Whether there is room for none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Empties a slot's entries. The device must have written its last one there.
    pub fn clear(&self, slot: usize) {
        for position in 0..self.limit {
            // SAFETY: within the memory, as `word` checks.
            unsafe { self.word(slot, position).write_volatile(0) };
        }
    }

    /// What was drawn at `position` of a slot, once it is there.
    #[must_use]
    pub fn entry(&self, slot: usize, position: usize) -> Option<LogEntry> {
        let word = self.word(slot, position);
        // SAFETY: within the memory; the device writes the second word before the first.
        let (flagged, bits) = unsafe {
            let flagged = word.read_volatile();
            fence(Ordering::Acquire);
            (flagged, word.add(1).read_volatile())
        };
        match flagged {
            0 => None,
            word if word & NOT_FINITE != 0 => Some(LogEntry::NotFinite),
            word => Some(LogEntry::Token(word & !DRAWN, f32::from_bits(bits))),
        }
    }

    fn word(&self, slot: usize, position: usize) -> *mut u32 {
        let index = slot * self.limit + position;
        assert!(position < self.limit && index < self.len());
        (self.memory.host + 8 * index) as *mut u32
    }
}
