//! Reads and writes safetensors files one tensor at a time, so that neither needs a second copy of all weights in memory.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{MmapMut, MmapOptions};
use rayon::prelude::*;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::numbers::aligned::{AlignedVec, Number};
use crate::numbers::dtype::Dtype;

/// Bytes of the header's length at the start of a file.
const LENGTH_BYTES: usize = 8;

/// Numbers converted at once.
const CHUNK: usize = 1 << 16;

/// Alignment of the data in the file, a cache line (bytes).
const ALIGNMENT: usize = 64;

/// The longest header that is read, the safetensors format's own limit (bytes).
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
    /// [`Error::Io`] when it cannot be read, [`Error::Model`] when it is not a complete safetensors file.
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

    /// A value from the file's metadata, such as `format`.
    #[must_use]
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Names of all tensors, in the order in which they are stored.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// [`Error::Model`] when the file has no tensor of that name.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.info(name)?.shape)
    }

    /// The stored type of a tensor, and the byte of the file at which it starts.
    ///
    /// # Errors
    /// [`Error::Model`] when the file has no tensor of that name.
    pub fn place(&self, name: &str) -> Result<(safetensors::Dtype, u64)> {
        let info = self.info(name)?;
        Ok((info.dtype, self.data_start + info.data_offsets.0 as u64))
    }

    /// Reads a tensor, converting from the stored type: exactly if `T` is wider, else to the nearest number.
    ///
    /// # Errors
    /// [`Error::Model`] when the file has no tensor of that name in f32, bf16 or f16; [`Error::Io`] when it cannot be read.
    pub fn read<T: Number>(&self, name: &str) -> Result<AlignedVec<T>> {
        self.read_part(name, 0..self.shape(name)?.iter().product())
    }

    /// Reads these numbers of a tensor, as [`TensorFile::read`].
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read_part<T: Number>(&self, name: &str, part: Range<usize>) -> Result<AlignedVec<T>> {
        let info = self.info(name)?;
        let unread =
            |stored| Error::model(&self.path, format!("{name} is {stored}; this program reads f32, bf16 and f16"));
        let dtype = Dtype::try_from(info.dtype).map_err(unread)?;
        let convert: fn(&[u8], &mut [T]) = match dtype {
            Dtype::F32 => |from, to| convert(from, to, f32::from_le_bytes),
            Dtype::Bf16 => |from, to| convert(from, to, |bytes| bf16::from_le_bytes(bytes).widen()),
            Dtype::F16 => |from, to| convert(from, to, |bytes| f16::from_le_bytes(bytes).to_f32()),
        };
        let width = dtype.size();
        let start = self.data_start + (info.data_offsets.0 + width * part.start) as u64;
        let mut numbers = AlignedVec::zeros(part.len());
        numbers.par_chunks_mut(CHUNK).enumerate().try_for_each(|(i, chunk)| {
            let mut bytes = vec![0; width * chunk.len()];
            self.file.read_exact_at(&mut bytes, start + (i * width * CHUNK) as u64).map_err(Error::io(&self.path))?;
            convert(&bytes, chunk);
            Ok(())
        })?;
        Ok(numbers)
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| Error::model(&self.path, format!("no tensor {name}")))
    }
}

fn convert<T: Number, const WIDTH: usize>(from: &[u8], to: &mut [T], decode: impl Fn([u8; WIDTH]) -> f32) {
    to.iter_mut().zip(from.as_chunks().0).for_each(|(to, from)| *to = T::of(decode(*from)));
}

/// Rounds `values` to `dtype`; they fill `bytes`.
fn encode_as<T: Number>(dtype: Dtype, values: &[T], bytes: &mut [u8]) {
    match dtype {
        Dtype::F32 => encode(values, bytes, f32::to_le_bytes),
        Dtype::Bf16 => encode(values, bytes, |value| bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => encode(values, bytes, |value| f16::from_f32(value).to_le_bytes()),
    }
}

fn encode<T: Number, const WIDTH: usize>(from: &[T], to: &mut [u8], encode: impl Fn(f32) -> [u8; WIDTH]) {
    from.iter().zip(to.as_chunks_mut().0).for_each(|(from, to)| *to = encode(from.widen()));
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Tensor<'a, T = f32> {
    /// Its name.
    pub name: String,
    /// Dimensions, whose product is the count of `values`.
    pub shape: Vec<usize>,
    /// The numbers.
    pub values: &'a [T],
}

/// Writes a safetensors file with one entry of metadata and the tensors in the given order. The caller renames it into place, after
/// an fsync if it must survive a crash.
///
/// The data starts at a cache line, so that reading a map of the file is fast. The safetensors crate aligns to 8 bytes only, and needs
/// all bytes of a tensor at once.
///
/// # Errors
/// [`Error::Io`] when it cannot be written.
pub fn write<T: Number>(path: &Path, note: (&str, &str), dtype: Dtype, tensors: &[Tensor<'_, T>]) -> Result<()> {
    let (head, _) = head(note, dtype, tensors);
    let write = || {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        out.write_all(&head)?;
        let mut bytes = vec![0; dtype.size() * CHUNK];
        for chunk in tensors.iter().flat_map(|tensor| tensor.values.chunks(CHUNK)) {
            let bytes = &mut bytes[..dtype.size() * chunk.len()];
            encode_as(dtype, chunk, bytes);
            out.write_all(bytes)?;
        }
        out.flush()
    };
    write().map_err(Error::io(path))
}

/// Writes the same bytes as [`write()`] through a memory map and on all threads, into a new file or over one without readers. In a file
/// system in memory whose pages are allocated already, this runs at the memory's speed.
///
/// # Errors
/// As [`write()`].
pub fn write_mapped<T: Number>(path: &Path, note: (&str, &str), dtype: Dtype, tensors: &[Tensor<'_, T>]) -> Result<()> {
    let (head, data) = head(note, dtype, tensors);
    let Some(mut map) = map_whole(path, head.len() + data).map_err(Error::io(path))? else {
        return write(path, note, dtype, tensors);
    };
    let (start, mut rest) = map.split_at_mut(head.len());
    start.copy_from_slice(&head);
    for Tensor { values, .. } in tensors {
        let (bytes, after) = rest.split_at_mut(dtype.size() * values.len());
        let chunks = bytes.par_chunks_mut(dtype.size() * CHUNK).zip(values.par_chunks(CHUNK));
        chunks.for_each(|(bytes, values)| encode_as(dtype, values, bytes));
        rest = after;
    }
    Ok(())
}

/// Maps a file of `bytes` bytes, all allocated: writing to a page for which a full disk has no room would kill the process. `None` if
/// the file system cannot allocate ahead.
#[allow(unsafe_code)]
fn map_whole(path: &Path, bytes: usize) -> io::Result<Option<MmapMut>> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    file.set_len(bytes as u64)?;
    // In a file system in memory a signal interrupts it.
    match retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP) => return Ok(None),
        Err(err) => return Err(err.into()),
    }
    // SAFETY: the file has all its bytes, and only this process writes to it, under a name that no reader knows yet.
    unsafe { MmapOptions::new().populate().map_mut(&file) }.map(Some)
}

/// The bytes before the data, and the size of the data (bytes).
fn head<T>((key, value): (&str, &str), dtype: Dtype, tensors: &[Tensor<'_, T>]) -> (Vec<u8>, usize) {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({ key: value }));
    let mut from = 0;
    for Tensor { name, shape, values } in tensors {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        let to = from + dtype.size() * values.len();
        header.insert(
            name.clone(),
            json!(TensorInfo { dtype: dtype.into(), shape: shape.clone(), data_offsets: (from, to) }),
        );
        from = to;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    let end = (LENGTH_BYTES + header.len()).next_multiple_of(ALIGNMENT);
    header.resize(end - LENGTH_BYTES, b' ');
    ([&(header.len() as u64).to_le_bytes()[..], &header].concat(), from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor<'a>(name: &str, values: &'a [f32]) -> Tensor<'a> {
        Tensor { name: name.into(), shape: vec![values.len()], values }
    }

    #[test]
    fn numbers_come_back_as_they_were_stored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let values = [1.0, -0.1, 3e-30, 65_504.0];
        let stored = |dtype| -> AlignedVec<f32> {
            write(&path, ("step", "7"), dtype, &[tensor("first", &[0.0; 3]), tensor("a", &values)]).unwrap();
            let file = TensorFile::open(&path).unwrap();
            assert_eq!((file.note("step"), file.names()), (Some("7"), vec!["first".to_owned(), "a".to_owned()]));
            assert_eq!(file.data_start % ALIGNMENT as u64, 0);
            assert!(file.read::<f32>("d").unwrap_err().to_string().ends_with("no tensor d"));
            file.read("a").unwrap()
        };
        assert_eq!(*stored(Dtype::F32), values);
        assert_eq!(stored(Dtype::Bf16)[1], -0.100_097_656);
        assert_eq!(*stored(Dtype::F16), [1.0, -0.099_975_586, 0.0, 65_504.0]);
    }

    #[test]
    fn by_way_of_a_map_the_bytes_are_the_same_in_a_new_file_and_over_a_longer_or_a_shorter_one() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, mapped) = (dir.path().join("plain"), dir.path().join("mapped"));
        for (dtype, len) in [(Dtype::F32, CHUNK + 5), (Dtype::F32, 3), (Dtype::Bf16, 2 * CHUNK)] {
            let values: Vec<f32> = (0..len).map(|i| i as f32 * 0.37 - 9.0).collect();
            let tensors = [tensor("a", &values), tensor("b", &values[..2])];
            write(&plain, ("step", "7"), dtype, &tensors).unwrap();
            write_mapped(&mapped, ("step", "7"), dtype, &tensors).unwrap();
            assert_eq!(std::fs::read(&mapped).unwrap(), std::fs::read(&plain).unwrap());
        }
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(&path, ("format", "pt"), Dtype::F32, &[tensor("a", &[1.0; 8])]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for length in [0, 4, 20, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert_eq!(TensorFile::open(&path).err().map(|err| err.exit_code()), Some(1), "{length} bytes");
        }
    }
}
