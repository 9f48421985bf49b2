//! Recognises what a model directory contains: its weights, or something else, which it names together with a remedy.

pub mod hub_cache;

use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The name of the file.
pub const CONFIG: &str = "config.json";
/// The weights in a single file.
pub const WEIGHTS: &str = "model.safetensors";
/// The index that says which of several files has which tensor.
pub const INDEX: &str = "model.safetensors.index.json";
/// The file that PEFT writes beside an adapter.
pub const ADAPTER: &str = "adapter_config.json";
/// The adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Whether a directory has weights that this program reads.
#[must_use]
pub fn has_weights(dir: &Path) -> bool {
    [WEIGHTS, INDEX, ADAPTER].iter().any(|name| dir.join(name).exists())
}

/// The directory of the model that `dir` holds an adapter of: one beside it, a path, or a snapshot of the Hub's repository in the cache.
/// `None` if it holds no adapter.
///
/// # Errors
/// [`Error::Model`] when the base is not there, or is an adapter itself; [`Error::Io`].
pub fn base_of(dir: &Path) -> Result<Option<PathBuf>> {
    let Some(name) = base_name(dir)? else { return Ok(None) };
    let places = [Some(dir.join(&name)), Some(PathBuf::from(&name)), hub_cache::snapshot(&name)];
    let path = dir.join(ADAPTER);
    let Some(base) = places.into_iter().flatten().find(|place| place.is_dir()) else {
        let what =
            format!("its base model {name} is neither a directory nor in the Hub's cache, {}", hub_cache::shown());
        return Err(Error::model(path, what));
    };
    match base.join(ADAPTER).exists() {
        true => Err(Error::model(path, format!("its base model {} is an adapter, too", base.display()))),
        false => base.canonicalize().map(Some).map_err(Error::io(base)),
    }
}

/// What the adapter in `dir` calls its base model; `None` if it holds no adapter.
///
/// # Errors
/// [`Error::Model`] when it names none, [`Error::Io`].
pub fn base_name(dir: &Path) -> Result<Option<String>> {
    let path = dir.join(ADAPTER);
    if !path.exists() {
        return Ok(None);
    }
    let name = adapter_entries(dir)?.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
    let name = name.filter(|name| !name.is_empty());
    name.map(Some).ok_or_else(|| Error::model(path, "no base_model_name_or_path: which model is it an adapter of?"))
}

/// The entries of an adapter's config.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Model`] when it is damaged.
pub fn adapter_entries(dir: &Path) -> Result<Map<String, Value>> {
    let path = dir.join(ADAPTER);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    serde_json::from_str(&text).map_err(|err| Error::model(&path, err.to_string()))
}

/// The path of a file of a model; an adapter that lacks it has that of its base.
#[must_use]
pub fn file_in(dir: &Path, name: &str) -> PathBuf {
    let own = dir.join(name);
    let of_base = || base_of(dir).ok().flatten().map(|base| base.join(name)).filter(|path| path.exists());
    if own.exists() { own } else { of_base().unwrap_or(own) }
}

/// The `model_type` in the config of a directory; empty if there is none.
#[must_use]
pub fn model_type(dir: &Path) -> String {
    let text = std::fs::read_to_string(file_in(dir, CONFIG)).unwrap_or_default();
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    config["model_type"].as_str().unwrap_or_default().to_owned()
}

/// Refuses a path that is not a model directory, or is one of an unsupported kind.
///
/// # Errors
/// [`Error::Model`] with the kind and what to do, [`Error::Io`] when the directory cannot be read.
pub fn check(dir: &Path) -> Result<()> {
    if dir.is_file() {
        return Err(Error::model(dir, not_a_directory(dir)));
    }
    if !dir.exists() {
        return Err(Error::model(dir, "no such directory"));
    }
    let entries = std::fs::read_dir(dir).map_err(Error::io(dir))?.flatten();
    let names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    if let Some(kind) = unsupported(&names, &dir.join(ADAPTER)) {
        return Err(Error::model(dir, kind));
    }
    if names.iter().any(|name| name == CONFIG) {
        return Ok(());
    }
    if base_of(dir)?.is_some() {
        return Ok(());
    }
    let inside = model_within(dir).map(|path| format!("; {} has one", path.display()));
    Err(Error::model(dir, format!("no {CONFIG}, so it is no model directory{}", inside.unwrap_or_default())))
}

/// The files of the weights; those of an adapter come before those of its base.
///
/// # Errors
/// As [`check`]; [`Error::Model`] when there are no weights, or the index is damaged.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (dir.join(WEIGHTS), dir.join(INDEX));
    if let Some(base) = base_of(dir)? {
        check(dir)?;
        return Ok([vec![dir.join(ADAPTER_WEIGHTS)], weight_files(&base)?].concat());
    }
    if single.exists() {
        return Ok(vec![single]);
    }
    if !index.exists() {
        check(dir)?;
        return Err(Error::model(dir, format!("no {WEIGHTS}; `grpo-step --init` makes random weights")));
    }
    let text = std::fs::read_to_string(&index).map_err(Error::io(&index))?;
    let json: Value = serde_json::from_str(&text).map_err(|err| Error::model(&index, err.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| Error::model(&index, "no weight_map"))?;
    let mut names: Vec<&str> = map.values().filter_map(|name| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let inside = |name: &str| matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    if let Some(name) = names.iter().find(|name| !inside(name)) {
        return Err(Error::model(&index, format!("weight file {name:?} is outside the directory")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Says what files with these names are, if they are not a supported model, and what to do about it. `adapter` is the path of an
/// adapter's config, which need not exist.
#[must_use]
pub fn unsupported(names: &[String], adapter: &Path) -> Option<String> {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    if has(ADAPTER) || names.iter().any(|name| name.starts_with("adapter_model.")) {
        let missing = [ADAPTER, ADAPTER_WEIGHTS].into_iter().find(|name| !has(name));
        return missing.map(|missing| of_adapter(adapter, missing));
    }
    if has(WEIGHTS) || has(INDEX) {
        return None;
    }
    let convert = "in Python, AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) writes model.safetensors";
    let found = |kind: fn(&str) -> bool| names.iter().find(|name| kind(name));
    if let Some(name) = found(is_pickle) {
        return Some(format!("the weights are a pickle, {name}, which is not read: {convert}"));
    }
    if let Some(name) = found(is_gguf) {
        let how = "`rollout` samples from it with --file, and training needs the safetensors from which it was made";
        return Some(format!("{name} is GGUF: {how}"));
    }
    if let Some(name) = found(is_of_another_library) {
        return Some(format!("the weights are {name}, which is not read: use the model's {WEIGHTS}"));
    }
    let shard = |name: &str| name.ends_with(".safetensors") && name != "optimizer.safetensors";
    let name = found(shard)?;
    let lacks = if name.contains("-of-") { INDEX } else { WEIGHTS };
    Some(format!("it has {name}, but no {lacks}: is the download or the copy whole?"))
}

fn is_pickle(name: &str) -> bool {
    let weights = ["pytorch_model", "consolidated", "model"].iter().any(|stem| name.starts_with(stem));
    weights && [".bin", ".pt", ".pth", ".bin.index.json"].iter().any(|end| name.ends_with(end))
}

/// Whether this is the name of a GGUF file.
#[must_use]
pub fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

fn is_of_another_library(name: &str) -> bool {
    [".h5", ".msgpack", ".onnx", ".ckpt", ".ckpt.index", ".npz", ".tflite", ".ot"].iter().any(|end| name.ends_with(end))
}

/// The message for a file given in place of a model's directory.
#[must_use]
pub fn not_a_directory(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if is_gguf(&name) {
        return "a GGUF file, which only `rollout` reads: give the directory of the model's safetensors, from which it was made"
            .into();
    }
    format!("a file; a model is a directory with {CONFIG}, {WEIGHTS} and tokenizer.json")
}

fn of_adapter(config: &Path, missing: &str) -> String {
    let text = std::fs::read_to_string(config).unwrap_or_default();
    let json: Value = serde_json::from_str(&text).unwrap_or_default();
    let kind = json["peft_type"].as_str().unwrap_or("LORA");
    let base = json["base_model_name_or_path"].as_str().filter(|name| !name.is_empty());
    let kind = if kind.eq_ignore_ascii_case("lora") { "LoRA" } else { kind };
    let of = base.map(|base| format!(" of {base}")).unwrap_or_default();
    format!(
        "a {kind} adapter{of} without {missing}: merge it in Python, AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)"
    )
}

/// The model directory inside `dir`, one level down or below `snapshots`, as in the Hub's cache.
fn model_within(dir: &Path) -> Option<PathBuf> {
    let below = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
        paths.sort();
        paths
    };
    let near = below(dir).into_iter().chain(below(&dir.join("snapshots")));
    near.into_iter().find(|path| path.join(CONFIG).is_file())
}
