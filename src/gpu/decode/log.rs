//! The log of drawn tokens, which the device writes and the host reads while the device goes on.

#![allow(unsafe_code)] // memory that the device writes

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::error::Result;
use crate::gpu::driver::{Address, Driver, PinnedMemory};

/// Flags of an entry's first word, as `draw.cu` writes them; 0 means that there is no entry yet.
const DRAWN: u32 = 1 << 30;
const NOT_FINITE: u32 = 1 << 31;

/// One entry per position of each slot, of two words: the token with a flag, and the bits of its log-probability.
pub struct DrawLog {
    memory: PinnedMemory,
    limit: usize,
}

/// What was drawn at a position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LogEntry {
    /// A token and its log-probability (nats).
    Token(u32, f32),
    /// No token, because the logits were not finite.
    NotFinite,
}

impl DrawLog {
    /// Allocates `limit` empty entries per slot.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory.
    pub fn new(driver: &Arc<dyn Driver>, slots: usize, limit: usize) -> Result<Self> {
        Ok(Self { memory: driver.allocate_pinned(8 * slots * limit)?, limit })
    }

    /// The address for kernels.
    #[must_use]
    pub fn at(&self) -> Address {
        self.memory.at
    }

    /// How many entries it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.bytes / 8
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Empties a slot's entries, once the device has written the last of them.
    pub fn clear(&self, slot: usize) {
        for position in 0..self.limit {
            // SAFETY: within the memory, as `word` checks.
            unsafe { self.word(slot, position).write_volatile(0) };
        }
    }

    /// The entry at `position` of a slot, or `None` while there is none.
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
