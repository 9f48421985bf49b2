//! Checkpoint directories: the id of their weights, the state of the run in them, and how a new one appears complete or not at all.
//!
//! A checkpoint is a Hugging Face model directory with two more files, `optimizer.safetensors` and `state.json`. A directory
//! without `state.json` is a starting model, at step 0.

pub mod export;
pub mod hub;
mod state;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::directory::{self, CONFIG};
use crate::error::{Error, Result};
use crate::model;

pub use crate::directory::WEIGHTS;
pub use state::{State, verify};

/// The optimizer's moments.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The state of the run, a [`State`].
pub const STATE: &str = "state.json";
/// The system prompt that a model was trained with, which `rollout --text` puts before a question.
pub const SYSTEM_PROMPT: &str = "system_prompt.txt";
/// Directory in a checkpoint for weights of earlier steps, from which steps after the checkpoint are sampled.
pub const OLDER: &str = "older";

/// Files that are copied unchanged from a model directory to the checkpoints made of it, where they exist. `config.json` is copied with
/// the dtype of the weights beside it, see [`write_config`].
const COMPANIONS: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    SYSTEM_PROMPT,
    "chat_template.json",
    "LICENSE",
];

/// Hexadecimal digits of a `policy_id`.
const ID_DIGITS: usize = 32;

/// Identifies the weights in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Id of the weights: equal ids mean equal weights.
    pub policy_id: String,
    /// Steps of training since the starting model.
    pub step: u64,
}

/// Identifies the weights in a directory: by `state.json`, or for a starting model by the hash of `model.safetensors`, or of the hashes of
/// its shards in the order of their names; of an adapter its own hash comes before those of its base model.
///
/// # Errors
/// [`Error::Io`] when the weights cannot be read, [`Error::Model`] when there are none or `state.json` is damaged.
pub fn identity(dir: &Path) -> Result<Identity> {
    if let Some(state) = State::load(dir)? {
        return Ok(Identity { policy_id: state.policy_id, step: state.step });
    }
    let hash = |path: &PathBuf| state::checksum(path).map_err(Error::io(path));
    let hashes = directory::weight_files(dir)?.iter().map(hash).collect::<Result<Vec<_>>>()?;
    let mut parts: Vec<&[u8]> = hashes.iter().map(|hash| &hash.as_bytes()[..]).collect();
    let numbers = adapter_numbers(dir)?;
    parts.extend(numbers.as_ref().map(|numbers| numbers.as_bytes()));
    let policy_id = match hashes[..] {
        [one] => short_id(one),
        _ => derive_id(&parts),
    };
    Ok(Identity { policy_id, step: 0 })
}

/// What an adapter's weights depend on besides its tensors and its base; `None` if the directory holds no adapter.
fn adapter_numbers(dir: &Path) -> Result<Option<String>> {
    if directory::base_name(dir)?.is_none() {
        return Ok(None);
    }
    let entries = directory::adapter_entries(dir)?;
    let numbers = ["r", "lora_alpha", "use_rslora"].map(|name| entries.get(name).cloned().unwrap_or_default());
    Ok(Some(serde_json::Value::from(numbers.to_vec()).to_string()))
}

/// Identifies the weights in a single file of any format.
///
/// # Errors
/// [`Error::Io`] when it cannot be read.
pub fn identity_of_file(path: &Path) -> Result<Identity> {
    let hash = state::checksum(path).map_err(Error::io(path))?;
    Ok(Identity { policy_id: short_id(hash), step: 0 })
}

/// An id hashed from several parts. The length of each part is hashed too, so that moving a border between parts changes the id.
#[must_use]
pub fn derive_id(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    short_id(hasher.finalize())
}

fn short_id(hash: blake3::Hash) -> String {
    hash.to_hex()[..ID_DIGITS].to_owned()
}

/// A directory under construction: written as `.NAME.tmp` beside its target, renamed when it is complete, and removed if it never is.
pub struct Publication {
    target: PathBuf,
    staging: PathBuf,
    done: bool,
}

impl Publication {
    /// Starts a directory that will appear as `target`; removes what a killed process left of an earlier attempt.
    ///
    /// # Errors
    /// [`Error::Usage`] when `target` exists, [`Error::Io`] when the directory cannot be created.
    pub fn begin(target: &Path) -> Result<Self> {
        refuse_existing(target)?;
        let name = target.file_name().ok_or_else(|| Error::Usage(format!("{}: not a name", target.display())))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".tmp");
        let staging = parent(target).join(hidden);
        match fs::remove_dir_all(&staging) {
            Err(err) if err.kind() != ErrorKind::NotFound => return Err(Error::io(&staging)(err)),
            _ => {}
        }
        fs::create_dir_all(&staging).map_err(Error::io(&staging))?;
        Ok(Self { target: target.to_path_buf(), staging, done: false })
    }

    /// The directory to write files into.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.staging
    }

    /// Flushes every file to the disk, then renames the directory: after a crash it is complete or absent.
    ///
    /// # Errors
    /// [`Error::Io`] when flushing or renaming fails, [`Error::Usage`] when another process made the target meanwhile.
    pub fn publish(mut self) -> Result<()> {
        sync_all(&self.staging)?;
        refuse_existing(&self.target)?;
        fs::rename(&self.staging, &self.target).map_err(Error::io(&self.target))?;
        self.done = true;
        sync(parent(&self.target))
    }
}

impl Drop for Publication {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.staging); // the error that led here is the one to report
        }
    }
}

/// Refuses a target that exists, before any work is spent on it.
///
/// # Errors
/// [`Error::Usage`] when it exists.
pub fn refuse_existing(target: &Path) -> Result<()> {
    if target.symlink_metadata().is_ok() {
        return Err(Error::Usage(format!("{}: exists already; name a new directory", target.display())));
    }
    Ok(())
}

/// Copies the other files of a model: tokenizer, generation config, and `config.json` with its dtype set.
///
/// # Errors
/// [`Error::Io`] when a file cannot be copied, [`Error::Model`] when `config.json` is not an object.
pub fn copy_companions(from: &Path, to: &Path, torch_dtype: &str) -> Result<()> {
    write_config(from, to, torch_dtype)?;
    copy_tokenizer(from, to)
}

/// Copies what is needed beside a model's config and weights: tokenizer, generation config, system prompt, licence.
///
/// # Errors
/// [`Error::Io`] when a file cannot be copied.
pub(crate) fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    for name in COMPANIONS {
        match fs::read(directory::file_in(from, name)) {
            Ok(bytes) => fs::write(to.join(name), bytes).map_err(Error::io(to.join(name)))?,
            Err(err) if err.kind() == ErrorKind::NotFound => {}
            Err(err) => return Err(Error::io(from.join(name))(err)),
        }
    }
    Ok(())
}

/// Copies `config.json` so that transformers 4.45 to 5 read it alike, whichever wrote it: the rope's entries and the dtype of the weights
/// are written in both spellings. Version 4 looks for `rope_theta` only at the top level, and falls back to 10,000; both load weights in
/// the dtype that the file names, so that a `bfloat16` left beside f32 weights would round them.
pub(crate) fn write_config(from: &Path, to: &Path, torch_dtype: &str) -> Result<()> {
    let path = directory::file_in(from, CONFIG);
    let bytes = fs::read(&path).map_err(Error::io(&path))?;
    let mut config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&bytes).map_err(|err| Error::model(&path, err.to_string()))?;
    model::complete(&mut config).map_err(|what| Error::model(&path, what))?;
    for key in ["torch_dtype", "dtype"] {
        config.insert(key.into(), torch_dtype.into());
    }
    write_json(&to.join(CONFIG), &config)
}

/// Copies the files of a directory to a new one.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io(to))?;
    for path in entries(from)? {
        let name = path.file_name().expect("an entry has a name");
        fs::copy(&path, to.join(name)).map_err(Error::io(&path))?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    fs::write(path, json(value)).map_err(Error::io(path))
}

fn json(value: &impl Serialize) -> Vec<u8> {
    let mut json = serde_json::to_vec_pretty(value).expect("plain data serialises");
    json.push(b'\n');
    json
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The paths in a directory.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    paths.map_err(Error::io(dir))
}

/// Flushes a file, or a directory with everything in it, to the disk.
fn sync_all(path: &Path) -> Result<()> {
    if path.is_dir() {
        entries(path)?.iter().try_for_each(|entry| sync_all(entry))?;
    }
    sync(path)
}

/// Flushes a file, or the names in a directory, to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(dir: &Path) {
        fs::write(dir.join("config.json"), r#"{"model_type":"qwen2","b":1,"torch_dtype":"bfloat16","a":2}"#).unwrap();
        fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        fs::write(dir.join(WEIGHTS), b"weights").unwrap();
    }

    #[test]
    fn a_starting_model_is_named_by_its_weights_and_a_checkpoint_by_its_state() {
        let dir = tempfile::tempdir().unwrap();
        start(dir.path());
        let first = identity(dir.path()).unwrap();
        assert_eq!((first.policy_id.as_str(), first.step), (&blake3::hash(b"weights").to_hex()[..32], 0));
        let state = State {
            step: 7,
            optimizer_steps: 14,
            seed: 1,
            prompts_consumed: 28,
            tokens_consumed: 1000,
            policy_id: "abc".into(),
            parent_policy_id: first.policy_id,
            command_line: vec!["grpo-step".into()],
            package_version: "0.1.0".into(),
            ..State::default()
        };
        state.save(dir.path()).unwrap();
        assert_eq!(State::load(dir.path()).unwrap(), Some(state));
        assert_eq!(identity(dir.path()).unwrap(), Identity { policy_id: "abc".into(), step: 7 });
    }

    #[test]
    fn a_directory_without_weights_says_how_to_make_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), "{}").unwrap();
        let message = identity(dir.path()).unwrap_err().to_string();
        assert!(message.ends_with("no model.safetensors; `grpo-step --init` makes random weights"), "{message}");
    }

    #[test]
    fn a_publication_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("step_000001");
        let abandoned = Publication::begin(&target).unwrap();
        fs::write(abandoned.dir().join("x"), "1").unwrap();
        drop(abandoned);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        fs::create_dir(dir.path().join(".step_000001.tmp")).unwrap();
        fs::write(dir.path().join(".step_000001.tmp/left_by_a_killed_run"), "").unwrap();
        let publication = Publication::begin(&target).unwrap();
        fs::write(publication.dir().join("x"), "2").unwrap();
        assert!(!target.exists());
        publication.publish().unwrap();
        assert_eq!(fs::read_to_string(target.join("x")).unwrap(), "2");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
        assert_eq!(Publication::begin(&target).err().map(|err| err.exit_code()), Some(2));
    }

    #[test]
    fn companions_travel_and_the_config_names_the_dtype_of_its_weights() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        start(from.path());
        copy_companions(from.path(), to.path(), "float32").unwrap();
        let config = fs::read_to_string(to.path().join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let rope = serde_json::json!({"rope_type": "default", "rope_theta": 10_000.0});
        let want = serde_json::json!({"b": 1, "torch_dtype": "float32", "a": 2, "rope_theta": 10_000.0,
            "rope_parameters": rope, "model_type": "qwen2", "dtype": "float32"});
        assert_eq!(config, want);
        assert_eq!(fs::read_to_string(to.path().join("tokenizer.json")).unwrap(), "{}");
        assert!(!to.path().join(WEIGHTS).exists());
    }

    #[test]
    fn moving_a_border_between_parts_changes_the_id() {
        assert_ne!(derive_id(&[b"ab", b"c"]), derive_id(&[b"a", b"bc"]));
        assert_eq!(derive_id(&[b"ab", b"c"]).len(), 32);
    }
}
