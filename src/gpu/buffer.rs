//! Device memory with an owner.

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;

use super::driver::{Address, Driver, IpcHandle, Matrix};
use crate::error::Result;
use crate::numbers::dtype::Dtype;

/// Numbers that a thread rounds at a time.
const PART: usize = 1 << 16;

/// Numbers of one type in device memory, freed with it.
pub struct Buffer<N> {
    driver: Arc<dyn Driver>,
    at: Address,
    len: usize,
    of: PhantomData<N>,
}

impl<N: Pod> Buffer<N> {
    /// Room for `len` numbers, not cleared.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is no room, as with all that follows when the device fails.
    pub fn new(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let at = driver.allocate((len * size_of::<N>()).max(1))?;
        Ok(Self { driver: Arc::clone(driver), at, len, of: PhantomData })
    }

    /// The same, that another process may open; see [`Driver::ipc_handle`].
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn shareable(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let at = driver.allocate_shareable((len * size_of::<N>()).max(1))?;
        Ok(Self { driver: Arc::clone(driver), at, len, of: PhantomData })
    }

    /// By what another process opens it.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn ipc_handle(&self) -> Result<IpcHandle> {
        self.driver.ipc_handle(self.at)
    }

    /// Overwrites all numbers with as many of another process's memory.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn copy_from(&self, opened: Address) -> Result<()> {
        self.driver.copy(self.at, opened, self.len * size_of::<N>())
    }

    /// Room for `len` zeros.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn zeros(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let buffer = Self::new(driver, len)?;
        buffer.clear()?;
        Ok(buffer)
    }

    /// A copy of `numbers`.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn from_slice(driver: &Arc<dyn Driver>, numbers: &[N]) -> Result<Self> {
        let buffer = Self::new(driver, numbers.len())?;
        buffer.upload(0, numbers)?;
        Ok(buffer)
    }

    /// Numbers there is room for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is room for none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where number `index` is; one past the last is allowed.
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
        assert!(index + numbers.len() <= self.len, "{} numbers from {index} of {}", numbers.len(), self.len);
        self.driver.upload(self.at(index), bytemuck::cast_slice(numbers))
    }

    /// Reads numbers from `index` on, after all work asked for so far.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn download(&self, index: usize, numbers: &mut [N]) -> Result<()> {
        assert!(index + numbers.len() <= self.len, "{} numbers from {index} of {}", numbers.len(), self.len);
        self.driver.download(self.at(index), bytemuck::cast_slice_mut(numbers))
    }

    /// All numbers, after all work asked for so far.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn to_vec(&self) -> Result<Vec<N>> {
        let mut numbers = vec![N::zeroed(); self.len];
        self.download(0, &mut numbers)?;
        Ok(numbers)
    }

    /// Zeroes.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn clear(&self) -> Result<()> {
        self.driver.clear(self.at, self.len * size_of::<N>())
    }
}

impl<N> Drop for Buffer<N> {
    fn drop(&mut self) {
        self.driver.release(self.at);
    }
}

/// Numbers in device memory whose type is known only at run time.
pub struct DynBuffer {
    bytes: Buffer<u8>,
    dtype: Dtype,
}

impl DynBuffer {
    /// Room for `len` numbers, not cleared.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn new(driver: &Arc<dyn Driver>, dtype: Dtype, len: usize) -> Result<Self> {
        Ok(Self { bytes: Buffer::new(driver, len * dtype.size())?, dtype })
    }

    /// The same, that another process may open.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn shareable(driver: &Arc<dyn Driver>, dtype: Dtype, len: usize) -> Result<Self> {
        Ok(Self { bytes: Buffer::shareable(driver, len * dtype.size())?, dtype })
    }

    /// All of them, as bytes.
    #[must_use]
    pub fn bytes(&self) -> &Buffer<u8> {
        &self.bytes
    }

    /// A copy of `numbers`, rounded to nearest.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn from_f32(driver: &Arc<dyn Driver>, dtype: Dtype, numbers: &[f32]) -> Result<Self> {
        let buffer = Self::new(driver, dtype, numbers.len())?;
        buffer.upload(0, numbers)?;
        Ok(buffer)
    }

    /// Their type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Numbers there is room for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether there is room for none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Where number `index` is; one past the last is allowed.
    #[must_use]
    pub fn at(&self, index: usize) -> Address {
        self.bytes.at(index * self.dtype.size())
    }

    /// The rows of `stride` numbers that start at number `index`.
    #[must_use]
    pub fn matrix(&self, index: usize, stride: usize) -> Matrix {
        Matrix { at: self.at(index), stride, dtype: self.dtype }
    }

    /// Overwrites numbers from `index` on, rounded to nearest.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn upload(&self, index: usize, numbers: &[f32]) -> Result<()> {
        if self.dtype == Dtype::F32 {
            return self.bytes.upload(4 * index, bytemuck::cast_slice(numbers));
        }
        let mut bits = vec![0u16; numbers.len()];
        let parts = bits.par_chunks_mut(PART).zip(numbers.par_chunks(PART));
        parts.for_each(|(bits, numbers)| match self.dtype {
            Dtype::Bf16 => bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(numbers),
            _ => bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(numbers),
        });
        self.bytes.upload(2 * index, bytemuck::cast_slice(&bits))
    }

    /// Overwrites numbers from `index` on by some of the same type, as they lie in memory.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn upload_bytes(&self, index: usize, bytes: &[u8]) -> Result<()> {
        self.bytes.upload(index * self.dtype.size(), bytes)
    }

    /// Reads numbers from `index` on as they lie in memory, after all work asked for so far.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn download_bytes(&self, index: usize, bytes: &mut [u8]) -> Result<()> {
        self.bytes.download(index * self.dtype.size(), bytes)
    }

    /// Zeroes.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn clear(&self) -> Result<()> {
        self.bytes.clear()
    }

    /// All numbers, after all work asked for so far.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let bytes = self.bytes.to_vec()?;
        Ok(match self.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|one| f32::from_ne_bytes(*one)).collect(),
            Dtype::Bf16 => bytes.as_chunks::<2>().0.iter().map(|one| bf16::from_ne_bytes(*one).to_f32()).collect(),
            Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|one| f16::from_ne_bytes(*one).to_f32()).collect(),
        })
    }
}
