//! Copies from the host without waiting: through pinned memory, whose parts are reused once the GPU has read them.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result;

use super::context::{Context, failed};
use super::recorded::Event;
use crate::error::Result;

/// Size of a part (bytes). A large copy goes through several parts, so that the host fills one while the GPU reads another.
const PART: usize = 256 << 10;

/// How many parts there are, and so how many small copies may be queued before the next one waits for the first.
const PARTS: usize = 32;

/// Pinned memory, and when each part of it may be reused.
pub struct Staging {
    context: Arc<Context>,
    memory: *mut u8,
    /// The event after which the GPU has read each part.
    read: [Option<Event>; PARTS],
    next: usize,
}

// SAFETY: only this struct uses the memory; for the rest see Context.
unsafe impl Send for Staging {}

impl Staging {
    /// Allocates the pinned memory.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        context.bind()?;
        // SAFETY: freed when this is dropped; written before it is read.
        let memory = unsafe { result::malloc_host(PART * PARTS, 0) }.map_err(failed("pinning memory"))?;
        Ok(Self { context: Arc::clone(context), memory: memory.cast(), read: [const { None }; PARTS], next: 0 })
    }

    /// Queues a copy to device memory at `to`; the caller may change `bytes` once this returns.
    pub fn copy(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        for (i, bytes) in bytes.chunks(PART).enumerate() {
            let part = self.next;
            self.next = (part + 1) % PARTS;
            if let Some(read) = self.read[part].take() {
                read.wait()?;
            }
            // SAFETY: the part is within the memory, and the GPU has read what was there.
            let staged = unsafe {
                let at = self.memory.add(part * PART);
                at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                std::slice::from_raw_parts(at, bytes.len())
            };
            // SAFETY: the caller of `Driver::upload` promises the device's side; the host's does not change until the event below.
            unsafe { result::memcpy_htod_async(to + (i * PART) as u64, staged, self.context.stream) }
                .map_err(failed("copying to the GPU"))?;
            self.read[part] = Some(Event::now(&self.context)?);
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The call that broke the context has already reported what fails here.
        let _ = self.context.synchronize();
        // SAFETY: from `new`, and no longer read.
        let _ = unsafe { result::free_host(self.memory.cast::<c_void>()) };
    }
}
