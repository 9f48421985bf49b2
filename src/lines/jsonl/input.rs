//! Reads an input as lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use rustix::event::PollFlags;

use super::is_ready;
use crate::error::{Error, Result};
use crate::lines::record::Line;
use crate::process::cancel::Stop;

/// The longest line that is read (bytes). A longer one is an error, instead of exhausting the memory.
pub const MAX_LINE_BYTES: usize = 64 << 20;

/// First bytes of compressed files and of files that are not read.
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const GZIP: &[u8] = &[0x1f, 0x8b];
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
/// First bytes of UTF-16: its mark, or a first character with one byte 0, which tells the byte order.
const UTF_16: [(&[u8], &str); 4] = [(&[0xff, 0xfe], ""), (&[0xfe, 0xff], ""), (b"{\0", "LE"), (b"\0{", "BE")];
/// Archives, with the program that unpacks them.
const PACKED: [(&[u8], &str); 3] = [(b"\xfd7zXZ", "xz -dc"), (b"BZh", "bzip2 -dc"), (b"PK\x03\x04", "unzip -p")];

/// An input as numbered lines.
pub struct Input {
    name: Arc<str>,
    reader: BufReader<Box<dyn Read + Send>>,
    line: usize,
    stop: Stop,
}

impl Input {
    /// Opens a file, or standard input for `-`. Decompresses zstd and gzip, whatever the name.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_until(path, &Stop::default())
    }

    /// Like [`Input::open`], but reading returns the error of `stop` when that is requested, even while it waits for input.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened.
    pub fn open_until(path: &Path, stop: &Stop) -> Result<Self> {
        let name = path.display().to_string().into();
        let bytes: Box<dyn Read + Send> = if path.as_os_str() == "-" {
            Box::new(Stdin { stop: stop.clone() })
        } else {
            Box::new(File::open(path).map_err(Error::io(path))?)
        };
        let reader = BufReader::with_capacity(1 << 16, bytes);
        Ok(Self { name, reader, line: 0, stop: stop.clone() })
    }

    /// The name as given; `-` is standard input.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Skips the lines that a run has consumed already.
    ///
    /// # Errors
    /// Those of reading; [`Error::Data`] when there are fewer lines.
    pub fn skip_consumed(&mut self, lines: u64) -> Result<()> {
        for passed in 0..lines {
            if self.read_line()?.is_none() {
                return Err(Error::Data(format!(
                    "{}: {passed} prompts, but the policy was trained on {lines} of them already",
                    self.name
                )));
            }
        }
        Ok(())
    }

    /// Whether the buffer holds a whole line that is not blank, so that the next read does not wait for more input.
    #[must_use]
    pub fn has_line_ready(&self) -> bool {
        self.reader.buffer().trim_ascii_start().contains(&b'\n')
    }

    /// Whether reading from it would not wait: standard input has something to read or has ended, a file always.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        &*self.name != "-" || is_ready(io::stdin(), PollFlags::IN, 0).unwrap_or(true)
    }

    /// Detects compression, and refuses other formats, by the first bytes.
    fn begin(&mut self) -> Result<()> {
        let start = self.reader.fill_buf().map_err(Error::io(&*self.name))?.to_vec();
        let name = &self.name;
        let refuse = |what: String| Err(Error::Data(format!("{name}: {what}")));
        if start.starts_with(ZSTD) || start.starts_with(GZIP) {
            let empty: Box<dyn Read + Send> = Box::new(io::empty());
            let compressed = std::mem::replace(&mut self.reader, BufReader::new(empty));
            let plain: Box<dyn Read + Send> = if start.starts_with(ZSTD) {
                Box::new(zstd::Decoder::with_buffer(compressed).map_err(Error::io(&*self.name))?)
            } else {
                Box::new(flate2::bufread::MultiGzDecoder::new(compressed))
            };
            self.reader = BufReader::with_capacity(1 << 16, plain);
        } else if start.starts_with(b"PAR1") {
            return refuse(format!(
                "a parquet file; `gsm8k-prep {name}` makes prompts of it, `duckdb -c \"COPY (FROM '{name}') TO 'out.jsonl'\"` JSONL"
            ));
        } else if let Some((_, order)) = UTF_16.iter().find(|(mark, _)| start.starts_with(mark)) {
            return refuse(format!("UTF-16, not UTF-8; convert it: iconv -f UTF-16{order} -t UTF-8 {name}"));
        } else if let Some((_, program)) = PACKED.iter().find(|(magic, _)| start.starts_with(magic)) {
            return refuse(format!("compressed in a format that is not read; unpack it: {program} {name}"));
        }
        if self.reader.fill_buf().map_err(Error::io(&*self.name))?.starts_with(BYTE_ORDER_MARK) {
            self.reader.consume(BYTE_ORDER_MARK.len());
        }
        Ok(())
    }

    /// The next line that is not blank, without its end; `None` at the end of the input.
    fn read_line(&mut self) -> Result<Option<Line>> {
        if self.line == 0 {
            let begun = self.begin();
            self.stop.check()?; // rather than the read error that a stop causes
            begun?;
        }
        loop {
            self.stop.check()?;
            let mut bytes = Vec::new();
            let limit = MAX_LINE_BYTES as u64 + 1;
            let read = self.reader.by_ref().take(limit).read_until(b'\n', &mut bytes);
            self.stop.check()?; // as above
            let read = read.map_err(Error::io(&*self.name))?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            if read > MAX_LINE_BYTES {
                return Err(self.error(&format!("line longer than {} MiB", MAX_LINE_BYTES >> 20)));
            }
            while bytes.last().is_some_and(|end| matches!(end, b'\n' | b'\r')) {
                bytes.pop();
            }
            let text = String::from_utf8(bytes).map_err(|_| self.error("not UTF-8"))?;
            if !text.trim().is_empty() {
                return Ok(Some(Line { path: self.name.clone(), number: self.line, text }));
            }
        }
    }

    fn error(&self, what: &str) -> Error {
        Error::Record { path: self.name.to_string(), line: self.line, what: what.into() }
    }
}

impl Iterator for Input {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Result<Line>> {
        self.read_line().transpose()
    }
}

/// Standard input, polled before it is read: a blocked read would not notice a requested stop.
struct Stdin {
    stop: Stop,
}

impl Read for Stdin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut stdin = io::stdin().lock();
        while !is_ready(&stdin, PollFlags::IN, STDIN_POLL)? {
            if self.stop.is_requested() {
                return Err(io::Error::other("stopped while waiting"));
            }
        }
        stdin.read(buffer)
    }
}

/// Interval at which a stop is checked while no input comes (ns).
const STDIN_POLL: i64 = 50_000_000;
