//! Shares memory between processes on one GPU, with CUDA's inter-process handles.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::context::{Context, failed};
use crate::error::{Error, Result};
use crate::gpu::driver::IpcHandle;

/// The allocations that this process may share, and those that it has opened of other processes.
pub struct SharedMemory {
    context: Arc<Context>,
    own: Mutex<HashSet<u64>>,
    opened: Mutex<Vec<u64>>,
}

impl SharedMemory {
    /// With nothing shared or opened.
    pub fn new(context: &Arc<Context>) -> Self {
        Self { context: Arc::clone(context), own: Mutex::default(), opened: Mutex::default() }
    }

    /// Allocates from the device directly, because memory of the stream's pool cannot be opened by other processes.
    pub fn allocate(&self, bytes: usize) -> std::result::Result<u64, result::DriverError> {
        // SAFETY: the caller writes the memory before it reads it.
        let at = unsafe { result::malloc_sync(bytes) }?;
        self.own.lock().unwrap_or_else(PoisonError::into_inner).insert(at);
        Ok(at)
    }

    /// Frees memory that came from `allocate`, once no work uses it. Returns whether it did.
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
        // SAFETY: the pointers have the types of cuda.h; an address that is not memory of this context is refused.
        unsafe {
            // A small allocation may be part of a larger one, which is what the handle names.
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
            return Err(Error::Device("GPU: the memory is on another GPU".into()));
        }
        let bytes = handle.handle.as_bytes().as_chunks::<2>().0.iter();
        let bytes = bytes.map(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        let reserved = bytes.collect::<Option<Vec<u8>>>().and_then(|bytes| <[u8; 64]>::try_from(bytes).ok());
        let reserved = reserved
            .ok_or_else(|| Error::Device("GPU: the handle of the memory is not 64 bytes in hexadecimal".into()))?;
        let (mut base, opaque) = (0, sys::CUipcMemHandle { reserved: reserved.map(|byte| byte as _) });
        let lazily = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the pointer has the type of cuda.h; a handle that names nothing is refused.
        let opened = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut base, opaque, lazily) };
        opened.result().map_err(failed("opening another process's memory"))?;
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).push(base);
        Ok(base + handle.offset)
    }

    /// Closes all opened memory, which no work uses any more.
    pub fn close(&self) {
        for base in self.opened.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: from `open`.
            let _ = unsafe { sys::cuIpcCloseMemHandle(base) };
        }
    }
}
