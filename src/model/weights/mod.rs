//! Weights on disk and in memory: safetensors mapped read-only, or owned and aligned once something changes them.

#![allow(unsafe_code)] // the memory map

mod names;

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;

use super::config::Config;
use super::directory;
use crate::error::{Error, Result};
use crate::numbers::aligned::{Floats, Number, Numbers};
use crate::numbers::tensors::TensorFile;

/// The parameters of a model in the order of [`Config::parameters`], matrices and vectors by themselves: however the matrices are
/// held, norms and biases, a thousandth of the numbers, stay in f32.
pub struct Weights<W> {
    /// Embedding, the matrices of each block, the head if it is not the embedding.
    pub matrices: Vec<Tensor<W>>,
    /// Norms and biases of each block, the final norm.
    pub vectors: Vec<Tensor<f32>>,
}

/// One parameter's numbers.
pub enum Tensor<T> {
    /// In a file, shared with every process that maps it.
    Mapped {
        /// The file. Checkpoints appear by rename and are never written again, and weights for a run's sampler not before it is done
        /// with them (`run::LiveWeights::publish`), which is what makes mapping them sound.
        file: Arc<Mmap>,
        /// First byte.
        from: usize,
        /// Numbers.
        len: usize,
    },
    /// In this process' memory.
    Owned(Numbers<T>),
}

impl<W: Number> Clone for Weights<W> {
    fn clone(&self) -> Self {
        Self { matrices: self.matrices.clone(), vectors: self.vectors.clone() }
    }
}

impl<T: Number> Clone for Tensor<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Mapped { file, from, len } => Self::Mapped { file: Arc::clone(file), from: *from, len: *len },
            Self::Owned(numbers) => Self::Owned(numbers.clone()),
        }
    }
}

impl<T: Number> Deref for Tensor<T> {
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

impl<T: Number> Tensor<T> {
    /// The numbers to change; copied out of the file the first time.
    pub fn to_mut(&mut self) -> &mut [T] {
        if let Self::Mapped { .. } = self {
            *self = Self::Owned(Numbers::from(&**self));
        }
        match self {
            Self::Owned(numbers) => numbers,
            Self::Mapped { .. } => unreachable!("made owned above"),
        }
    }
}

/// Maps the parameters of a Hugging Face model directory into memory; matrices that the file stores as other numbers than `W` are
/// read and converted.
///
/// # Errors
/// [`Error::Io`] when a file cannot be read, [`Error::Model`] naming the tensor that is missing or has another shape or type.
pub fn load<W: Number>(dir: &Path, config: &Config) -> Result<Weights<W>> {
    let files = directory::weight_files(dir)?.iter().map(|path| MappedFile::open(path)).collect::<Result<Vec<_>>>()?;
    let stored = names::stored(dir, &files, config)?;
    let mut weights = Weights { matrices: Vec::new(), vectors: Vec::new() };
    for (name, shape) in config.parameters() {
        let (file, stored) =
            stored.get(&name).ok_or_else(|| Error::model(dir, format!("the weights have no tensor {name}")))?;
        if shape.len() == 2 {
            weights.matrices.push(file.tensor(stored, &shape)?);
        } else {
            weights.vectors.push(file.tensor(stored, &shape)?);
        }
    }
    Ok(weights)
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
        // SAFETY: see `Tensor::Mapped`.
        let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(Error::io(path))?);
        Ok(Self { path: path.to_path_buf(), tensors, map })
    }

    /// A tensor's type and its bytes.
    fn bytes(&self, name: &str) -> Result<(Dtype, &[u8])> {
        let (dtype, from) = self.tensors.place(name)?;
        let len = dtype.bitsize() / 8 * self.tensors.shape(name)?.iter().product::<usize>();
        Ok((dtype, self.map.get(from as usize..).and_then(|bytes| bytes.get(..len)).unwrap_or_default()))
    }

    fn tensor<T: Number>(&self, name: &str, shape: &[usize]) -> Result<Tensor<T>> {
        let found = self.tensors.shape(name)?;
        if found != shape {
            let what = format!("tensor {name} has shape {found:?}, config.json says {shape:?}");
            return Err(Error::model(&self.path, what));
        }
        let ((stored, from), len) = (self.tensors.place(name)?, shape.iter().product());
        let bytes = self.map.get(from as usize..).and_then(|bytes| bytes.get(..size_of::<T>() * len));
        let aligned = bytes.is_some_and(|bytes| bytes.as_ptr().addr().is_multiple_of(align_of::<T>()));
        if stored == T::DTYPE && aligned && cfg!(target_endian = "little") {
            return Ok(Tensor::Mapped { file: Arc::clone(&self.map), from: from as usize, len });
        }
        self.tensors.read(name).map(Tensor::Owned)
    }
}

/// Random parameters as transformers starts a Qwen2: matrices normal with `initializer_range`, but for a row of zeros where the padding
/// token is embedded; biases 0, norms 1.
///
/// Each number is a function of (seed, tensor, index) alone.
#[must_use]
pub fn random(config: &Config, seed: u64) -> Weights<f32> {
    let mut weights = Weights { matrices: Vec::new(), vectors: Vec::new() };
    for (tensor, (name, shape)) in config.parameters().into_iter().enumerate() {
        let mut floats = Floats::zeros(shape.iter().product());
        if shape.len() == 2 {
            let stream = mix(seed ^ mix(tensor as u64 + 1));
            let spread = config.initializer_range;
            floats.par_iter_mut().enumerate().for_each(|(i, x)| *x = spread * normal(stream, i as u64));
            if let (0, Some(row)) = (tensor, config.pad_token_id) {
                floats[row as usize * shape[1]..][..shape[1]].fill(0.0);
            }
        } else if name.ends_with("norm.weight") {
            floats.fill(1.0);
        }
        let kind = if shape.len() == 2 { &mut weights.matrices } else { &mut weights.vectors };
        kind.push(Tensor::Owned(floats));
    }
    weights
}

/// A standard normal number by Box and Muller from two hashes.
fn normal(stream: u64, index: u64) -> f32 {
    let unit = |x: u64| ((x >> 40) as f32 + 0.5) / (1u64 << 24) as f32;
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
