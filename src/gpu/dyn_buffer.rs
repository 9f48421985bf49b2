//! Arrays in device memory whose number type is known only at run time.

use std::sync::Arc;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::Result;
use crate::gpu::Buffer;
use crate::gpu::driver::{Address, Driver, Matrix};
use crate::numbers::dtype::Dtype;

/// How many numbers a thread rounds at a time.
const PART: usize = 1 << 16;

/// An array in device memory whose number type is known only at run time.
pub struct DynBuffer {
    bytes: Buffer<u8>,
    dtype: Dtype,
}

impl DynBuffer {
    /// Allocates `len` numbers, not cleared.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn new(driver: &Arc<dyn Driver>, dtype: Dtype, len: usize) -> Result<Self> {
        Ok(Self { bytes: Buffer::new(driver, len * dtype.size())?, dtype })
    }

    /// Allocates memory that another process may open.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn shareable(driver: &Arc<dyn Driver>, dtype: Dtype, len: usize) -> Result<Self> {
        Ok(Self { bytes: Buffer::shareable(driver, len * dtype.size())?, dtype })
    }

    /// The memory as bytes.
    #[must_use]
    pub fn bytes(&self) -> &Buffer<u8> {
        &self.bytes
    }

    /// Copies `numbers` to the device, rounded to nearest.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn from_f32(driver: &Arc<dyn Driver>, dtype: Dtype, numbers: &[f32]) -> Result<Self> {
        let buffer = Self::new(driver, dtype, numbers.len())?;
        buffer.upload(0, numbers)?;
        Ok(buffer)
    }

    /// The type of the numbers.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How many numbers it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The address of number `index`, which may be one past the last.
    #[must_use]
    pub fn at(&self, index: usize) -> Address {
        self.bytes.at(index * self.dtype.size())
    }

    /// A matrix with rows of `stride` numbers that starts at number `index`.
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

    /// Overwrites numbers from `index` on with `bytes` in the buffer's own type.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn upload_bytes(&self, index: usize, bytes: &[u8]) -> Result<()> {
        self.bytes.upload(index * self.dtype.size(), bytes)
    }

    /// Reads numbers from `index` on in the buffer's own type, after all work queued so far.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn download_bytes(&self, index: usize, bytes: &mut [u8]) -> Result<()> {
        self.bytes.download(index * self.dtype.size(), bytes)
    }

    /// Sets all numbers to zero.
    ///
    /// # Errors
    /// See [`Buffer::new`].
    pub fn clear(&self) -> Result<()> {
        self.bytes.clear()
    }

    /// Reads all numbers, after all work queued so far.
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
