//! The state of a run in a checkpoint, and the check that the checkpoint's files are as they were written.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{STATE, derive_id, entries, identity, json, write_json};
use crate::directory;
use crate::error::{Error, Result};
use crate::optim::LossScale;

/// Size of the pieces that are read and hashed (bytes).
const CHUNK: usize = 16 << 20;

/// The state of a run at a checkpoint, `state.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Steps of training since the starting model.
    pub step: u64,
    /// Updates made by the optimizer: `step` times the iterations over each batch, less those that `loss_scale` counts as skipped.
    pub optimizer_steps: u64,
    /// Seed of the run.
    pub seed: u64,
    /// Prompts (groups), or demonstrations, trained on since the starting model.
    pub prompts_consumed: u64,
    /// Tokens of prompts and completions trained on since the starting model.
    pub tokens_consumed: u64,
    /// The loss scale of training with gradients in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Id of the base model, where an adapter is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_policy_id: Option<String>,
    /// Id of these weights.
    pub policy_id: String,
    /// Id of the weights that the step started from.
    pub parent_policy_id: String,
    /// The command that made this directory.
    pub command_line: Vec<String>,
    /// The version of that program.
    pub package_version: String,
    /// BLAKE3 checksum, in hexadecimal, of each other file by its path in the checkpoint; empty in live weights.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

/// The entry of `state.json` with the checksum of all others.
const OWN_CHECKSUM: &str = "checksum";

impl State {
    /// Reads `state.json`; `None` for a starting model.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Model`] when it is damaged.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(STATE);
        let bytes = match fs::read(&path) {
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.map_err(Error::io(&path))?,
        };
        let damaged = |what: &dyn Display| Error::model(&path, format!("damaged: {what}"));
        let mut entries: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|err| damaged(&err))?;
        let written = entries.shift_remove(OWN_CHECKSUM);
        if written.as_ref().and_then(Value::as_str) != Some(&derive_id(&[&json(&entries)])) {
            return Err(damaged(&"not the entries that were written"));
        }
        serde_json::from_value(Value::Object(entries)).map(Some).map_err(|err| damaged(&err))
    }

    /// Writes `state.json`.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let Value::Object(mut entries) = serde_json::to_value(self).expect("plain data serialises") else {
            unreachable!("a struct is an object")
        };
        entries.insert(OWN_CHECKSUM.into(), derive_id(&[&json(&entries)]).into());
        write_json(&dir.join(STATE), &entries)
    }

    /// Refuses a directory whose files are not as they were written.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file that is missing or damaged, [`Error::Io`] when one cannot be read.
    pub fn verify(&self, dir: &Path) -> Result<()> {
        for (name, written) in &self.files {
            let path = dir.join(name);
            match checksum(&path) {
                Ok(found) if found.to_hex().as_str() == written => {}
                Ok(_) => return Err(Error::model(&path, "damaged: not the bytes that were written")),
                Err(err) if err.kind() == ErrorKind::NotFound => return Err(Error::model(&path, "missing")),
                Err(err) => return Err(Error::io(&path)(err)),
            }
        }
        Ok(())
    }

    /// Records the command that makes the checkpoint, and its version.
    pub fn sign(&mut self, command_line: Vec<String>) {
        self.command_line = command_line;
        self.package_version = env!("CARGO_PKG_VERSION").into();
    }

    /// Writes `state.json` with the checksums of all other files of the checkpoint, also of those in its directories.
    ///
    /// # Errors
    /// [`Error::Io`] when one cannot be read, or it cannot be written.
    pub fn seal(&self, dir: &Path) -> Result<()> {
        let mut sealed = self.clone();
        sealed.files.clear();
        let mut paths = entries(dir)?;
        while let Some(path) = paths.pop() {
            if path.is_dir() {
                paths.extend(entries(&path)?);
                continue;
            }
            let name = path.strip_prefix(dir).expect("it is in there").to_string_lossy().into_owned();
            if name != STATE {
                sealed.files.insert(name, checksum(&path).map_err(Error::io(&path))?.to_hex().to_string());
            }
        }
        sealed.save(dir)
    }
}

/// Refuses a checkpoint whose files are not as they were written, or an adapter whose base model has changed. A starting model has no
/// checksums to compare.
///
/// # Errors
/// As [`State::load`] and [`State::verify`].
pub fn verify(dir: &Path) -> Result<()> {
    let Some(state) = State::load(dir)? else { return Ok(()) };
    state.verify(dir)?;
    let Some((base, wanted)) = directory::base_of(dir)?.zip(state.base_policy_id) else { return Ok(()) };
    if identity(&base)?.policy_id == wanted {
        return Ok(());
    }
    Err(Error::model(dir, format!("its base model {} is not the one that it was trained on", base.display())))
}

/// Hashes a file on all cores.
pub(super) fn checksum(path: &Path) -> std::io::Result<blake3::Hash> {
    let (mut file, mut hasher) = (File::open(path)?, blake3::Hasher::new());
    let mut chunk = vec![0; CHUNK.min(file.metadata()?.len() as usize + 1)];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hasher.finalize()),
            read => hasher.update_rayon(&chunk[..read]),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{OLDER, WEIGHTS};

    #[test]
    fn what_is_not_as_it_was_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let older = format!("{OLDER}/step_000006/{STATE}");
        fs::create_dir_all(dir.path().join(&older).parent().unwrap()).unwrap();
        for name in ["config.json", "tokenizer.json", WEIGHTS, &older] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        State { step: 7, ..State::default() }.seal(dir.path()).unwrap();
        verify(dir.path()).unwrap();
        let said = || verify(dir.path()).unwrap_err().to_string();
        for name in ["config.json", "tokenizer.json", WEIGHTS, &older, STATE] {
            let path = dir.path().join(name);
            let whole = fs::read(&path).unwrap();
            for bit in [0, whole.len() * 4, whole.len() * 8 - 1] {
                let mut flipped = whole.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                fs::write(&path, flipped).unwrap();
                assert!(said().starts_with(&format!("{}: damaged: ", path.display())), "{name} {bit}: {}", said());
            }
            fs::write(&path, &whole[..whole.len() - 1]).unwrap();
            let harmless = name == STATE; // its last byte is the end of a line
            assert!(harmless || said().starts_with(&format!("{}: damaged: ", path.display())), "{name}");
            if !harmless {
                fs::remove_file(&path).unwrap();
                assert_eq!(said(), format!("{}: missing", path.display()));
            }
            fs::write(&path, whole).unwrap();
        }
        verify(dir.path()).unwrap();
    }
}
