//! Models as GGUF, llama.cpp's format: weights, shape and tokenizer in one file. candle reads and writes it, and knows its quantised numbers.

mod config;
mod names;
mod tokenizer;
mod write;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::model::{Config, Model};
use crate::numbers::aligned::AlignedVec;
use crate::numbers::dtype::Dtype;
use names::Way;

pub use write::{About, Companions, write};

/// Numbers of a tensor that a thread converts at once.
const NUMBERS_AT_ONCE: usize = 1 << 15;

/// A GGUF file whose header has been read.
pub struct Gguf {
    path: PathBuf,
    header: Content,
}

impl Gguf {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Model`] when it is no GGUF file, or a damaged one.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
        let header = guarded(|| Content::read(&mut file));
        Ok(Self {
            path: path.into(),
            header: header.map_err(|what| Error::model(path, format!("not a GGUF file: {what}")))?,
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `general.architecture`.
    #[must_use]
    pub fn architecture(&self) -> &str {
        self.text("general.architecture").unwrap_or_default()
    }

    /// Whether matrices are stored in fewer than 16 bits.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        let plain = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16];
        self.header.tensor_infos.values().any(|info| !plain.contains(&info.ggml_dtype))
    }

    /// Loads the weights of a model that the engine runs, in f32 or bf16.
    ///
    /// # Errors
    /// [`Error::Model`] when the file describes another model, or has other tensors than it needs.
    pub fn load(&self, dtype: Dtype) -> Result<Model> {
        let config = self.config()?;
        self.refuse_other_tensors(&config)?;
        Model::from_parameters(&config, dtype, |layer, parameter, shape| {
            let numbers = self.tensor(&names::stored(layer, parameter), shape)?;
            Ok(names::reorder(&config, parameter, numbers, Way::FromFile))
        })
    }

    /// The numbers of a tensor of this shape. Each thread converts some rows at a time: candle returns them in memory of its own.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<AlignedVec<f32>> {
        let info =
            self.header.tensor_infos.get(name).ok_or_else(|| self.error(format!("there is no tensor {name}")))?;
        let found = info.shape.dims();
        if found != shape {
            return Err(self.error(format!("tensor {name} has shape {found:?}, the header says {shape:?}")));
        }
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<usize>() / columns;
        let some = |from, count| {
            let read = || self.rows(info, (from, count, columns));
            guarded(read).map_err(|what| self.error(format!("tensor {name}: {what}")))
        };
        some(rows - 1, 1)?; // refuses a file that is too short, before the memory for its numbers is allocated
        let mut numbers = AlignedVec::zeros(rows * columns);
        let at_once = (NUMBERS_AT_ONCE / columns).max(1);
        numbers.par_chunks_mut(at_once * columns).enumerate().try_for_each(|(chunk, numbers)| {
            numbers.copy_from_slice(&some(chunk * at_once, numbers.len() / columns)?);
            Ok(())
        })?;
        Ok(numbers)
    }

    /// The numbers of `count` rows of a tensor from row `from` on.
    fn rows(&self, info: &TensorInfo, (from, count, columns): (usize, usize, usize)) -> candle_core::Result<Vec<f32>> {
        let row_bytes = (columns / info.ggml_dtype.block_size() * info.ggml_dtype.type_size()) as u64;
        let offset = info.offset.saturating_add(row_bytes.saturating_mul(from as u64));
        let part = TensorInfo { ggml_dtype: info.ggml_dtype, shape: (count, columns).into(), offset };
        let mut file = File::open(&self.path)?;
        numbers(&part.read(&mut file, self.header.tensor_data_offset, &Device::Cpu)?.dequantize(&Device::Cpu)?)
    }

    /// Refuses tensors that the model does not compute with.
    fn refuse_other_tensors(&self, config: &Config) -> Result<()> {
        let list = config.stored();
        let known: BTreeSet<String> =
            list.places().map(|(layer, parameter, _)| names::stored(layer, parameter)).collect();
        let other = self.header.tensor_infos.keys().find(|name| !known.contains(*name) && *name != config::FACTORS);
        other.map_or(Ok(()), |name| {
            let (family, layers) = (config.family.name(), config.num_hidden_layers);
            Err(self.error(format!("tensor {name} is not part of a {family} model of {layers} layers")))
        })
    }

    fn error(&self, what: impl ToString) -> Error {
        Error::model(&self.path, what.to_string())
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.header.metadata.get(key)?.to_string().ok().map(String::as_str)
    }

    /// Whether it has a tensor of this name.
    #[must_use]
    pub fn has_tensor(&self, name: &str) -> bool {
        self.header.tensor_infos.contains_key(name)
    }

    /// A number of the header.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.header.metadata.get(key)? {
            Value::F32(x) => Some(f64::from(*x)),
            Value::F64(x) => Some(*x),
            value => integer(value).map(|x| x as f64),
        }
    }

    fn integer(&self, key: &str) -> Option<u64> {
        integer(self.header.metadata.get(key)?)
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.header.metadata.get(key)?.to_bool().ok()
    }

    fn list(&self, key: &str) -> Option<&[Value]> {
        self.header.metadata.get(key)?.to_vec().ok().map(Vec::as_slice)
    }
}

fn integer(value: &Value) -> Option<u64> {
    match value {
        Value::U8(x) => Some(u64::from(*x)),
        Value::U16(x) => Some(u64::from(*x)),
        Value::U32(x) => Some(u64::from(*x)),
        Value::U64(x) => Some(*x),
        Value::I8(x) => u64::try_from(*x).ok(),
        Value::I16(x) => u64::try_from(*x).ok(),
        Value::I32(x) => u64::try_from(*x).ok(),
        Value::I64(x) => u64::try_from(*x).ok(),
        _ => None,
    }
}

/// What candle says of an error, without the backtrace that may follow.
pub fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Runs candle, which panics on some damaged files.
fn guarded<T>(read: impl FnOnce() -> candle_core::Result<T>) -> std::result::Result<T, String> {
    let done = catch_unwind(AssertUnwindSafe(read));
    done.map_err(|_| "candle panics on it".to_owned())?.map_err(|err| first_line(&err))
}

/// All numbers of a tensor.
fn numbers(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
