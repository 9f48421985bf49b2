//! Exports an adapter as PEFT reads it.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::Card;
use crate::checkpoint::{self, Publication};
use crate::directory::{ADAPTER, ADAPTER_WEIGHTS, adapter_entries, base_of};
use crate::error::{Error, Result};

/// Writes the adapter in `checkpoint`, and not its base model, as a directory that appears as `target` when it is complete. The base is named
/// by its Hub id, if the run began from it, or by its path.
///
/// # Errors
/// [`Error::Usage`] when `target` exists, or `checkpoint` is no adapter; [`Error::Io`] or [`Error::Model`] when one cannot be read or
/// written.
pub fn directory(checkpoint: &Path, target: &Path, card: &Card) -> Result<()> {
    let place = checkpoint.display();
    let base = base_of(checkpoint)?.ok_or_else(|| Error::Usage(format!("--adapter: {place} is no adapter")))?;
    let publication = Publication::begin(target)?;
    let (dir, mut entries) = (publication.dir(), adapter_entries(checkpoint)?);
    let name = card.start().map_or_else(|| base.to_string_lossy().into_owned(), str::to_owned);
    entries.insert("base_model_name_or_path".into(), name.into());
    let config = format!("{:#}\n", Value::Object(entries));
    fs::write(dir.join(ADAPTER), config).map_err(Error::io(dir.join(ADAPTER)))?;
    let weights = checkpoint.join(ADAPTER_WEIGHTS);
    fs::copy(&weights, dir.join(ADAPTER_WEIGHTS)).map_err(Error::io(&weights))?;
    checkpoint::copy_tokenizer(checkpoint, dir)?;
    let readme = dir.join("README.md");
    fs::write(&readme, card.render("peft", "float32")).map_err(Error::io(&readme))?;
    publication.publish()
}
