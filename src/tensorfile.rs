//! Safetensors files read and written one tensor at a time: neither side ever holds a second copy of all weights.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError, View};

use crate::error::{Error, Result};

/// Bytes of the header's length at the start of a file.
const LENGTH_BYTES: usize = 8;

/// The longest header that is read [bytes]; the safetensors format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open safetensors file, its header read and its length checked.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: Metadata,
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Model`] when it is no whole safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let bytes = file.metadata().map_err(Error::io(path))?.len();
        let mut length = [0; LENGTH_BYTES];
        if bytes < length.len() as u64 {
            return Err(Error::model(path, "not a safetensors file: too short"));
        }
        file.read_exact_at(&mut length, 0).map_err(Error::io(path))?;
        let length = u64::from_le_bytes(length);
        let data_start = LENGTH_BYTES as u64 + length;
        if length > MAX_HEADER_BYTES || data_start > bytes {
            return Err(Error::model(path, "not a safetensors file: header longer than the file"));
        }
        let mut header = vec![0; length as usize];
        file.read_exact_at(&mut header, LENGTH_BYTES as u64).map_err(Error::io(path))?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|err| Error::model(path, format!("not a safetensors file: {err}")))?;
        let expected = data_start + metadata.data_len() as u64;
        if expected != bytes {
            return Err(Error::model(path, format!("{bytes} bytes where its header says {expected}: truncated?")));
        }
        Ok(Self { path: path.to_path_buf(), file, data_start, metadata })
    }

    /// A value of the file's own metadata, such as `format`.
    #[must_use]
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Names of all tensors, in the order of their bytes.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Dimensions of a tensor.
    ///
    /// # Errors
    /// [`Error::Model`] when the file has no tensor of that name.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.info(name)?.shape)
    }

    /// The numbers of a tensor, widened to f32.
    ///
    /// # Errors
    /// [`Error::Model`] when the file has no tensor of that name in f32, bf16 or f16; [`Error::Io`] when it cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file.read_exact_at(&mut bytes, self.data_start + start as u64).map_err(Error::io(&self.path))?;
        match info.dtype {
            Dtype::F32 => Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::BF16 => Ok(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
            Dtype::F16 => Ok(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
            other => Err(Error::model(&self.path, format!("{name} is {other}; this program reads f32, bf16 and f16"))),
        }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| Error::model(&self.path, format!("no tensor {name}")))
    }
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Storage {
    /// 32 bits: what is trained.
    F32,
    /// 16 bits with the range of f32 and 8 bits of precision.
    Bf16,
    /// 16 bits with 11 bits of precision and a largest number of 65504.
    F16,
}

impl Storage {
    /// The name that `config.json` and PyTorch use.
    #[must_use]
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        }
    }
}

/// A tensor on its way into a file; its numbers are fetched when their turn comes.
pub struct Source<'a> {
    /// Dimensions; their product is the count of numbers.
    pub shape: Vec<usize>,
    /// How to store it.
    pub storage: Storage,
    /// The numbers, `[product of shape]`.
    pub values: Box<dyn Fn() -> Cow<'a, [f32]> + 'a>,
}

impl View for Source<'_> {
    fn dtype(&self) -> Dtype {
        self.storage.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.storage.encode(&(self.values)()))
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.storage.dtype().bitsize() / 8
    }
}

/// Writes a safetensors file with one entry of metadata (more would have no fixed order, and so no fixed bytes).
///
/// # Errors
/// [`Error::Io`] when it cannot be written.
pub fn write(path: &Path, note: (&str, String), tensors: Vec<(String, Source<'_>)>) -> Result<()> {
    let notes = HashMap::from([(note.0.to_owned(), note.1)]);
    safetensors::serialize_to_file(tensors, Some(notes), path).map_err(|err| match err {
        SafeTensorError::IoError(source) => Error::Io { path: path.to_path_buf(), source },
        other => Error::model(path, other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(values: &[f32], storage: Storage) -> Source<'_> {
        Source { shape: vec![values.len()], storage, values: Box::new(move || Cow::Borrowed(values)) }
    }

    #[test]
    fn numbers_come_back_as_they_were_stored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let values = [1.0, -0.1, 3e-30, 65_504.0];
        let tensors = [("a", Storage::F32), ("b", Storage::Bf16), ("c", Storage::F16)];
        let tensors = tensors.map(|(name, storage)| (name.to_owned(), source(&values, storage))).into();
        write(&path, ("step", "7".into()), tensors).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.note("step"), Some("7"));
        assert_eq!(file.read_f32("a").unwrap(), values);
        assert_eq!(file.read_f32("b").unwrap()[1], -0.100_097_656);
        assert_eq!(file.read_f32("c").unwrap(), [1.0, -0.099_975_586, 0.0, 65_504.0]);
        assert!(file.read_f32("d").unwrap_err().to_string().ends_with("no tensor d"));
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(&path, ("format", "pt".into()), vec![("a".into(), source(&[1.0; 8], Storage::F32))]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for length in [0, 4, 20, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert_eq!(TensorFile::open(&path).err().map(|err| err.exit_code()), Some(1), "{length} bytes");
        }
    }
}
