//! Copies from the host that nobody waits for: through pinned memory, each part of it used again once the card has read it.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result;

use super::context::{Context, failed};
use super::recorded::Event;
use crate::error::Result;

/// Bytes of a part: a large copy goes through several, so that the host fills one while the card reads another.
const PART: usize = 256 << 10;

/// Parts: as many small copies may be under way before the next one waits for the first.
const PARTS: usize = 32;

/// Pinned memory and who still reads it.
pub struct Staging {
    context: Arc<Context>,
    memory: *mut u8,
    /// When the card will have read each part.
    read: [Option<Event>; PARTS],
    next: usize,
}

// SAFETY: the memory is this struct's alone; for the rest see Context.
unsafe impl Send for Staging {}

impl Staging {
    /// Pins the memory.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        context.bind()?;
        // SAFETY: freed when this is dropped; written before it is read.
        let memory = unsafe { result::malloc_host(PART * PARTS, 0) }.map_err(failed("pinning memory"))?;
        Ok(Self { context: Arc::clone(context), memory: memory.cast(), read: [const { None }; PARTS], next: 0 })
    }

    /// Asks for a copy to the device's memory at `to`; the bytes may change once it returns.
    pub fn copy(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        for (i, bytes) in bytes.chunks(PART).enumerate() {
            let part = self.next;
            self.next = (part + 1) % PARTS;
            if let Some(read) = self.read[part].take() {
                read.wait()?;
            }
            // SAFETY: the part is within the memory, and the card has read what was there.
            let staged = unsafe {
                let at = self.memory.add(part * PART);
                at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                std::slice::from_raw_parts(at, bytes.len())
            };
            // SAFETY: the device's side is the caller's; the host's stays as it is until the event below is past.
            unsafe { result::memcpy_htod_async(to + (i * PART) as u64, staged, self.context.stream) }
                .map_err(failed("copying to the GPU"))?;
            self.read[part] = Some(Event::now(&self.context)?);
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What fails here has been told by the call that broke the context.
        let _ = self.context.synchronize();
        // SAFETY: from `new`, and nothing reads it any more.
        let _ = unsafe { result::free_host(self.memory.cast::<c_void>()) };
    }
}
