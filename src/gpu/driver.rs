//! The interface of a GPU: memory, copies, kernel launches, matrix products, and recordings of these.
//!
//! All other code in [`crate::gpu`] runs on any [`Driver`]: CUDA (`crate::gpu::cuda`, with the feature `cuda`) or, in the tests, a
//! C++ shim that runs the source of the kernels on the CPU under sanitizers.

#![allow(unsafe_code)] // declares methods whose callers must check their arguments

use std::any::Any;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::numbers::dtype::Dtype;

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// For a kernel's optional array that is not there.
    pub const NULL: Self = Self(0);

    /// The address `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// An argument of a kernel, as wide as its parameter.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// A pointer.
    Address(Address),
    /// `u32`.
    U32(u32),
    /// `u64`.
    U64(u64),
    /// `float`.
    F32(f32),
}

impl Argument {
    /// The bits, low bytes first, and the size (bytes).
    #[must_use]
    pub fn bits(self) -> (u64, usize) {
        match self {
            Self::Address(Address(bits)) | Self::U64(bits) => (bits, 8),
            Self::U32(bits) => (bits.into(), 4),
            Self::F32(x) => (x.to_bits().into(), 4),
        }
    }
}

impl From<Address> for Argument {
    fn from(at: Address) -> Self {
        Self::Address(at)
    }
}

impl From<usize> for Argument {
    fn from(number: usize) -> Self {
        Self::U32(u32::try_from(number).expect("sizes on the device are below 2^32"))
    }
}

impl From<f32> for Argument {
    fn from(number: f32) -> Self {
        Self::F32(number)
    }
}

/// The size of a kernel launch.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks in x, y and z.
    pub blocks: [u32; 3],
    /// Threads per block; each kernel is compiled for one number of them.
    pub threads: u32,
    /// Dynamic shared memory per block (bytes).
    pub shared: u32,
    /// Whether blocks may start before the previous kernel has ended. The kernel itself then waits, in `wait_for_previous`.
    pub early: bool,
}

/// A row-major matrix in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// The first number.
    pub at: Address,
    /// Numbers from one row to the next.
    pub stride: usize,
    /// The type of the numbers.
    pub dtype: Dtype,
}

/// `out (m, n) = a (m, k) b (k, n) + beta out`, accumulated in f32.
#[derive(Debug, Clone, Copy)]
pub struct MatrixProduct {
    /// `(m, k)`, or `(k, m)` if `a_transposed`.
    pub a: Matrix,
    /// Whether `a` is stored transposed.
    pub a_transposed: bool,
    /// `(k, n)`, or `(n, k)` if `b_transposed`: a weight `(out, in)` as it is stored.
    pub b: Matrix,
    /// Whether `b` is stored transposed.
    pub b_transposed: bool,
    /// `(m, n)`.
    pub out: Matrix,
    /// m, n, k.
    pub shape: [usize; 3],
    /// 0, or 1 if `out` is f32. Sums in 16 bits would be rounded once per partial sum, and the library decides how many there are.
    pub beta: f32,
}

impl MatrixProduct {
    /// Whether every driver supports this product.
    #[must_use]
    pub fn is_supported(&self) -> bool {
        self.beta == 0.0 || (self.beta == 1.0 && self.out.dtype == Dtype::F32)
    }
}

/// How much of a GPU's memory is in use (bytes).
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Not used by any process.
    pub free: usize,
    /// The size of the memory.
    pub all: usize,
    /// Allocated by this process through [`Driver::allocate`] and not released.
    pub held: usize,
}

/// Host memory that the device can write. The host may read what was written before a mark that [`Driver::wait`] has waited for.
#[derive(Debug, Clone, Copy)]
pub struct PinnedMemory {
    /// Its address on the device.
    pub at: Address,
    /// Its address on the host.
    pub host: usize,
    /// Its size (bytes).
    pub bytes: usize,
}

/// A handle by which another process on the same GPU opens this process's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcHandle {
    /// The GPU's UUID, which is the same in every process.
    #[serde(rename = "card")]
    pub gpu: String,
    /// The driver's name for the allocation, in hexadecimal.
    pub handle: String,
    /// Where the memory starts in the allocation (bytes).
    pub offset: u64,
}

/// Launches, copies and products that [`Driver::record`] recorded.
pub type Recording = Box<dyn Any + Send>;

/// A point in the device's queue of work, made by [`Driver::mark`].
pub type Mark = Box<dyn Any + Send>;

/// One GPU with one queue of work. Calls return before their work is done, unless they say otherwise; the work is done in order.
///
/// # Errors
/// Every call returns [`crate::Error::Device`] with the device's message. The cause may be work that was queued earlier.
pub trait Driver: Send + Sync {
    /// The name of the GPU.
    fn name(&self) -> String;

    /// Whether the GPU runs kernels and products in this type.
    fn supports(&self, dtype: Dtype) -> bool;

    /// How much memory is in use. Released memory may still count as held until the work before its release is done.
    fn memory(&self) -> Result<Memory>;

    /// Allocates memory, aligned to 256 bytes, not cleared.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Allocates memory for which [`Driver::ipc_handle`] works.
    fn allocate_shareable(&self, bytes: usize) -> Result<Address>;

    /// Allocates zeroed host memory that the device can write; it lives as long as the driver.
    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedMemory>;

    /// Frees memory once all work queued so far is done.
    ///
    /// # Safety
    /// `at` was returned by `allocate` or `allocate_shareable` of this driver and was not released. Nothing queued or replayed later
    /// uses it.
    unsafe fn release(&self, at: Address);

    /// A handle to memory from [`Driver::allocate_shareable`], valid until the memory is released.
    fn ipc_handle(&self, of: Address) -> Result<IpcHandle>;

    /// Opens another process's memory for as long as the driver lives. That process may write or release it at any time: a reader must
    /// know from elsewhere that it does not.
    fn open_ipc_handle(&self, handle: &IpcHandle) -> Result<Address>;

    /// Copies from host to device; the caller may change `bytes` once this returns.
    ///
    /// # Safety
    /// Device memory is allocated for all of `bytes` from `to` on.
    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<()>;

    /// Copies from device to host, and waits for all work queued so far.
    ///
    /// # Safety
    /// Device memory is allocated for all of `bytes` from `from` on.
    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Safety
    /// `bytes` of device memory, or of memory that it can address, are allocated at both ends, and stay so until the copy is done.
    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Sets memory to zero.
    ///
    /// # Safety
    /// `bytes` of device memory are allocated at `at`.
    unsafe fn clear(&self, at: Address, bytes: usize) -> Result<()>;

    /// Runs a kernel of `src/gpu/kernels/`.
    ///
    /// # Safety
    /// `arguments` have the number and the types of the kernel's parameters, `grid.threads` and `grid.shared` are what the kernel is
    /// compiled for, and every array is allocated as far as the grid reads or writes it. [`crate::gpu::kernels`] checks this.
    unsafe fn launch(&self, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()>;

    /// Multiplies matrices; see [`MatrixProduct::is_supported`].
    ///
    /// # Safety
    /// The three matrices are allocated in the given shapes, and `out` overlaps neither factor.
    unsafe fn multiply(&self, product: &MatrixProduct) -> Result<()>;

    /// Records what `work` queues, instead of running it.
    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Recording>;

    /// Runs recorded work.
    ///
    /// # Safety
    /// All memory that the recorded work uses is still allocated.
    unsafe fn replay(&self, recording: &Recording) -> Result<()>;

    /// Marks the end of the work queued so far.
    fn mark(&self) -> Result<Mark>;

    /// Waits until the work before the mark is done.
    fn wait(&self, mark: &Mark) -> Result<()>;

    /// Device time between two marks (seconds), once the work before both is done.
    fn seconds_between(&self, from: &Mark, to: &Mark) -> Result<f64>;
}
