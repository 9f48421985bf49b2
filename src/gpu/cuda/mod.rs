//! Implements [`Driver`] for NVIDIA GPUs, on the CUDA driver and cuBLASLt.

#![allow(unsafe_code)] // calls the driver with handles that this directory makes, and with addresses that `Driver` makes the caller answer for

mod context;
#[cfg(not(feature = "candle-cuda"))] // which links them
mod libraries;
mod products;
mod recorded;
mod shared;
mod staging;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use cudarc::driver::sys::CUfunction_attribute_enum::{
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LIMIT, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as DECLARED,
};

use self::context::{Context, failed};
use self::products::Products;
use self::recorded::{Event, Graph};
use self::shared::SharedMemory;
use self::staging::Staging;
use crate::error::{Error, Result};
use crate::gpu::driver::{
    Address, Argument, Driver, Grid, IpcHandle, Mark, MatrixProduct, Memory, PinnedMemory, Recording,
};
use crate::numbers::dtype::Dtype;

/// The kernels for all architectures, compiled by `build.rs`.
static KERNELS: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// Aligned, because the driver reads it in words.
#[repr(align(16))]
struct Aligned<B: ?Sized>(B);

/// The oldest supported compute capability (Turing), the first with f16 in the matrix units that the kernels use.
const OLDEST: i32 = 75;

/// The oldest compute capability that can start a kernel before the previous one has ended (Hopper).
const EARLY: i32 = 90;

/// Shared memory that a block may have without opting in to more, including what its kernel declares (bytes).
const SHARED_MEMORY: u32 = 48 << 10;

/// A kernel, and the dynamic shared memory that it may currently use (bytes).
struct Kernel {
    function: sys::CUfunction,
    shared: u32,
}

struct Cuda {
    context: Arc<Context>,
    name: String,
    capability: i32,
    module: sys::CUmodule,
    kernels: Mutex<HashMap<String, Kernel>>,
    products: Products,
    staging: Mutex<Staging>,
    /// Addresses of pinned host memory.
    pinned: Mutex<Vec<usize>>,
    shared: SharedMemory,
    recording: AtomicBool,
}

// SAFETY: see Context.
unsafe impl Send for Cuda {}
// SAFETY: as above; all mutable state is behind locks.
unsafe impl Sync for Cuda {}

/// Opens GPU `ordinal`, counted from 0.
///
/// # Errors
/// [`Error::Device`] when the driver, a library or the GPU is missing, or with the driver's error.
pub fn open(ordinal: usize) -> Result<Arc<dyn Driver>> {
    #[cfg(not(feature = "candle-cuda"))]
    libraries::open()?;
    let context = Arc::new(Context::new(ordinal)?);
    let (name, capability) = (context.name()?, context.capability()?);
    if capability < OLDEST {
        return Err(Error::Device(format!(
            "GPU {ordinal} is a {name} of sm_{capability}; kernels are for sm_{OLDEST} (Turing) and newer"
        )));
    }
    // SAFETY: the whole image, aligned.
    let module = unsafe { result::module::load_data(KERNELS.0.as_ptr().cast()) }.map_err(refused)?;
    let (products, staging) = (Products::new()?, Mutex::new(Staging::new(&context)?));
    let (kernels, pinned, recording) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
    let shared = SharedMemory::new(&context);
    Ok(Arc::new(Cuda { context, name, capability, module, kernels, products, staging, pinned, shared, recording }))
}

/// The error for kernels that did not load, usually because the driver is older than the compiler.
fn refused(err: DriverError) -> Error {
    let mut version = 0;
    // SAFETY: writes one number.
    let _ = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    let (major, minor, compiled) = (version / 1000, version % 1000 / 10, env!("NVCC_VERSION"));
    failed(&format!(
        "loading kernels compiled by CUDA {compiled} with a driver of CUDA {major}.{minor} (update the older one)"
    ))(err)
}

impl Cuda {
    /// Binds the context, for an operation that cannot be recorded. While a recording is made it is refused: it would be left out, or
    /// read memory that is gone.
    fn bind(&self, what: &str) -> Result<()> {
        if self.recording.load(Ordering::Relaxed) {
            return Err(Error::Device(format!("GPU: {what} cannot be recorded")));
        }
        self.context.bind()
    }

    fn no_room(&self, bytes: usize, err: DriverError) -> Error {
        match self.memory() {
            Ok(Memory { free, all, held }) if err.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let [bytes, free, all, held] = [bytes, free, all, held].map(|bytes| bytes as f64 / f64::from(1 << 30));
                Error::Device(format!(
                    "GPU: no room for {bytes:.2} GiB: {free:.2} of {all:.2} GiB are free, {held:.2} are this process's"
                ))
            }
            _ => failed("making room in memory")(err),
        }
    }

    /// A kernel by its name, allowed to use `shared` bytes of dynamic shared memory.
    fn kernel(&self, name: &str, shared: u32) -> Result<sys::CUfunction> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = match kernels.entry(name.into()) {
            Entry::Occupied(kernel) => kernel.into_mut(),
            Entry::Vacant(room) => room.insert(self.find(name)?),
        };
        if shared > kernel.shared {
            // SAFETY: a function of the module; the driver refuses more than the GPU has.
            let allowed = unsafe { result::function::set_function_attribute(kernel.function, LIMIT, shared as i32) };
            allowed.map_err(failed(&format!("giving the kernel {name} {shared} bytes of shared memory a block")))?;
            kernel.shared = shared;
        }
        Ok(kernel.function)
    }

    fn find(&self, name: &str) -> Result<Kernel> {
        let c_name = CString::new(name).expect("names of kernels are identifiers");
        // SAFETY: the module lives as long as this.
        let function = unsafe { result::module::get_function(self.module, c_name) };
        let function = function.map_err(failed(&format!("finding the kernel {name}")))?;
        // SAFETY: a function of the module.
        let declared = unsafe { result::function::get_function_attribute(function, DECLARED) };
        let declared = declared.map_err(failed(&format!("asking what the kernel {name} takes")))?;
        Ok(Kernel { function, shared: SHARED_MEMORY.saturating_sub(declared as u32) })
    }
}

impl Driver for Cuda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn supports(&self, dtype: Dtype) -> bool {
        match dtype {
            Dtype::F32 | Dtype::F16 => true, // every supported GPU
            Dtype::Bf16 => self.capability >= 80,
        }
    }

    fn memory(&self) -> Result<Memory> {
        self.context.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.bind("making room in memory")?;
        // SAFETY: the caller writes the memory before it reads it, in work of this stream.
        unsafe { result::malloc_async(self.context.stream, bytes) }.map(Address).map_err(|err| self.no_room(bytes, err))
    }

    fn allocate_shareable(&self, bytes: usize) -> Result<Address> {
        self.bind("making room in memory")?;
        self.shared.allocate(bytes).map(Address).map_err(|err| self.no_room(bytes, err))
    }

    fn ipc_handle(&self, of: Address) -> Result<IpcHandle> {
        self.bind("sharing memory")?;
        self.shared.ipc_handle(of.0)
    }

    fn open_ipc_handle(&self, handle: &IpcHandle) -> Result<Address> {
        self.bind("opening another process's memory")?;
        self.shared.open(handle).map(Address)
    }

    unsafe fn release(&self, at: Address) {
        assert!(!self.recording.load(Ordering::Relaxed), "memory is released while work is recorded");
        if self.context.bind().is_ok() && !self.shared.release(at.0) {
            // SAFETY: from `allocate`, as the caller promises; work that uses it was queued earlier.
            let _ = unsafe { result::free_async(at.0, self.context.stream) };
        }
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedMemory> {
        self.bind("making room in shared memory")?;
        // SAFETY: freed when this is dropped, and zeroed before it is returned.
        let (host, at) = unsafe {
            let host = result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP).map_err(failed("pinning memory"))?;
            self.pinned.lock().unwrap_or_else(PoisonError::into_inner).push(host as usize);
            host.cast::<u8>().write_bytes(0, bytes);
            let mut at = 0;
            sys::cuMemHostGetDevicePointer_v2(&raw mut at, host, 0).result().map_err(failed("mapping memory"))?;
            (host as usize, at)
        };
        Ok(PinnedMemory { at: Address(at), host, bytes })
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.bind("a copy from the host")?;
        self.staging.lock().unwrap_or_else(PoisonError::into_inner).copy(to.0, bytes)
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.bind("a copy to the host")?;
        // SAFETY: the caller promises the device's side; the host's is written before `synchronize` returns.
        unsafe { result::memcpy_dtoh_async(bytes, from.0, self.context.stream) }
            .map_err(failed("copying from the GPU"))?;
        self.context.synchronize()
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(()); // CUDA refuses an empty copy
        }
        self.context.bind()?;
        // SAFETY: the caller promises both sides. This call also accepts pinned memory on either side.
        let done = unsafe { sys::cuMemcpyAsync(to.0, from.0, bytes, self.context.stream) };
        done.result().map_err(failed("copying on the GPU"))
    }

    unsafe fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: the caller promises that the memory is allocated.
        unsafe { result::memset_d8_async(at.0, 0, bytes, self.context.stream) }.map_err(failed("clearing memory"))
    }

    unsafe fn launch(&self, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        self.context.bind()?;
        let function = self.kernel(kernel, grid.shared)?;
        let mut bits: Vec<u64> = arguments.iter().map(|one| one.bits().0).collect();
        // Low bytes come first, so a pointer to the bits also points to a narrower number.
        let mut pointers: Vec<*mut c_void> = bits.iter_mut().map(|bits| (&raw mut *bits).cast()).collect();
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [x, y, z] = grid.blocks;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: self.context.stream,
            attrs: &raw mut early,
            numAttrs: u32::from(grid.early && self.capability >= EARLY),
        };
        // SAFETY: arguments are copied before this returns; the caller promises that they are the kernel's.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|err| failed(&format!("launching {kernel} with {grid:?}"))(err))
    }

    unsafe fn multiply(&self, product: &MatrixProduct) -> Result<()> {
        assert!(product.is_supported(), "{product:?}");
        if product.shape[..2].contains(&0) {
            return Ok(());
        }
        self.context.bind()?;
        self.products.multiply(&self.context, product)
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Recording> {
        assert!(!self.recording.swap(true, Ordering::Relaxed), "a recording cannot start while another is made");
        let recorded = Graph::record(&self.context, work);
        self.recording.store(false, Ordering::Relaxed);
        Ok(Box::new(recorded?))
    }

    unsafe fn replay(&self, recording: &Recording) -> Result<()> {
        recording.downcast_ref::<Graph>().expect("recorded by this driver").replay()
    }

    fn mark(&self) -> Result<Mark> {
        self.bind("a mark")?;
        Ok(Box::new(Event::now(&self.context)?))
    }

    fn wait(&self, mark: &Mark) -> Result<()> {
        event(mark).wait()
    }

    fn seconds_between(&self, from: &Mark, to: &Mark) -> Result<f64> {
        event(from).seconds_to(event(to))
    }
}

fn event(mark: &Mark) -> &Event {
    mark.downcast_ref().expect("made by this driver")
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // The call that broke the context has already reported what fails here.
        let _ = self.context.synchronize();
        self.products.close();
        self.shared.close();
        for host in std::mem::take(&mut *self.pinned.lock().unwrap_or_else(PoisonError::into_inner)) {
            // SAFETY: from `allocate_pinned`, and no longer used by any work.
            let _ = unsafe { result::free_host(host as *mut c_void) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::module::unload(self.module) };
    }
}
