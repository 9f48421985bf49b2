//! Writes a run's metrics as events for TensorBoard, beside `metrics.jsonl` and from its lines.
//!
//! A file of events is a sequence of records (length, its checksum, bytes, their checksum), each a protocol buffer `Event` of TensorFlow.
//! Few of its fields are needed: the time, the step, and values by tag. The times are those of a clock, so the bytes of two runs differ.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::grpo::metrics::{self, Read};
use crate::lines::jsonl::Input;
use crate::run::Run;

/// The prefix that transformers gives the tags of training, so that a run of TRL and one of ours share their charts.
const PREFIX: &str = "train/";

/// What a file of events begins with.
const VERSION: &str = "brain.Event:2";

/// The longest event that is read (bytes). A longer one is damage.
const MAX_EVENT: u64 = 1 << 24;

/// Fields of the protocol buffers, each with its wire type.
const EVENT_TIME: u8 = 1 << 3 | 1;
const EVENT_STEP: u8 = 2 << 3;
const EVENT_VERSION: u8 = 3 << 3 | 2;
const EVENT_SUMMARY: u8 = 5 << 3 | 2;
const SUMMARY_VALUE: u8 = 1 << 3 | 2;
const VALUE_TAG: u8 = 1 << 3 | 2;
const VALUE_SIMPLE: u8 = 2 << 3 | 5;

/// The file of a run's events.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Opens the events of a run and makes them agree with its metrics: events that the metrics do not have are removed, and those that
    /// they have and the file lacks are added. So no step is there twice after a run was resumed, forked, or killed between the two.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Record`] when the metrics are damaged.
    pub fn open(run: &Run) -> Result<Self> {
        let path = run.events();
        let dir = path.parent().expect("it is in a directory of its own");
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut events = Self { file: opened.map_err(Error::io(&path))?, path };
        let known = known(&events.path)?;
        let mut kept = known.iter();
        let mut end = match kept.next() {
            Some(version) if version.step.is_none() => Some(version.end),
            _ => None,
        };
        let mut is_cut = false;
        if end.is_none() {
            events.cut(0)?;
            events.write(&version())?;
            is_cut = true;
        }
        let metrics = run.metrics();
        for line in if metrics.exists() { Some(Input::open(&metrics)?) } else { None }.into_iter().flatten() {
            let line = line?;
            let event = event(&line.text).map_err(|err| line.error(err.to_string()))?;
            match kept.next().filter(|_| !is_cut) {
                Some(known) if known.step == Some(event.step) => end = Some(known.end),
                _ => {
                    if !is_cut {
                        events.cut(end.unwrap_or(0))?;
                        is_cut = true;
                    }
                    events.write(&event.bytes)?;
                }
            }
        }
        if !is_cut {
            events.cut(end.unwrap_or(0))?;
        }
        Ok(events)
    }

    /// Adds a line of metrics.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, line: &[u8]) -> Result<()> {
        let text = std::str::from_utf8(line).expect("metrics are text");
        self.write(&event(text).expect("metrics are JSON").bytes)
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&framed(event)).map_err(Error::io(&self.path))
    }

    fn cut(&mut self, end: u64) -> Result<()> {
        let cut = self.file.set_len(end).and_then(|()| self.file.seek(SeekFrom::Start(end)));
        cut.map(drop).map_err(Error::io(&self.path))
    }
}

/// An event that is in the file.
struct Known {
    /// `None` for the one with the version.
    step: Option<u64>,
    /// Where it ends (bytes).
    end: u64,
}

/// The events of a file up to the first that is damaged or breaks off.
fn known(path: &Path) -> Result<Vec<Known>> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let (mut events, mut end) = (Vec::new(), 0);
    loop {
        match next_event(&mut file) {
            Ok(Some(event)) => {
                end += 16 + event.len() as u64;
                events.push(Known { step: step_of(&event), end });
            }
            Ok(None) => return Ok(events),
            Err(err) if err.kind() == ErrorKind::UnexpectedEof => return Ok(events),
            Err(err) => return Err(Error::io(path)(err)),
        }
    }
}

/// The next event; `None` if its checksums are wrong.
fn next_event(file: &mut impl std::io::Read) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = [0; 12];
    file.read_exact(&mut head)?;
    let length = u64::from_le_bytes(head[..8].try_into().expect("eight bytes"));
    if head[8..] != checksum(&head[..8]) || length > MAX_EVENT {
        return Ok(None);
    }
    let mut bytes = vec![0; length as usize + 4];
    file.read_exact(&mut bytes)?;
    let found = bytes.split_off(length as usize);
    Ok((found == checksum(&bytes)).then_some(bytes))
}

/// The step of an event that this program wrote.
fn step_of(event: &[u8]) -> Option<u64> {
    if event.first() != Some(&EVENT_TIME) || event.get(9) != Some(&EVENT_STEP) {
        return None;
    }
    let mut step = 0;
    for (at, byte) in event[10..].iter().take(10).enumerate() {
        step |= u64::from(byte & 0x7f).checked_shl(7 * at as u32)?;
        if byte & 0x80 == 0 {
            return Some(step);
        }
    }
    None
}

/// A line of metrics as an event.
struct Event {
    step: u64,
    bytes: Vec<u8>,
}

fn event(line: &str) -> serde_json::Result<Event> {
    let (mut step, mut summary) = (0, Vec::new());
    metrics::read(line, &mut |name, value| match value {
        Read::Number(number) if name == "step" => step = number as u64,
        Read::Number(number) => {
            let mut value = Vec::new();
            field(&mut value, VALUE_TAG, format!("{PREFIX}{name}").as_bytes());
            value.push(VALUE_SIMPLE);
            value.extend((number as f32).to_le_bytes());
            field(&mut summary, SUMMARY_VALUE, &value);
        }
        Read::Word(_) => {}
    })?;
    let mut bytes = time();
    bytes.push(EVENT_STEP);
    varint(&mut bytes, step);
    field(&mut bytes, EVENT_SUMMARY, &summary);
    Ok(Event { step, bytes })
}

fn version() -> Vec<u8> {
    let mut bytes = time();
    field(&mut bytes, EVENT_VERSION, VERSION.as_bytes());
    bytes
}

/// The time now (seconds since 1970), with which each event begins.
fn time() -> Vec<u8> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    [&[EVENT_TIME][..], &seconds.to_le_bytes()].concat()
}

/// Appends a field of bytes.
fn field(to: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    to.push(tag);
    varint(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

fn varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

/// An event as a record of the file.
fn framed(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length), event, &checksum(event)].concat()
}

/// The masked CRC-32C of TFRecord files.
///
/// # Source
/// <https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> String {
        format!("{{\"step\":{step},\"policy_step\":{step},\"reward\":0.{step},\"health\":\"no_signal\"}}\n")
    }

    fn steps(run: &Run) -> Vec<u64> {
        let known = known(&run.events()).unwrap();
        assert_eq!(known.last().unwrap().end, fs::metadata(run.events()).unwrap().len(), "nothing behind the last");
        known.iter().filter_map(|event| event.step).collect()
    }

    /// python3: from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c; hex(masked_crc32c(b"abc"))
    #[test]
    fn checksums_are_those_of_tensorflow() {
        assert_eq!(u32::from_le_bytes(checksum(b"abc")), 0x21f1_576e);
    }

    #[test]
    fn a_resumed_run_has_each_step_once_and_keeps_the_times_of_the_old_ones() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let mut events = EventFile::open(&run).unwrap();
        for step in 1..=4 {
            events.add(line(step).as_bytes()).unwrap();
        }
        assert_eq!(steps(&run), [1, 2, 3, 4]);
        let before = fs::read(run.events()).unwrap();

        // Killed after step 4, resumed from step 2, whose metrics were cut already; and the other way round.
        fs::write(run.metrics(), line(1) + &line(2)).unwrap();
        EventFile::open(&run).unwrap().add(line(3).as_bytes()).unwrap();
        assert_eq!(steps(&run), [1, 2, 3]);
        let kept = known(&run.events()).unwrap()[2].end as usize;
        assert_eq!(before[..kept], fs::read(run.events()).unwrap()[..kept]);
        fs::write(run.metrics(), (1..=6).map(line).collect::<String>()).unwrap();
        drop(EventFile::open(&run).unwrap());
        assert_eq!(steps(&run), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn what_is_torn_or_foreign_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        fs::write(run.metrics(), (1..=300).map(line).collect::<String>()).unwrap();
        drop(EventFile::open(&run).unwrap());
        let whole = fs::read(run.events()).unwrap();
        for (damaged, what) in [
            (whole[..whole.len() - 5].to_vec(), "torn"),
            ([&whole[..100], &[1], &whole[101..]].concat(), "damaged"),
            (b"something else".to_vec(), "foreign"),
            (Vec::new(), "empty"),
        ] {
            fs::write(run.events(), damaged).unwrap();
            drop(EventFile::open(&run).unwrap());
            assert_eq!(steps(&run), (1..=300).collect::<Vec<_>>(), "{what}");
        }
    }
}
