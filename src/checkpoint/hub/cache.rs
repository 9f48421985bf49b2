//! A repository's folder in the cache, laid out as Python's `huggingface_hub` does: contents by id, and snapshots of links to them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::api::Object;
use super::{Choose, plain};
use crate::error::{Error, Result};

impl Object {
    pub(super) fn is_whole(&self, path: &Path) -> bool {
        length(path) == Some(self.size)
    }

    pub(super) fn blob(&self, folder: &Path) -> PathBuf {
        folder.join("blobs").join(&self.id)
    }

    /// Makes the file in a snapshot a relative link to its content, as Python does.
    pub(super) fn link(&self, folder: &Path, snapshot: &Path, name: &str) -> Result<()> {
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

pub(super) fn length(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|found| found.len())
}

pub(super) fn put(from: &Path, to: &Path) -> Result<()> {
    make_parent(to)?;
    std::fs::rename(from, to).map_err(Error::io(to))
}

pub(super) fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().expect("a path below the cache");
    std::fs::create_dir_all(parent).map_err(Error::io(parent))
}

/// Records which snapshot `main` is, for offline use: writes beside the file and renames.
pub(super) fn write_ref(folder: &Path, commit: &str) -> Result<()> {
    let refs = folder.join("refs");
    std::fs::create_dir_all(&refs).map_err(Error::io(&refs))?;
    let file = tempfile::NamedTempFile::new_in(&refs).map_err(Error::io(&refs))?;
    std::fs::write(file.path(), commit).map_err(Error::io(&refs))?;
    file.persist(refs.join("main")).map_err(|err| Error::io(&refs)(err.error))?;
    Ok(())
}

/// The snapshot that `refs/main` names, if it has all chosen files.
pub(super) fn cached(folder: &Path, choose: Choose<'_>) -> std::result::Result<(PathBuf, Vec<String>), String> {
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

/// Lists the files of a snapshot, without links whose content was removed.
pub(super) fn list(dir: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match std::fs::metadata(entry.path()) {
            Ok(found) if found.is_dir() => list(&entry.path(), &format!("{name}/"), names),
            Ok(_) => names.push(name),
            Err(_) => {}
        }
    }
}
