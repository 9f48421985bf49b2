//! A file of records that grows (`--jsonl`): groups are appended as they are complete, and what it has is not sampled again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

use super::{IsDone, Origin};
use crate::engine::Request;
use crate::error::{Error, Result};
use crate::lines::record::{Line, Record};

/// A growing file, locked for this process.
#[derive(Debug)]
pub struct GrownFile {
    file: File,
    name: String,
    /// The prompts of its groups, by name, with a hash of their tokens.
    done: HashMap<String, blake3::Hash>,
    /// What its records say of where they come from; one, unless other files were joined to it.
    origins: Vec<RecordedOrigin>,
}

#[derive(Debug, PartialEq)]
struct RecordedOrigin {
    policy_id: String,
    seed: u64,
    temperature: f32,
    group_size: usize,
}

impl GrownFile {
    /// Opens a file, or creates it. Drops what was being written when its last writer was killed: a line without end, or the beginning
    /// of a group.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened; [`Error::Usage`] when another process writes it, or its name is that of a compressed file;
    /// [`Error::Record`] for a line that is no rollout, or a group that is not complete; the file then stays as it is.
    pub fn open(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|ending| ending == "zst" || ending == "gz") {
            return Err(Error::Usage("--jsonl: a file that grows is not compressed".into()));
        }
        let options = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = options.map_err(Error::io(path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Usage(format!("--jsonl {}: another process is writing it", path.display())));
            }
            Err(TryLockError::Error(err)) => return Err(Error::io(path)(err)),
        }
        let mut grown = Self { file, name: path.display().to_string(), done: HashMap::new(), origins: Vec::new() };
        let whole = grown.read()?;
        grown.file.set_len(whole).map_err(Error::io(path))?;
        grown.file.seek(SeekFrom::End(0)).map_err(Error::io(path))?;
        Ok(grown)
    }

    /// Reads all records; returns where the last whole group ends (bytes).
    fn read(&mut self) -> Result<u64> {
        let mut reader = BufReader::new(self.file.try_clone().map_err(Error::io(&self.name))?);
        let (mut at, mut whole, mut in_group) = (0, 0, 0);
        let mut group = String::new();
        for number in 1.. {
            let mut bytes = Vec::new();
            let read = reader.read_until(b'\n', &mut bytes).map_err(Error::io(&self.name))?;
            if read == 0 {
                break;
            }
            at += read as u64;
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            let line = Line { path: self.name.as_str().into(), number, text };
            if !bytes.ends_with(b"\n") {
                refuse_others(&line)?;
                break;
            }
            let record = line.record()?;
            let (group_id, group_size): (String, usize) = (record.get("group_id")?, record.get("group_size")?);
            if in_group > 0 && group_id != group {
                return Err(line.error(format!("group {group} before it is not complete; take its records out")));
            }
            (group, in_group) = (group_id, in_group + 1);
            if in_group == group_size {
                self.add(&record, group_size)?;
                (whole, in_group) = (at, 0);
            }
        }
        Ok(whole)
    }

    fn add(&mut self, record: &Record<'_>, group_size: usize) -> Result<()> {
        let tokens: Vec<u32> = record.get("prompt_token_ids")?;
        self.done.insert(record.get("prompt_id")?, hash(&tokens));
        let (policy_id, seed, temperature) =
            (record.get("policy_id")?, record.get("seed")?, record.get("temperature")?);
        let origin = RecordedOrigin { policy_id, seed, temperature, group_size };
        if !self.origins.contains(&origin) {
            self.origins.push(origin);
        }
        Ok(())
    }

    /// Refuses to add what comes from somewhere else.
    ///
    /// # Errors
    /// [`Error::Usage`] naming what differs.
    pub fn check(&self, origin: &Origin, group_size: usize) -> Result<()> {
        let (seed, temperature) = (origin.seed, origin.temperature);
        let now = RecordedOrigin { policy_id: origin.identity.policy_id.clone(), seed, temperature, group_size };
        let Some(recorded) = self.origins.iter().find(|recorded| **recorded != now) else { return Ok(()) };
        let differs = match recorded {
            _ if recorded.policy_id != now.policy_id => "from other weights".to_owned(),
            _ if recorded.group_size != group_size => format!("with -n {}", recorded.group_size),
            _ if recorded.seed != seed => format!("with --seed {}", recorded.seed),
            _ => format!("with --temperature {}", recorded.temperature),
        };
        Err(Error::Usage(format!("--jsonl {}: its records were sampled {differs}; take another file", self.name)))
    }

    /// The file, to append to, and the test whether a request is done.
    ///
    /// # Errors
    /// Of the test: [`Error::Record`] when the file has another prompt of that name.
    pub fn into_parts(self) -> (File, IsDone) {
        let Self { file, done, name, .. } = self;
        let is_done = move |request: &Request<Line>| match done.get(&request.prompt_id) {
            None => Ok(false),
            Some(tokens) if *tokens == hash(&request.tokens) => Ok(true),
            Some(_) => {
                let what = format!("{name} has completions of another prompt {}", request.prompt_id);
                Err(request.payload.error(what))
            }
        };
        (file, Box::new(is_done))
    }

    /// How many prompts it has.
    #[must_use]
    pub fn prompts(&self) -> usize {
        self.done.len()
    }
}

/// Of a last line without an end: one that broke off begins like a record, and one that did not is a rollout. Anything else is a file of
/// another kind, which stays as it is.
fn refuse_others(line: &Line) -> Result<()> {
    if !line.text.starts_with('{') {
        return Err(line.error("not a file of rollouts; take another file"));
    }
    match serde_json::from_str::<serde::de::IgnoredAny>(&line.text) {
        Ok(_) => line.record()?.get::<String>("group_id").map(drop),
        Err(_) => Ok(()),
    }
}

fn hash(tokens: &[u32]) -> blake3::Hash {
    blake3::hash(bytemuck::cast_slice(tokens))
}
