//! Arrays in device memory, freed when they are dropped.

#![allow(unsafe_code)] // copies within memory that a buffer owns

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;

use crate::error::Result;
use crate::gpu::driver::{Address, Driver, IpcHandle};

/// An array in device memory.
pub struct Buffer<N> {
    driver: Arc<dyn Driver>,
    at: Address,
    len: usize,
    of: PhantomData<N>,
}

impl<N: Pod> Buffer<N> {
    /// Allocates `len` numbers, not cleared.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory or, here and in all methods, when the device fails.
    pub fn new(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let at = driver.allocate((len * size_of::<N>()).max(1))?;
        Ok(Self { driver: Arc::clone(driver), at, len, of: PhantomData })
    }

    /// Allocates memory that another process may open; see [`Driver::ipc_handle`].
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn shareable(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let at = driver.allocate_shareable((len * size_of::<N>()).max(1))?;
        Ok(Self { driver: Arc::clone(driver), at, len, of: PhantomData })
    }

    /// A handle by which another process opens this memory.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn ipc_handle(&self) -> Result<IpcHandle> {
        self.driver.ipc_handle(self.at)
    }

    /// Overwrites all numbers with those at `from`.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    ///
    /// # Safety
    /// As many numbers as this buffer has are allocated at `from`, until the copy is done.
    pub(super) unsafe fn copy_from_address(&self, from: Address) -> Result<()> {
        // SAFETY: the target is this buffer, the source the caller's promise.
        unsafe { self.driver.copy(self.at, from, self.len * size_of::<N>()) }
    }

    /// Copies `len` numbers of `source` from `from` on to `index` and what follows.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn copy_from(&self, index: usize, source: &Self, from: usize, len: usize) -> Result<()> {
        self.check(index, len);
        source.check(from, len);
        // SAFETY: both ranges were checked; buffers are released in the order of the device's work.
        unsafe { self.driver.copy(self.at(index), source.at(from), len * size_of::<N>()) }
    }

    /// Allocates `len` zeros.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn zeros(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let buffer = Self::new(driver, len)?;
        buffer.clear()?;
        Ok(buffer)
    }

    /// Copies `numbers` to the device.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn from_slice(driver: &Arc<dyn Driver>, numbers: &[N]) -> Result<Self> {
        let buffer = Self::new(driver, numbers.len())?;
        buffer.upload(0, numbers)?;
        Ok(buffer)
    }

    /// How many numbers it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of number `index`, which may be one past the last.
    #[must_use]
    pub fn at(&self, index: usize) -> Address {
        assert!(index <= self.len, "number {index} of {}", self.len);
        self.at.offset(index * size_of::<N>())
    }

    /// Overwrites numbers from `index` on.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn upload(&self, index: usize, numbers: &[N]) -> Result<()> {
        self.check(index, numbers.len());
        // SAFETY: the range was checked.
        unsafe { self.driver.upload(self.at(index), bytemuck::cast_slice(numbers)) }
    }

    /// Reads numbers from `index` on, after all work queued so far.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn download(&self, index: usize, numbers: &mut [N]) -> Result<()> {
        self.check(index, numbers.len());
        // SAFETY: the range was checked.
        unsafe { self.driver.download(self.at(index), bytemuck::cast_slice_mut(numbers)) }
    }

    /// Reads all numbers, after all work queued so far.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn to_vec(&self) -> Result<Vec<N>> {
        let mut numbers = vec![N::zeroed(); self.len];
        self.download(0, &mut numbers)?;
        Ok(numbers)
    }

    /// Sets all numbers to zero.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn clear(&self) -> Result<()> {
        // SAFETY: this buffer's own memory.
        unsafe { self.driver.clear(self.at, self.len * size_of::<N>()) }
    }

    fn check(&self, index: usize, len: usize) {
        assert!(index + len <= self.len, "{len} numbers from {index} of {}", self.len);
    }
}

impl<N> Drop for Buffer<N> {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` or `shareable`, and released once. Work that uses it was queued before; a recording that does
        // must not be replayed, which `Driver::replay` demands.
        unsafe { self.driver.release(self.at) }
    }
}
