//! Files of models and data sets on the Hugging Face Hub, in the cache that Python's `huggingface_hub` shares.
//!
//! The environment variables `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and their like mean what they mean to Python.
//! `refs/main` is written when a snapshot is complete, so that it can be used offline.
//!
//! The client is our own because the names of commits, objects and files come from whoever answers, and become paths in the cache:
//! here each is checked first.

mod api;
mod cache;
mod choose;
mod lfs;
pub mod push;
mod upload;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use crate::directory::hub_cache::{self, is_plain, setting};
use crate::directory::{self, is_gguf};
use crate::error::{Error, Result};
use crate::process::message::one_line;
use api::{Api, Fault, Object};
use cache::{cached, length, put, write_ref};
use choose::model_files;

pub use api::RepoKind;

/// A model: the file `file` of `spec`, a GGUF file, or the directory of a model of the engine's or of one of the types `others`; see
/// [`model_dir`].
///
/// # Errors
/// Those of [`model_dir`].
pub fn model(spec: &str, file: Option<&str>, others: &[&str]) -> Result<PathBuf> {
    let path = Path::new(spec);
    let Some(file) = file else {
        return if is_gguf(spec) && path.is_file() { Ok(spec.into()) } else { directory(spec, others) };
    };
    if !is_gguf(file) {
        return Err(Error::Usage(format!(
            "--file {file}: not a GGUF file; without --file the model's safetensors are read"
        )));
    }
    if path.is_dir() {
        return match path.join(file) {
            inside if inside.is_file() => Ok(inside),
            _ => Err(Error::model(path, format!("has no {file}"))),
        };
    }
    let hub = Hub::of_model(spec)?;
    let choose = |names: &[String], _: &Path| match names.iter().any(|name| name == file) {
        true => Ok(vec![file.to_owned()]),
        false => Err(format!("has no {file}; it has {}", gguf_files(names))),
    };
    hub.snapshot(&choose).map(|(dir, _)| dir.join(file))
}

fn gguf_files(names: &[String]) -> String {
    let files: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_gguf(name)).collect();
    if files.is_empty() { "no GGUF files".into() } else { files.join(", ") }
}

/// The directory of a model: `spec` itself if it is one, else that of the Hub's `owner/name`, downloaded if the cache lacks it.
///
/// # Errors
/// [`Error::Model`] when it is neither, [`Error::Hub`] when the download fails, or the model is of a kind that is not supported, which is
/// then not downloaded.
pub fn model_dir(spec: &str) -> Result<PathBuf> {
    directory(spec, &[])
}

fn directory(spec: &str, others: &[&str]) -> Result<PathBuf> {
    if Path::new(spec).is_file() {
        return Err(Error::model(spec, directory::not_a_directory(Path::new(spec))));
    }
    let dir = match Path::new(spec).is_dir() {
        true => spec.into(),
        false => download(spec, others)?,
    };
    // The base of an adapter is downloaded into the cache, where `directory::base_of` finds it.
    match directory::base_name(&dir)? {
        Some(base) if directory::base_of(&dir).is_err() && split_id(&base).is_some() => {
            download(&base, &[]).map(|_| dir)
        }
        _ => Ok(dir),
    }
}

fn download(id: &str, others: &[&str]) -> Result<PathBuf> {
    Hub::of_model(id)?.snapshot(&|names, dir| model_files(names, dir, others)).map(|(dir, _)| dir)
}

/// Files of a data set on the Hub, downloaded if the cache lacks them. `choose` picks among the names in the repository, or says what is
/// missing.
///
/// # Errors
/// [`Error::Hub`] when the download fails.
pub fn data_files(id: &str, choose: impl Fn(&[String]) -> Choice) -> Result<Vec<PathBuf>> {
    let (owner, name) = split_id(id).ok_or_else(|| Error::Usage(format!("{id}: not a Hub id owner/name")))?;
    let hub = Hub::from_environment(RepoKind::Dataset, format!("{owner}/{name}"))?;
    let choose_once = |names: &[String], _: &Path| choose(names);
    let (dir, files) = hub.snapshot(&choose_once)?;
    Ok(files.iter().map(|file| dir.join(file)).collect())
}

/// Names of files in a repository, or what is missing.
pub type Choice = std::result::Result<Vec<String>, String>;

/// Picks files by their names and by the contents of the snapshot directory. It is called again after each download until it picks no
/// new file, because an index names further files.
type Choose<'a> = &'a dyn Fn(&[String], &Path) -> Choice;

/// A repository on the Hub, and the local cache.
struct Hub {
    api: Api,
    cache: PathBuf,
    offline: bool,
    kind: RepoKind,
    id: String,
}

impl Hub {
    fn of_model(spec: &str) -> Result<Self> {
        let (owner, name) =
            split_id(spec).ok_or_else(|| Error::model(spec, "no such directory, and not a Hub id owner/name"))?;
        Self::from_environment(RepoKind::Model, format!("{owner}/{name}"))
    }

    fn from_environment(kind: RepoKind, id: String) -> Result<Self> {
        let places = hub_cache::home().zip(hub_cache::root());
        let (home, cache) =
            places.ok_or_else(|| Error::Hub { repo: id.clone(), what: "set HF_HOME to a directory".into() })?;
        let endpoint = setting("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Ok(Self {
            api: Api::new(endpoint.trim_end_matches('/').into(), token(&home)),
            cache,
            offline: is_set("HF_HUB_OFFLINE"),
            kind,
            id,
        })
    }

    /// Returns a directory with the chosen files, all complete, and their names.
    fn snapshot(&self, choose: Choose<'_>) -> Result<(PathBuf, Vec<String>)> {
        let folder = self.cache.join(format!("{}--{}", self.kind.plural(), self.id.replace('/', "--")));
        if self.offline {
            return cached(&folder, choose).map_err(|what| {
                let place = self.cache.display();
                self.error(format!("HF_HUB_OFFLINE is set and {place} does not have it whole ({what})"))
            });
        }
        match self.api.commit(self.kind, &self.id) {
            Ok(commit) => self.download(&folder, &commit, choose),
            Err(fault) if fault.is_passing() => cached(&folder, choose).map_err(|_| self.explained(&fault)),
            Err(fault) => Err(self.explained(&fault)),
        }
    }

    fn download(&self, folder: &Path, commit: &str, choose: Choose<'_>) -> Result<(PathBuf, Vec<String>)> {
        if !is_object_id(commit) {
            return Err(self.error(format!("bad commit {commit:?}")));
        }
        let dir = folder.join("snapshots").join(commit);
        let objects = self.api.files(self.kind, &self.id, commit).map_err(|fault| self.explained(&fault))?;
        let names: Vec<String> = objects.keys().cloned().collect();
        let mut whole = BTreeSet::new();
        loop {
            let chosen = choose(&names, &dir).map_err(|what| self.error(what))?;
            let Some(name) = chosen.iter().find(|name| !whole.contains(*name)) else {
                write_ref(folder, commit)?;
                return Ok((dir, chosen));
            };
            plain(name).map_err(|what| self.error(what))?;
            let object = objects.get(name).ok_or_else(|| self.error(format!("has no file {name}")))?;
            if !is_object_id(&object.id) {
                return Err(self.error(format!("{name}: bad object id {:?}", object.id)));
            }
            if !object.is_whole(&dir.join(name)) {
                self.fetch(folder, commit, name, object)?;
                object.link(folder, &dir, name)?;
            }
            whole.insert(name.clone());
        }
    }

    /// Downloads a file into the cache, under its object id.
    fn fetch(&self, folder: &Path, commit: &str, name: &str, object: &Object) -> Result<()> {
        let incomplete = folder.join(".incomplete");
        std::fs::create_dir_all(&incomplete).map_err(Error::io(&incomplete))?;
        let lock = incomplete.join(format!("{}.lock", object.id));
        let _lock = File::create(&lock).and_then(|file| file.lock().map(|()| file)).map_err(Error::io(&lock))?;
        let (blob, unfinished) = (object.blob(folder), incomplete.join(&object.id));
        let mut found = 0;
        for _ in 0..2 {
            if object.is_whole(&blob) {
                return Ok(()); // fetched by another process, or for another name or commit
            }
            if length(&unfinished).is_some_and(|had| had >= object.size) {
                std::fs::remove_file(&unfinished).map_err(Error::io(&unfinished))?;
            }
            let downloaded = self.api.download(self.kind, &self.id, commit, name, &unfinished);
            downloaded.map_err(|fault| match fault {
                Fault::Disk(err) => Error::io(&unfinished)(err),
                fault => self.error(format!("{name}: {}", self.explain(&fault))),
            })?;
            found = length(&unfinished).unwrap_or_default();
            if found == object.size {
                return put(&unfinished, &blob);
            }
        }
        Err(self.error(format!("{name}: got {found} of {} bytes; try again", object.size)))
    }

    fn error(&self, what: impl Into<String>) -> Error {
        Error::Hub { repo: self.id.clone(), what: what.into() }
    }

    fn explained(&self, fault: &Fault) -> Error {
        self.error(self.explain(fault))
    }

    fn explain(&self, fault: &Fault) -> String {
        let endpoint = self.api.endpoint();
        match fault {
            Fault::Status(401) => {
                "not found, or private: check the name, and set HF_TOKEN to a token that may read it".into()
            }
            Fault::Status(403) => {
                "access denied: ask for it on the repository's page, with the account of HF_TOKEN".into()
            }
            Fault::Status(404) => format!("not found on {endpoint}"),
            Fault::Status(status) if fault.is_passing() => format!("cannot get it from {endpoint}: status {status}"),
            Fault::Status(status) | Fault::Refused(status, _) => format!("{endpoint} answers with status {status}"),
            Fault::Unreachable(cause) => format!("cannot get it from {endpoint}: {}", one_line(cause)),
            Fault::Garbled(what) => format!("{endpoint} does not answer as a Hub does: {}", one_line(what)),
            Fault::Disk(err) => err.to_string(),
        }
    }
}

fn is_set(name: &str) -> bool {
    setting(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
}

/// The user's token, found as Python finds it: HF_TOKEN, or the file that `hf auth login` wrote.
fn token(home: &Path) -> Option<String> {
    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let file = setting("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
    let token = setting("HF_TOKEN").or_else(|| std::fs::read_to_string(file).ok())?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

/// Splits `owner/name`; `None` with characters that the Hub does not allow or that could leave the cache's folder.
fn split_id(id: &str) -> Option<(&str, &str)> {
    id.split_once('/').filter(|(owner, name)| is_plain(owner) && is_plain(name))
}

/// Refuses a name from a repository that would leave its directory.
fn plain(name: &str) -> std::result::Result<&str, String> {
    let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if inside && !name.is_empty() && !name.contains('\\') { Ok(name) } else { Err(format!("bad file name {name:?}")) }
}

/// Whether this can be the id of a commit or a content, for Git or for the Hub.
fn is_object_id(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_two_plain_names() {
        assert_eq!(split_id("Qwen/Qwen2.5-0.5B-Instruct"), Some(("Qwen", "Qwen2.5-0.5B-Instruct")));
        for bad in ["gpt2", "../x", "a/..", "a/b/c", "/a", "a/", "a/b c", "a/b?x", "./a", "a/.b", ""] {
            assert_eq!(split_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_name_cannot_leave_its_directory() {
        assert!(plain("main/train-00000-of-00001.parquet").is_ok());
        for bad in ["../x", "a/../../x", "/etc/passwd", "", ".", "a\\..\\x", "./x"] {
            assert!(plain(bad).is_err(), "{bad}");
        }
    }
}
