//! Writes lines to standard output, or to a file that is published when it is complete.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rustix::event::PollFlags;

use super::is_ready;
use crate::error::{Error, Result};

/// Compression level of written files: zstd's default.
const ZSTD_LEVEL: i32 = 3;

/// Writes lines to a compressed file that appears as `path` when it is complete; it is not synced to the disk.
///
/// # Errors
/// [`Error::Io`].
pub fn write_zst<'a>(path: &Path, lines: impl Iterator<Item = &'a str>) -> Result<()> {
    let text: Vec<u8> = lines.flat_map(|line| [line.as_bytes(), b"\n"]).flatten().copied().collect();
    let unfinished = path.with_extension("tmp");
    let write = || {
        std::fs::write(&unfinished, zstd::encode_all(&text[..], ZSTD_LEVEL)?)?;
        std::fs::rename(&unfinished, path)
    };
    write().map_err(|err| {
        let _ = std::fs::remove_file(&unfinished); // it may be what fills the disk
        Error::io(path)(err)
    })
}

/// Whether standard output is a pipe whose other end is closed.
#[must_use]
pub fn stdout_is_closed() -> bool {
    is_ready(io::stdout(), PollFlags::empty(), 0).unwrap_or(false) // poll reports errors without being asked
}

/// Where a command writes: standard output, or a file that appears under its name only when it is complete.
pub struct Output {
    sink: Sink,
}

enum Sink {
    Stdout(BufWriter<io::StdoutLock<'static>>),
    File { target: PathBuf, writer: FileWriter },
    Growing { path: PathBuf, writer: BufWriter<std::fs::File> },
}

enum FileWriter {
    Plain(BufWriter<tempfile::NamedTempFile>),
    Gzip(Box<flate2::write::GzEncoder<BufWriter<tempfile::NamedTempFile>>>),
    Zstd(zstd::Encoder<'static, BufWriter<tempfile::NamedTempFile>>),
}

impl Output {
    /// Opens standard output for `None` and `-`; a device or a named pipe as it is; else a temporary file beside `path`, or beside what it
    /// is a link to, that [`Output::finish`] renames to it. A name that ends in `.zst` or `.gz` is compressed.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be created.
    pub fn create(path: Option<&Path>) -> Result<Self> {
        let sink = match path {
            None => Sink::Stdout(BufWriter::with_capacity(1 << 16, io::stdout().lock())),
            Some(path) if path.as_os_str() == "-" => return Self::create(None),
            Some(path) if is_device(path) => {
                let file = std::fs::File::options().write(true).open(path).map_err(Error::io(path))?;
                return Ok(Self::growing(path, file));
            }
            Some(path) => {
                let target = if path.is_symlink() { path.canonicalize().ok() } else { None };
                let target = target.unwrap_or_else(|| path.to_path_buf());
                Sink::File { writer: FileWriter::create(&target)?, target }
            }
        };
        Ok(Self { sink })
    }

    /// Writes to the end of a file, a device or a pipe, which shows each batch at once.
    #[must_use]
    pub fn growing(path: &Path, file: std::fs::File) -> Self {
        Self { sink: Sink::Growing { path: path.into(), writer: BufWriter::with_capacity(1 << 16, file) } }
    }

    /// Writes one line; `line` holds no line end.
    ///
    /// # Errors
    /// [`Error::Output`] when standard output refuses it, [`Error::Io`] when the file does.
    pub fn write_line(&mut self, line: &[u8]) -> Result<()> {
        self.attempt(|out| out.write_all(line).and_then(|()| out.write_all(b"\n")))
    }

    /// Writes whole lines, each with its line end.
    ///
    /// # Errors
    /// Those of [`Output::write_line`].
    pub fn write_lines(&mut self, lines: &[u8]) -> Result<()> {
        self.attempt(|out| out.write_all(lines))
    }

    /// Flushes standard output or a growing file, so that its reader sees each batch at once. Does nothing for another file: it has no reader before
    /// it is complete, and the bytes of a compressed one would depend on when it was flushed.
    ///
    /// # Errors
    /// Those of [`Output::write_line`].
    pub fn flush(&mut self) -> Result<()> {
        match &mut self.sink {
            Sink::Stdout(writer) => writer.flush().map_err(Error::Output),
            Sink::File { .. } => Ok(()),
            Sink::Growing { path, writer } => writer.flush().map_err(Error::io(&*path)),
        }
    }

    /// Flushes and publishes. A full disk may show only here.
    ///
    /// # Errors
    /// Those of [`Output::write_line`].
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        match self.sink {
            Sink::Stdout(writer) => {
                let _ = writer.into_parts(); // already flushed; dropping must not try, and report, again
                Ok(())
            }
            Sink::File { target, writer } => writer.publish(&target).map_err(Error::io(&target)),
            Sink::Growing { path, writer } => {
                let file = writer.get_ref();
                let is_on_a_disk = file.metadata().is_ok_and(|metadata| metadata.is_file());
                if is_on_a_disk { file.sync_all().map_err(Error::io(&path)) } else { Ok(()) }
            }
        }
    }

    /// Ends the output after an error: whole records reach a pipe, but a file is not published.
    pub(crate) fn flush_after_error(self) -> Result<()> {
        match self.sink {
            Sink::Stdout(mut writer) => {
                let flushed = writer.flush();
                let _ = writer.into_parts();
                match flushed {
                    Err(err) if err.kind() != io::ErrorKind::BrokenPipe => Err(Error::Output(err)),
                    _ => Ok(()),
                }
            }
            Sink::File { .. } => Ok(()),
            Sink::Growing { path, mut writer } => {
                let flushed = writer.flush();
                let _ = writer.into_parts(); // as above
                flushed.map_err(Error::io(&path))
            }
        }
    }

    fn attempt(&mut self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        match &mut self.sink {
            Sink::Stdout(writer) => write(writer).map_err(Error::Output),
            Sink::Growing { path, writer } => write(writer).map_err(Error::io(&*path)),
            Sink::File { target, writer: FileWriter::Plain(writer) } => write(writer).map_err(Error::io(&*target)),
            Sink::File { target, writer: FileWriter::Gzip(writer) } => write(writer).map_err(Error::io(&*target)),
            Sink::File { target, writer: FileWriter::Zstd(writer) } => write(writer).map_err(Error::io(&*target)),
        }
    }
}

/// Whether there is something that is neither a file nor a directory, which a file must not replace.
fn is_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

impl FileWriter {
    fn create(target: &Path) -> Result<Self> {
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let temporary = tempfile::Builder::new().prefix(".").suffix(".tmp").tempfile_in(folder);
        let writer = BufWriter::with_capacity(1 << 16, temporary.map_err(Error::io(target))?);
        match target.extension().and_then(|ext| ext.to_str()) {
            Some("zst") => Ok(Self::Zstd(zstd::Encoder::new(writer, ZSTD_LEVEL).map_err(Error::io(target))?)),
            Some("gz") => {
                Ok(Self::Gzip(Box::new(flate2::write::GzEncoder::new(writer, flate2::Compression::default()))))
            }
            _ => Ok(Self::Plain(writer)),
        }
    }

    fn publish(self, target: &Path) -> io::Result<()> {
        let writer = match self {
            Self::Plain(writer) => writer,
            Self::Gzip(encoder) => encoder.finish()?,
            Self::Zstd(encoder) => encoder.finish()?,
        };
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        make_readable(&file)?;
        file.as_file().sync_all()?;
        file.persist(target)?;
        Ok(())
    }
}

/// Gives a published file the usual mode: temporary files are readable by their owner alone.
#[cfg(unix)]
fn make_readable(file: &tempfile::NamedTempFile) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn make_readable(_: &tempfile::NamedTempFile) -> io::Result<()> {
    Ok(())
}
