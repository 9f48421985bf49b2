//! Memory that processes share on one card: CUDA's inter-process handles.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::context::{Context, failed};
use crate::error::{Error, Result};
use crate::gpu::driver::IpcHandle;

/// What this process may share, and what it has opened of others.
pub struct SharedMemory {
    context: Arc<Context>,
    own: Mutex<HashSet<u64>>,
    opened: Mutex<Vec<u64>>,
}

impl SharedMemory {
    /// Nothing yet.
    pub fn new(context: &Arc<Context>) -> Self {
        Self { context: Arc::clone(context), own: Mutex::default(), opened: Mutex::default() }
    }

    /// Memory from the card itself: what comes from the stream's pool cannot be opened elsewhere.
    pub fn allocate(&self, bytes: usize) -> std::result::Result<u64, result::DriverError> {
        // SAFETY: memory that was never written is the caller's to write first.
        let at = unsafe { result::malloc_sync(bytes) }?;
        self.own.lock().unwrap_or_else(PoisonError::into_inner).insert(at);
        Ok(at)
    }

    /// Whether it came from `allocate`; then it is given back, once nothing uses it.
    pub fn release(&self, at: u64) -> bool {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).remove(&at);
        if own && self.context.synchronize().is_ok() {
            // SAFETY: from `allocate`, and no work of this process uses it any more.
            let _ = unsafe { result::free_sync(at) };
        }
        own
    }

    /// See [`crate::gpu::driver::Driver::ipc_handle`].
    pub fn ipc_handle(&self, of: u64) -> Result<IpcHandle> {
        let (mut base, mut handle) = (0, sys::CUipcMemHandle { reserved: [0; 64] });
        // SAFETY: memory of this context; what is written has the types of cuda.h.
        unsafe {
            // A small allocation may lie within a larger one, which is what the handle names.
            sys::cuMemGetAddressRange_v2(&raw mut base, std::ptr::null_mut(), of)
                .result()
                .map_err(failed("finding memory to share"))?;
            sys::cuIpcGetMemHandle(&raw mut handle, of).result().map_err(failed("sharing memory"))?;
        }
        let handle = handle.reserved.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
        Ok(IpcHandle { gpu: self.context.uuid()?, handle, offset: of - base })
    }

    /// See [`crate::gpu::driver::Driver::open_ipc_handle`].
    pub fn open(&self, handle: &IpcHandle) -> Result<u64> {
        if handle.gpu != self.context.uuid()? {
            return Err(Error::Device("GPU: the memory is another card's".into()));
        }
        let bytes = handle.handle.as_bytes().as_chunks::<2>().0.iter();
        let bytes = bytes.map(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        let reserved = bytes.collect::<Option<Vec<u8>>>().and_then(|bytes| <[u8; 64]>::try_from(bytes).ok());
        let reserved = reserved.ok_or_else(|| Error::Device("GPU: that names no memory".into()))?;
        let (mut base, opaque) = (0, sys::CUipcMemHandle { reserved: reserved.map(|byte| byte as _) });
        let lazily = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: cuda.h; a handle that names nothing is refused.
        let opened = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut base, opaque, lazily) };
        opened.result().map_err(failed("opening another process's memory"))?;
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).push(base);
        Ok(base + handle.offset)
    }

    /// Closes what was opened; nothing uses it any more.
    pub fn close(&self) {
        for base in self.opened.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: from `open`.
            let _ = unsafe { sys::cuIpcCloseMemHandle(base) };
        }
    }
}
