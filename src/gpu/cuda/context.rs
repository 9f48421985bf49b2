//! The context of one GPU, and its one stream.

use std::borrow::Cow;
use std::ffi::CStr;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::error::{Error, Result};
use crate::gpu::driver::Memory;

/// The primary context of a GPU, which [`Context::bind`] makes current on a thread, and the stream that all work is queued in.
pub struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
    pub stream: sys::CUstream,
}

// SAFETY: the driver's handles may be used by any thread on which the context is current; all methods make it so.
unsafe impl Send for Context {}
// SAFETY: as above; the driver serialises calls.
unsafe impl Sync for Context {}

impl Context {
    /// Opens GPU `ordinal`, once [`super::libraries::open`] has found the driver.
    ///
    /// # Errors
    /// [`Error::Device`] when the driver does not start, or there is no such GPU.
    pub fn new(ordinal: usize) -> Result<Self> {
        result::init().map_err(failed("starting the driver"))?;
        let count = result::device::get_count().map_err(failed("counting the GPUs"))?;
        let index = i32::try_from(ordinal).ok().filter(|&index| index < count);
        let index =
            index.ok_or_else(|| Error::Device(format!("no GPU {ordinal} on this machine, which has {count}")))?;
        let device = result::device::get(index).map_err(failed("opening the device"))?;
        // SAFETY: a device of this driver.
        let handle = unsafe { result::primary_ctx::retain(device) }.map_err(failed("opening the device"))?;
        // SAFETY: just retained.
        unsafe { result::ctx::set_current(handle) }.map_err(failed("opening the device"))?;
        // A stream of its own does not synchronise with the default stream, which other users of the GPU in this process may use.
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        let context = Self { device, handle, stream: stream.map_err(failed("making a stream"))? };
        context.keep_memory()?;
        Ok(context)
    }

    /// Keeps freed memory in this process, so that the next allocation need not wait for the driver.
    fn keep_memory(&self) -> Result<()> {
        let mut all = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: a pool of this driver, and the type of this attribute.
        unsafe { result::mem_pool::set_attribute(self.pool()?, threshold, (&raw mut all).cast()) }
            .map_err(failed("keeping memory"))
    }

    /// The pool that the stream allocates from.
    fn pool(&self) -> Result<sys::CUmemoryPool> {
        // SAFETY: a device of this driver.
        unsafe { result::device::get_default_mem_pool(self.device) }.map_err(failed("opening the memory pool"))
    }

    /// How much memory is in use.
    pub fn memory(&self) -> Result<Memory> {
        self.bind()?;
        let (free, all) = result::mem_get_info().map_err(failed("asking how much memory is free"))?;
        let mut held = 0u64;
        let used = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
        // SAFETY: a pool of this driver, and the type of this attribute.
        unsafe { result::mem_pool::get_attribute(self.pool()?, used, (&raw mut held).cast()) }
            .map_err(failed("asking how much memory this process has"))?;
        Ok(Memory { free, all, held: held as usize })
    }

    /// Makes the context current on this thread.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: retained until dropped.
        unsafe { result::ctx::set_current(self.handle) }.map_err(failed("using the device"))
    }

    /// Waits for all work queued so far.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("waiting for the GPU"))
    }

    /// The name of the GPU.
    pub fn name(&self) -> Result<String> {
        result::device::get_name(self.device).map_err(failed("reading its name"))
    }

    /// The GPU's UUID, which is the same in every process.
    pub fn uuid(&self) -> Result<String> {
        self.bind()?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: a device of this driver.
        unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, self.device) }
            .result()
            .map_err(failed("reading its properties"))?;
        Ok(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
    }

    /// The compute capability: 90 for sm_90.
    pub fn capability(&self) -> Result<i32> {
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        // SAFETY: a device of this driver.
        let number = |which| {
            unsafe { result::device::get_attribute(self.device, which) }.map_err(failed("reading its properties"))
        };
        Ok(10 * number(MAJOR)? + number(MINOR)?)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // The call that broke the context has already reported what fails here.
        let _ = self.synchronize();
        // SAFETY: made by `new`, and no longer used.
        unsafe {
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Turns a driver's error into ours, for `map_err(failed("doing what"))`. The cause may be work that was queued earlier.
pub fn failed(what: &str) -> impl FnOnce(DriverError) -> Error {
    move |err| {
        let (what_is_wrong, name) = (text(err.error_string()), text(err.error_name()));
        Error::Device(format!("GPU: {what}: {what_is_wrong} ({name})"))
    }
}

fn text(said: std::result::Result<&CStr, DriverError>) -> Cow<'_, str> {
    said.map_or("an error without a description".into(), CStr::to_string_lossy)
}
