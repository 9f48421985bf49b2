//! Where the Hugging Face Hub's client, in Python and here, keeps what it downloaded.

use std::path::{Path, PathBuf};

/// The directory of the cache, by the environment variables that Python reads; `None` if they name none.
#[must_use]
pub fn root() -> Option<PathBuf> {
    let own = setting("HF_HUB_CACHE").or_else(|| setting("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
    own.or_else(|| home().map(|home| home.join("hub")))
}

/// The directory of the Hub's client: of its cache and its token.
#[must_use]
pub fn home() -> Option<PathBuf> {
    let home = setting("HF_HOME").map(PathBuf::from);
    let home = home.or_else(|| setting("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("huggingface")));
    home.or_else(|| setting("HOME").map(|dir| Path::new(&dir).join(".cache/huggingface")))
}

/// The cache's directory, for a message.
#[must_use]
pub fn shown() -> String {
    root().unwrap_or_default().display().to_string()
}

/// The snapshot that `main` was when the model OWNER/NAME was last downloaded whole.
#[must_use]
pub fn snapshot(id: &str) -> Option<PathBuf> {
    let (owner, name) = id.split_once('/').filter(|(owner, name)| is_plain(owner) && is_plain(name))?;
    let folder = root()?.join(format!("models--{owner}--{name}"));
    let commit = std::fs::read_to_string(folder.join("refs/main")).ok()?;
    Some(folder.join("snapshots").join(commit.trim())).filter(|dir| is_plain(commit.trim()) && dir.is_dir())
}

/// Whether a part of an id has only characters that the Hub allows, and cannot leave the cache's folder.
#[must_use]
pub fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
}

/// An environment variable that is set and not empty.
#[must_use]
pub fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
