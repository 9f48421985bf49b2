//! Files of models and data sets on the Hugging Face Hub, in the cache that Python's `huggingface_hub` shares.
//!
//! The hf-hub crate speaks the protocol and reads `HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT` itself; it knows no `HF_HUB_OFFLINE`, so
//! that is read here, beside it. `refs/main` is written when a snapshot is whole, so what it names can be used offline.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use hf_hub::repository::{RepoTreeEntry, RepoType};
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::model::{self, ADAPTER, CONFIG, Config, INDEX, WEIGHTS};

/// A model's directory: `spec` itself if it is one, else the Hub's `owner/name`, downloaded if it is not in the cache.
///
/// # Errors
/// [`Error::Model`] when it is neither, [`Error::Hub`] when the Hub does not give it, or has a model of a kind that is not supported,
/// which is then not downloaded.
pub fn model_dir(spec: &str) -> Result<PathBuf> {
    if Path::new(spec).is_dir() {
        return Ok(spec.into());
    }
    if Path::new(spec).is_file() {
        return Err(Error::model(spec, model::not_a_directory(Path::new(spec))));
    }
    let (owner, name) =
        split_id(spec).ok_or_else(|| Error::model(spec, "no such directory, and no Hub id owner/name"))?;
    let hub = Hub::from_environment(spec)?;
    let repo = hub.client.model(owner, name);
    hub.snapshot(&repo, || Ok(repo.info().send()?.sha), &model_files).map(|(dir, _)| dir)
}

/// Files of a data set on the Hub, downloaded if they are not in the cache. `choose` picks among the names in the repository, or
/// says what it misses.
///
/// # Errors
/// [`Error::Hub`] when the Hub does not give them.
pub fn data_files(id: &str, choose: impl Fn(&[String]) -> Choice) -> Result<Vec<PathBuf>> {
    let (owner, name) = split_id(id).ok_or_else(|| Error::Usage(format!("{id}: no Hub id owner/name")))?;
    let hub = Hub::from_environment(id)?;
    let choose_once = |names: &[String], _: &Path| choose(names);
    let repo = hub.client.dataset(owner, name);
    let (dir, files) = hub.snapshot(&repo, || Ok(repo.info().send()?.sha), &choose_once)?;
    Ok(files.iter().map(|file| dir.join(file)).collect())
}

/// Names of files in a repository, or what is missing.
pub type Choice = std::result::Result<Vec<String>, String>;

/// Picks files by their names and by what the snapshot directory holds already; asked again after each download until it picks no
/// more, because an index names further files.
type Choose<'a> = &'a dyn Fn(&[String], &Path) -> Choice;

struct Hub {
    client: HFClientSync,
    cache: PathBuf,
    endpoint: String,
    offline: bool,
    id: String,
}

impl Hub {
    fn from_environment(id: &str) -> Result<Self> {
        let setup = |err: HFError| Error::Hub { repo: id.into(), what: one_line(&err.to_string()) };
        let client = HFClient::new().map_err(setup)?;
        let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
        Ok(Self {
            cache: client.cache_dir().to_path_buf(),
            endpoint: client.endpoint().into(),
            client: HFClientSync::from_inner(client).map_err(setup)?,
            offline: ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()),
            id: id.into(),
        })
    }

    /// A directory with the chosen files, all whole, and their names. `head` asks the Hub for the commit that `main` is.
    fn snapshot<T: RepoType>(
        &self,
        repo: &HFRepositorySync<T>,
        head: impl FnOnce() -> std::result::Result<Option<String>, HFError>,
        choose: Choose<'_>,
    ) -> Result<(PathBuf, Vec<String>)> {
        let folder = self.cache.join(format!("{}--{}", repo.repo_type().plural(), self.id.replace('/', "--")));
        if self.offline {
            return cached(&folder, choose).map_err(|what| {
                let place = self.cache.display();
                self.error(format!("HF_HUB_OFFLINE is set and {place} does not have it whole ({what})"))
            });
        }
        match head() {
            Ok(Some(commit)) => self.download(repo, &folder, &commit, choose),
            Ok(None) => Err(self.error("has no commit")),
            Err(err) if unreachable(&err) => cached(&folder, choose).map_err(|_| self.explained(&err)),
            Err(err) => Err(self.explained(&err)),
        }
    }

    fn download<T: RepoType>(
        &self,
        repo: &HFRepositorySync<T>,
        folder: &Path,
        commit: &str,
        choose: Choose<'_>,
    ) -> Result<(PathBuf, Vec<String>)> {
        if !is_object_id(commit) {
            return Err(self.error(format!("bad commit {commit:?}")));
        }
        let dir = folder.join("snapshots").join(commit);
        let tree = repo.list_tree().revision(commit).recursive(true).send();
        let objects = objects(tree.map_err(|err| self.explained(&err))?);
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
                self.fetch(repo, folder, (commit, name), object)?;
                object.link(folder, &dir, name)?;
            }
            whole.insert(name.clone());
        }
    }

    /// One file into the cache, under the name that the repository's list gives its content: hf-hub's own cache takes names from the
    /// headers of the answer, which lead wherever the server likes. It does not check the length either.
    fn fetch<T: RepoType>(
        &self,
        repo: &HFRepositorySync<T>,
        folder: &Path,
        (commit, name): (&str, &str),
        object: &Object,
    ) -> Result<()> {
        let unfinished = folder.join(".incomplete");
        std::fs::create_dir_all(&unfinished).map_err(Error::io(&unfinished))?;
        let lock = unfinished.join(format!("{}.lock", object.id));
        let _lock = File::create(&lock).and_then(|file| file.lock().map(|()| file)).map_err(Error::io(&lock))?;
        let (blob, unfinished) = (object.blob(folder), unfinished.join(&object.id));
        let mut found = 0;
        for _ in 0..2 {
            if object.is_whole(&blob) {
                return Ok(()); // somebody else fetched it meanwhile, or it is that of another name or commit
            }
            let download = repo.download_file().filename(name).revision(commit).local_dir(unfinished.clone()).send();
            let path = download.map_err(|err| self.error(format!("{name}: {}", self.explain(&err))))?;
            found = length(&path).unwrap_or_default();
            if found == object.size {
                put(&path, &blob)?;
                let _ = std::fs::remove_dir_all(&unfinished); // empty but for folders
                return Ok(());
            }
        }
        Err(self.error(format!("{name}: got {found} of {} bytes; try again", object.size)))
    }

    fn error(&self, what: impl Into<String>) -> Error {
        Error::Hub { repo: self.id.clone(), what: what.into() }
    }

    fn explained(&self, err: &HFError) -> Error {
        self.error(self.explain(err))
    }

    fn explain(&self, err: &HFError) -> String {
        let status = match err {
            HFError::Http { context } | HFError::AuthRequired { context } | HFError::Forbidden { context } => {
                context.status.as_u16()
            }
            HFError::RepoNotFound { .. } | HFError::EntryNotFound { .. } | HFError::RevisionNotFound { .. } => 404,
            _ => 0,
        };
        match status {
            401 => "not found, or private: check the name, and set HF_TOKEN to a token that may read it".into(),
            403 => "access denied: ask for it on the repository's page, with the account of HF_TOKEN".into(),
            404 => format!("not found on {}", self.endpoint),
            _ => {
                let mut cause: &dyn std::error::Error = err;
                while let Some(source) = cause.source() {
                    cause = source;
                }
                let cause = one_line(&cause.to_string());
                if unreachable(err) { format!("cannot get it from {}: {cause}", self.endpoint) } else { cause }
            }
        }
    }
}

/// Whether the Hub, not the request, is the trouble.
fn unreachable(err: &HFError) -> bool {
    match err {
        HFError::Request { .. } | HFError::RateLimited { .. } => true,
        HFError::Http { context } => matches!(context.status.as_u16(), 408 | 429 | 500..),
        _ => false,
    }
}

/// `owner/name` in the letters that the Hub allows; nothing that leaves the cache's folder.
fn split_id(id: &str) -> Option<(&str, &str)> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let good = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed);
    id.split_once('/').filter(|(owner, name)| good(owner) && good(name))
}

/// Refuses a name from a repository that would leave its directory.
fn plain(name: &str) -> std::result::Result<&str, String> {
    let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if inside && !name.is_empty() && !name.contains('\\') { Ok(name) } else { Err(format!("bad file name {name:?}")) }
}

/// A file's content, as the repository's list has it.
struct Object {
    /// Hexadecimal digits that name it.
    id: String,
    /// Bytes.
    size: u64,
}

impl Object {
    fn is_whole(&self, path: &Path) -> bool {
        length(path) == Some(self.size)
    }

    fn blob(&self, folder: &Path) -> PathBuf {
        folder.join("blobs").join(&self.id)
    }

    /// Makes the name in a snapshot a relative link to the content, as Python does.
    fn link(&self, folder: &Path, snapshot: &Path, name: &str) -> Result<()> {
        let link = snapshot.join(name);
        let inside = link.strip_prefix(folder).expect("a snapshot is in the folder").components().count();
        let target = Path::new(&"../".repeat(inside - 1)).join("blobs").join(&self.id);
        make_parent(&link)?;
        match std::fs::remove_file(&link) {
            Err(err) if err.kind() != ErrorKind::NotFound => Err(Error::io(&link)(err)),
            _ => std::os::unix::fs::symlink(target, &link).map_err(Error::io(&link)),
        }
    }
}

/// Git's and the Hub's names for commits and contents.
fn is_object_id(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn length(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|found| found.len())
}

fn put(from: &Path, to: &Path) -> Result<()> {
    make_parent(to)?;
    std::fs::rename(from, to).map_err(Error::io(to))
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().expect("a path below the cache");
    std::fs::create_dir_all(parent).map_err(Error::io(parent))
}

fn objects(tree: Vec<RepoTreeEntry>) -> BTreeMap<String, Object> {
    let file = |entry| match entry {
        RepoTreeEntry::File { path, size, oid: id, .. } => Some((path, Object { id, size })),
        RepoTreeEntry::Directory { .. } => None,
    };
    tree.into_iter().filter_map(file).collect()
}

/// Which snapshot `main` is, for offline use; written beside and renamed.
fn write_ref(folder: &Path, commit: &str) -> Result<()> {
    let refs = folder.join("refs");
    std::fs::create_dir_all(&refs).map_err(Error::io(&refs))?;
    let file = tempfile::NamedTempFile::new_in(&refs).map_err(Error::io(&refs))?;
    std::fs::write(file.path(), commit).map_err(Error::io(&refs))?;
    file.persist(refs.join("main")).map_err(|err| Error::io(&refs)(err.error))?;
    Ok(())
}

/// The snapshot that `refs/main` names, if it has all that is chosen.
fn cached(folder: &Path, choose: Choose<'_>) -> std::result::Result<(PathBuf, Vec<String>), String> {
    let commit = std::fs::read_to_string(folder.join("refs/main")).map_err(|_| "nothing is there".to_owned())?;
    let dir = folder.join("snapshots").join(plain(commit.trim())?);
    let mut names = Vec::new();
    list(&dir, "", &mut names);
    let chosen = choose(&names, &dir)?;
    match chosen.iter().find(|name| !names.contains(name)) {
        Some(missing) => Err(format!("no {missing}")),
        None => Ok((dir, chosen)),
    }
}

/// The files below a snapshot whose content is there; links to what was removed are left out.
fn list(dir: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match std::fs::metadata(entry.path()) {
            Ok(found) if found.is_dir() => list(&entry.path(), &format!("{name}/"), names),
            Ok(_) => names.push(name),
            Err(_) => {}
        }
    }
}

/// What a model needs of its repository: all of one checkpoint, small files first, shards once their index is there; or what the
/// repository has instead, as soon as names or the first files tell.
fn model_files(names: &[String], dir: &Path) -> Choice {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    if has(ADAPTER) && !dir.join(ADAPTER).exists() {
        return Ok(vec![ADAPTER.into()]); // it names the model that it is for
    }
    if let Some(kind) = model::unsupported(names, &dir.join(ADAPTER)) {
        return Err(kind);
    }
    if has(CONFIG) && !dir.join(CONFIG).exists() {
        return Ok(vec![CONFIG.into()]); // another architecture may lack other files too
    }
    if has(CONFIG) {
        Config::read(&dir.join(CONFIG)).map_err(|err| match err {
            Error::Model { what, .. } => format!("{CONFIG}: {what}"),
            other => other.to_string(),
        })?;
    }
    let mut chosen = Vec::new();
    for required in [CONFIG, "tokenizer.json"] {
        if !has(required) {
            return Err(format!("has no {required}"));
        }
        chosen.push(required.to_owned());
    }
    chosen.extend(OPTIONAL.into_iter().filter(|name| has(name)).map(Into::into));
    if has(WEIGHTS) {
        chosen.push(WEIGHTS.into());
    } else if has(INDEX) {
        chosen.push(INDEX.into());
        chosen.extend(shards(&dir.join(INDEX))?);
    } else {
        return Err(format!("has no {WEIGHTS}"));
    }
    Ok(chosen)
}

/// Files of a model that it may lack.
const OPTIONAL: [&str; 4] =
    ["generation_config.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"];

/// The shards that an index names; none before the index is there.
fn shards(index: &Path) -> std::result::Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Ok(text) = std::fs::read_to_string(index) else {
        return Ok(BTreeSet::new());
    };
    let index: Index = serde_json::from_str(&text).map_err(|err| format!("{INDEX}: {err}"))?;
    Ok(index.weight_map.into_values().collect())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
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
