//! Weights on disk and in memory: safetensors mapped read-only, or owned and aligned once something changes them.

#![allow(unsafe_code)] // the memory map

use std::collections::HashMap;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::config::Config;
use crate::error::{Error, Result};
use crate::floats::Floats;

/// One parameter's numbers.
pub enum Tensor {
    /// In a file, shared with every process that maps it.
    Mapped {
        /// The file. Checkpoints appear by rename and are never written again, which is what makes mapping them sound.
        file: Arc<Mmap>,
        /// First byte.
        from: usize,
        /// Numbers.
        len: usize,
    },
    /// In this process' memory.
    Owned(Floats),
}

impl Deref for Tensor {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            // SAFETY: bounds and alignment were checked when it was mapped.
            Self::Mapped { file, from, len } => unsafe {
                std::slice::from_raw_parts(file[*from..].as_ptr().cast(), *len)
            },
            Self::Owned(floats) => floats,
        }
    }
}

impl Tensor {
    /// The numbers to change; copied out of the file the first time.
    pub fn to_mut(&mut self) -> &mut [f32] {
        if let Self::Mapped { .. } = self {
            *self = Self::Owned(Floats::from(&**self));
        }
        match self {
            Self::Owned(floats) => floats,
            Self::Mapped { .. } => unreachable!("made owned above"),
        }
    }
}

/// Whether a model directory holds weights.
#[must_use]
pub fn has_weights(dir: &Path) -> bool {
    dir.join("model.safetensors").exists() || dir.join("model.safetensors.index.json").exists()
}

/// Maps the parameters of a Hugging Face model directory, in the order of [`Config::parameters`].
///
/// # Errors
/// [`Error::Io`] when a file cannot be read, [`Error::Model`] naming the tensor that is missing or has another shape or type.
pub fn load(dir: &Path, config: &Config) -> Result<Vec<Tensor>> {
    let mut found: HashMap<String, Tensor> = HashMap::new();
    let expected: HashMap<_, _> = config.parameters().into_iter().collect();
    for path in files(dir)? {
        load_file(&path, &expected, &mut found)?;
    }
    let take = |(name, _): (String, Vec<usize>)| {
        found.remove(&name).ok_or_else(|| Error::model(dir, format!("the weights have no tensor {name}")))
    };
    config.parameters().into_iter().map(take).collect()
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let text = std::fs::read_to_string(&index).map_err(Error::io(&index))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|err| Error::model(&index, err.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| Error::model(&index, "no weight_map"))?;
    let mut names: Vec<&str> = map.values().filter_map(|name| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(name) = names.iter().find(|name| Path::new(name).components().count() != 1) {
        return Err(Error::model(&index, format!("weight file {name:?} is outside the directory")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

fn load_file(path: &Path, expected: &HashMap<String, Vec<usize>>, found: &mut HashMap<String, Tensor>) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: see `Tensor::Mapped`.
    let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(Error::io(path))?);
    let tensors = SafeTensors::deserialize(&map)
        .map_err(|err| Error::model(path, format!("not a whole safetensors file: {err}")))?;
    for (name, view) in tensors.iter() {
        let Some(shape) = expected.get(name) else { continue };
        if view.shape() != shape {
            let what = format!("tensor {name} has shape {:?}, config.json says {shape:?}", view.shape());
            return Err(Error::model(path, what));
        }
        let tensor = match view.dtype() {
            Dtype::F32 => mapped_or_copied(&map, view.data()),
            Dtype::BF16 => converted(view.data(), |bytes| half::bf16::from_le_bytes(bytes).to_f32()),
            Dtype::F16 => converted(view.data(), |bytes| half::f16::from_le_bytes(bytes).to_f32()),
            other => return Err(Error::model(path, format!("tensor {name} is {other:?}; f32, bf16 and f16 are read"))),
        };
        found.insert(name.to_owned(), tensor);
    }
    Ok(())
}

fn mapped_or_copied(map: &Arc<Mmap>, data: &[u8]) -> Tensor {
    if data.as_ptr().addr().is_multiple_of(align_of::<f32>()) && cfg!(target_endian = "little") {
        let from = data.as_ptr().addr() - map.as_ptr().addr();
        return Tensor::Mapped { file: Arc::clone(map), from, len: data.len() / 4 };
    }
    let mut floats = Floats::zeros(data.len() / 4);
    for (to, bytes) in floats.iter_mut().zip(data.as_chunks::<4>().0) {
        *to = f32::from_le_bytes(*bytes);
    }
    Tensor::Owned(floats)
}

fn converted(data: &[u8], to_f32: impl Fn([u8; 2]) -> f32 + Sync) -> Tensor {
    let mut floats = Floats::zeros(data.len() / 2);
    let halves = data.as_chunks::<2>().0;
    floats.par_iter_mut().with_min_len(1 << 16).zip(halves).for_each(|(to, bytes)| *to = to_f32(*bytes));
    Tensor::Owned(floats)
}

/// Random parameters as transformers starts a Qwen2: matrices normal with `initializer_range`, biases 0, norms 1.
///
/// Each number is a function of (seed, tensor, index) alone.
#[must_use]
pub fn random(config: &Config, seed: u64) -> Vec<Tensor> {
    let parameters = config.parameters().into_iter().enumerate();
    let tensors = parameters.map(|(tensor, (name, shape))| {
        let mut floats = Floats::zeros(shape.iter().product());
        if shape.len() == 2 {
            let stream = mix(seed ^ mix(tensor as u64 + 1));
            let spread = config.initializer_range;
            floats.par_iter_mut().enumerate().for_each(|(i, x)| *x = spread * normal(stream, i as u64));
        } else if name.ends_with("norm.weight") {
            floats.fill(1.0);
        }
        Tensor::Owned(floats)
    });
    tensors.collect()
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
