//! What a GPU offers: memory, copies, kernels, matrix products, recorded sequences of them.
//!
//! Everything above this file is written once for any [`Driver`]: CUDA (`super::cuda`, with the feature `cuda`), and in the tests
//! a C++ shim that runs the kernels' own source on the CPU under sanitizers.

use std::any::Any;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::numbers::dtype::Dtype;

/// A place in the device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// `bytes` further on.
    #[must_use]
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// An argument of a kernel, in the width of its parameter.
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
    /// Its bits, low first, and its size in bytes.
    #[must_use]
    pub fn bits(self) -> (u64, usize) {
        match self {
            Self::Address(Address(bits)) | Self::U64(bits) => (bits, 8),
            Self::U32(bits) => (bits.into(), 4),
            Self::F32(x) => (x.to_bits().into(), 4),
        }
    }
}

/// How many blocks of how many threads, with how much dynamic shared memory a block [bytes].
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks in x, y, z.
    pub blocks: [u32; 3],
    /// Threads a block, those the kernel is made for.
    pub threads: u32,
    /// Bytes.
    pub shared: u32,
    /// Whether blocks may begin before the kernel asked for before has ended, which the kernel itself waits for: `wait_for_previous`.
    pub early: bool,
}

/// A matrix in device memory, rows after each other, `stride` numbers from one to the next.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    /// Its first number.
    pub at: Address,
    /// Numbers from one row to the next.
    pub stride: usize,
    /// Of its numbers.
    pub dtype: Dtype,
}

/// `out (m, n) = a (m, k) b (k, n) + beta out`, accumulated in f32; what is added to is f32.
#[derive(Debug, Clone, Copy)]
pub struct MatrixProduct {
    /// `(m, k)`, or `(k, m)` where `a_transposed`.
    pub a: Matrix,
    /// Whether `a` is stored transposed.
    pub a_transposed: bool,
    /// `(k, n)`, or `(n, k)` where `b_transposed`: a weight `(out, in)` as it is stored.
    pub b: Matrix,
    /// Whether `b` is stored transposed.
    pub b_transposed: bool,
    /// `(m, n)`.
    pub out: Matrix,
    /// m, n, k.
    pub shape: [usize; 3],
    /// 0, or 1 where `out` is f32: sums in 16 bits would be rounded again with each part, and how often is the library's.
    pub beta: f32,
}

impl MatrixProduct {
    /// Whether it is one that drivers promise.
    #[must_use]
    pub fn is_promised(&self) -> bool {
        self.beta == 0.0 || (self.beta == 1.0 && self.out.dtype == Dtype::F32)
    }
}

/// Of a card's memory [bytes].
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// What nobody has.
    pub free: usize,
    /// All there is.
    pub all: usize,
    /// What this process has by [`Driver::allocate`] and has not released.
    pub held: usize,
}

/// Memory that host and device both see; the device writes, the host reads what [`Driver::wait`] has made sure of.
#[derive(Debug, Clone, Copy)]
pub struct PinnedMemory {
    /// As the device names it.
    pub at: Address,
    /// As the host names it.
    pub host: usize,
    /// Bytes.
    pub bytes: usize,
}

/// By what another process opens memory of this one, on the same card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcHandle {
    /// The card, whatever a process calls it.
    #[serde(rename = "card")]
    pub gpu: String,
    /// The driver's name for the allocation, in hexadecimal.
    pub handle: String,
    /// Where in it the memory begins [bytes].
    pub offset: u64,
}

/// A sequence of launches, copies and products, recorded once; given back by [`Driver::record`].
pub type Recording = Box<dyn Any + Send>;

/// A moment in the device's work, given by [`Driver::mark`].
pub type Mark = Box<dyn Any + Send>;

/// One GPU and its one queue of work: what is asked for is done in order, after the call has returned, unless it says otherwise.
///
/// # Errors
/// Every call returns [`crate::Error::Device`] with what the device said; work that failed earlier may show only then.
pub trait Driver: Send + Sync {
    /// The card's name.
    fn name(&self) -> String;

    /// Whether kernels and products for it run on this card.
    fn supports(&self, dtype: Dtype) -> bool;

    /// Who has how much of it. Memory on the way to be released may still count as held until the work before it is done.
    fn memory(&self) -> Result<Memory>;

    /// Memory, 256-byte aligned, not cleared.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives memory back, after all work asked for so far.
    fn release(&self, at: Address);

    /// The same, of the kind that [`Driver::ipc_handle`] can be asked for.
    fn allocate_shareable(&self, bytes: usize) -> Result<Address>;

    /// By what another process opens this memory, while it is not released.
    fn ipc_handle(&self, of: Address) -> Result<IpcHandle>;

    /// Memory of another process, which it may write or release at any time: who reads it knows from elsewhere that it does not. Open
    /// as long as the driver.
    fn open_ipc_handle(&self, handle: &IpcHandle) -> Result<Address>;

    /// Memory that the host sees too, zeroed; it lives as long as the driver.
    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedMemory>;

    /// Host to device; the bytes may change once it returns.
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()>;

    /// Device to host, after all work asked for so far.
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()>;

    /// Within the device.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Zeroes.
    fn clear(&self, at: Address, bytes: usize) -> Result<()>;

    /// Runs a kernel of `kernels/`.
    ///
    /// The arguments must be what the kernel takes, good for all that the grid reads and writes: [`super::kernels`] sees to it.
    fn launch(&self, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()>;

    /// A matrix product; [`MatrixProduct::is_promised`].
    fn product(&self, product: &MatrixProduct) -> Result<()>;

    /// Records what `work` asks for instead of doing it.
    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Recording>;

    /// Does what was recorded.
    fn replay(&self, recording: &Recording) -> Result<()>;

    /// The moment when all work asked for so far is done.
    fn mark(&self) -> Result<Mark>;

    /// Waits for it.
    fn wait(&self, mark: &Mark) -> Result<()>;

    /// Device time between two marks [s], once both are past.
    fn seconds_between(&self, from: &Mark, to: &Mark) -> Result<f64>;
}
