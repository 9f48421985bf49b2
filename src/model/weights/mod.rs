//! Loads weights: safetensors files mapped read-only, copied to aligned memory when something changes them.

#![allow(unsafe_code)] // the memory map

mod names;

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use memmap2::Mmap;
#[cfg(target_os = "linux")]
use memmap2::UncheckedAdvice;
use rayon::prelude::*;

use super::config::Config;
use super::matmul::Bf16Weight;
use super::parameters::Parameter;
use crate::directory;
use crate::error::{Error, Result};
use crate::numbers::aligned::{AlignedVec, Number};
use crate::numbers::dtype::Dtype;
use crate::numbers::tensors::TensorFile;

/// One parameter. Norms and biases, a thousandth of all numbers, are in f32 whatever type the matrices have.
pub enum ParameterValues {
    /// `(out, in)`.
    Matrix(StoredArray<f32>),
    /// `(out, in)` in bf16, for products alone.
    Bf16(Bf16Weight),
    /// `(out)`.
    Vector(StoredArray<f32>),
}

/// One parameter's numbers.
pub enum StoredArray<T> {
    /// In a file, shared with every process that maps it.
    Mapped {
        /// The file. The map is sound because a checkpoint appears by rename and is never written again, and the file for a run's
        /// sampler is written again only when the sampler is done with it (`run::LiveWeights::publish`).
        file: Arc<Mmap>,
        /// First byte.
        from: usize,
        /// Count of numbers.
        len: usize,
    },
    /// In the memory of this process.
    Owned(AlignedVec<T>),
}

impl Clone for ParameterValues {
    fn clone(&self) -> Self {
        match self {
            Self::Matrix(values) => Self::Matrix(values.clone()),
            Self::Bf16(weight) => Self::Bf16(weight.clone()),
            Self::Vector(values) => Self::Vector(values.clone()),
        }
    }
}

impl ParameterValues {
    /// A parameter of this shape with these numbers, its matrix in `dtype`.
    pub fn of(numbers: &[f32], shape: &[usize], dtype: Dtype) -> Self {
        assert_ne!(dtype, Dtype::F16, "{NO_F16}");
        match (shape, dtype) {
            (&[rows, columns], Dtype::Bf16) => {
                let mut weight = Bf16Weight::default();
                weight.pack_forward(numbers, (rows, columns));
                Self::Bf16(weight)
            }
            ([_, _], _) => Self::Matrix(StoredArray::Owned(AlignedVec::from(numbers))),
            _ => Self::Vector(StoredArray::Owned(AlignedVec::from(numbers))),
        }
    }

    /// What they take (bytes).
    pub fn bytes(&self) -> usize {
        match self {
            Self::Matrix(values) | Self::Vector(values) => size_of_val(&**values),
            Self::Bf16(weight) => weight.bytes(),
        }
    }

    /// The numbers, of either kind, of a model in f32.
    pub fn values(&self) -> &[f32] {
        match self {
            Self::Matrix(values) | Self::Vector(values) => values,
            Self::Bf16(_) => unreachable!("{ONLY_F32}"),
        }
    }

    /// The numbers to change, of either kind, of a model in f32.
    pub fn values_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Matrix(values) | Self::Vector(values) => values.to_mut(),
            Self::Bf16(_) => unreachable!("{ONLY_F32}"),
        }
    }
}

/// Why a model in f16 is not asked for.
const NO_F16: &str = "the CPU computes in f32 or bf16: `DtypeChoice::on_cpu` refuses f16";

/// Why a model in bf16 is not asked for its numbers.
const ONLY_F32: &str = "only a model in f32 is saved or trained";

impl<T: Number> Clone for StoredArray<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Mapped { file, from, len } => Self::Mapped { file: Arc::clone(file), from: *from, len: *len },
            Self::Owned(numbers) => Self::Owned(numbers.clone()),
        }
    }
}

impl<T: Number> Deref for StoredArray<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            // SAFETY: bounds and alignment were checked when it was mapped.
            Self::Mapped { file, from, len } => unsafe {
                std::slice::from_raw_parts(file[*from..].as_ptr().cast(), *len)
            },
            Self::Owned(numbers) => numbers,
        }
    }
}

impl<T: Number> StoredArray<T> {
    /// Gives the memory back in which the system holds a part of a file for this process.
    fn forget(self) {
        #[cfg(target_os = "linux")]
        if let Self::Mapped { file, from, len } = &self {
            // SAFETY: the map is read-only, and its pages come back from the file when they are read again.
            let done = unsafe { file.unchecked_advise_range(UncheckedAdvice::DontNeed, *from, size_of::<T>() * len) };
            drop(done); // a hint
        }
    }

    /// The numbers to change; copied out of the file the first time.
    pub fn to_mut(&mut self) -> &mut [T] {
        if let Self::Mapped { .. } = self {
            *self = Self::Owned(AlignedVec::from(&**self));
        }
        match self {
            Self::Owned(numbers) => numbers,
            Self::Mapped { .. } => unreachable!("made owned above"),
        }
    }
}

/// Loads the parameters of a Hugging Face model directory. In f32 they are mapped into memory, or converted from another stored type; in
/// bf16 they are packed, in the memory of `old` parameters of the same shapes if there are any.
///
/// # Errors
/// [`Error::Io`] when a file cannot be read, [`Error::Model`] naming the tensor that is missing or has another shape or type.
pub fn load(dir: &Path, config: &Config, dtype: Dtype, old: Vec<ParameterValues>) -> Result<Vec<ParameterValues>> {
    assert_ne!(dtype, Dtype::F16, "{NO_F16}");
    let files = directory::weight_files(dir)?.iter().map(|path| MappedFile::open(path)).collect::<Result<Vec<_>>>()?;
    let stored = names::stored(dir, &files, config)?;
    let old = old.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    let load = |((name, shape), old): ((String, Vec<usize>), Option<ParameterValues>)| {
        let (file, stored) =
            stored.get(&name).ok_or_else(|| Error::model(dir, format!("the weights have no tensor {name}")))?;
        Ok(match (&shape[..], dtype, old) {
            (&[rows, columns], Dtype::Bf16, old) => {
                let mut weight = if let Some(ParameterValues::Bf16(old)) = old { old } else { Bf16Weight::default() };
                file.pack(stored, (rows, columns), &mut weight)?;
                ParameterValues::Bf16(weight)
            }
            ([_, _], ..) => ParameterValues::Matrix(file.tensor(stored, &shape)?),
            _ => ParameterValues::Vector(file.tensor(stored, &shape)?),
        })
    };
    config.stored().named().into_iter().zip(old).map(load).collect()
}

struct MappedFile {
    path: PathBuf,
    tensors: TensorFile,
    map: Arc<Mmap>,
}

impl MappedFile {
    fn open(path: &Path) -> Result<Self> {
        let tensors = TensorFile::open(path)?;
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: see `StoredArray::Mapped`.
        let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(Error::io(path))?);
        Ok(Self { path: path.to_path_buf(), tensors, map })
    }

    /// A tensor's type and its bytes.
    fn bytes(&self, name: &str) -> Result<(safetensors::Dtype, &[u8])> {
        let (dtype, from) = self.tensors.place(name)?;
        let len = dtype.bitsize() / 8 * self.tensors.shape(name)?.iter().product::<usize>();
        Ok((dtype, self.map.get(from as usize..).and_then(|bytes| bytes.get(..len)).unwrap_or_default()))
    }

    /// Packs a matrix, and gives back what it takes to read it.
    fn pack(&self, name: &str, (rows, columns): (usize, usize), weight: &mut Bf16Weight) -> Result<()> {
        let shape = [rows, columns];
        if self.tensors.place(name)?.0 == safetensors::Dtype::F32 {
            let numbers: StoredArray<f32> = self.tensor(name, &shape)?;
            weight.pack_forward(&numbers, (rows, columns));
            numbers.forget();
        } else {
            let numbers: StoredArray<bf16> = self.tensor(name, &shape)?;
            weight.pack_forward(&numbers, (rows, columns));
            numbers.forget();
        }
        Ok(())
    }

    fn tensor<T: Number>(&self, name: &str, shape: &[usize]) -> Result<StoredArray<T>> {
        let found = self.tensors.shape(name)?;
        if found != shape {
            let what = format!("tensor {name} has shape {found:?}, config.json says {shape:?}");
            return Err(Error::model(&self.path, what));
        }
        let ((stored, from), len) = (self.tensors.place(name)?, shape.iter().product());
        let bytes = self.map.get(from as usize..).and_then(|bytes| bytes.get(..size_of::<T>() * len));
        let aligned = bytes.is_some_and(|bytes| bytes.as_ptr().addr().is_multiple_of(align_of::<T>()));
        if stored == T::DTYPE.into() && aligned && cfg!(target_endian = "little") {
            return Ok(StoredArray::Mapped { file: Arc::clone(&self.map), from: from as usize, len });
        }
        self.tensors.read(name).map(StoredArray::Owned)
    }
}

/// Random parameters as transformers initialises them: matrices normal with `initializer_range`, the padding token's embedding and
/// biases 0, norms 1.
///
/// Each number depends on (seed, tensor, index) alone.
#[must_use]
pub fn random(config: &Config, seed: u64) -> Vec<ParameterValues> {
    let random = |(tensor, (parameter, shape)): (usize, (Parameter, &[usize]))| {
        let mut floats = AlignedVec::zeros(shape.iter().product());
        if parameter.is_norm() {
            floats.fill(1.0);
        }
        let &[_, width] = shape else { return ParameterValues::Vector(StoredArray::Owned(floats)) };
        let (stream, spread) = (mix(seed ^ mix(tensor as u64 + 1)), config.initializer_range);
        floats.par_iter_mut().enumerate().for_each(|(i, x)| *x = spread * normal(stream, i as u64));
        if let (Parameter::EmbedTokens, Some(row)) = (parameter, config.pad_token_id) {
            floats[row as usize * width..][..width].fill(0.0);
        }
        ParameterValues::Matrix(StoredArray::Owned(floats))
    };
    config.stored().iter().enumerate().map(random).collect()
}

/// A number from 0 to 1, which depends on (seed, tensor, index) alone.
pub fn uniform(seed: u64, tensor: usize, index: usize) -> f32 {
    unit(mix(mix(seed ^ mix(tensor as u64 + 1)) ^ mix(index as u64)))
}

fn unit(x: u64) -> f32 {
    ((x >> 40) as f32 + 0.5) / (1u64 << 24) as f32
}

/// A standard normal number, by the Box-Muller transform of two hashes.
fn normal(stream: u64, index: u64) -> f32 {
    let radius = (-2.0 * unit(mix(stream ^ mix(2 * index))).ln()).sqrt();
    radius * (std::f32::consts::TAU * unit(mix(stream ^ mix(2 * index + 1)))).cos()
}

/// SplitMix64's step and finaliser: a good hash of 64 bits.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
