//! Finds the file and the stored name of each of a model's parameters.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::MappedFile;
use crate::error::{Error, Result};
use crate::model::{Config, Parameter};

/// The file of each parameter, and its name in that file.
pub(super) type Stored<'a> = HashMap<String, (&'a MappedFile, String)>;

/// Finds the tensors of a model as transformers does: names may lack the prefix `model.`, as in a model saved without its head; the
/// head may be stored beside tied embeddings, or in their place; and `rotary_emb.inv_freq`, which old versions saved, is ignored.
///
/// transformers drops unknown tensors with a warning. Most of them belong to something that is not computed here, so they are refused.
///
/// # Errors
/// [`Error::Model`] with a tensor that the model does not have, or a tied head that is not the embedding.
pub(super) fn stored<'a>(dir: &Path, files: &'a [MappedFile], config: &Config) -> Result<Stored<'a>> {
    let wanted: HashSet<String> = config.stored().named().into_iter().map(|(name, _)| name).collect();
    let head = Parameter::LmHead.name();
    let mut found = Stored::new();
    for file in files {
        for stored in file.tensors.names() {
            let name = full(&stored);
            if wanted.contains(&name) || (name == head && config.tie_word_embeddings) {
                found.insert(name, (file, stored));
            } else if !name.ends_with("rotary_emb.inv_freq") {
                return Err(unknown(file, &stored, config));
            }
        }
    }
    match (config.tie_word_embeddings, found.remove(head)) {
        (true, Some(stored)) => tie(dir, &mut found, stored)?,
        (false, Some(stored)) => _ = found.insert(head.into(), stored),
        (_, None) => {}
    }
    Ok(found)
}

fn full(stored: &str) -> String {
    let base = ["embed_tokens.", "layers.", "norm."].iter().any(|part| stored.starts_with(part));
    if base { format!("model.{stored}") } else { stored.to_owned() }
}

fn unknown(file: &MappedFile, name: &str, config: &Config) -> Error {
    let (family, layers) = (config.family.name(), config.num_hidden_layers);
    let what = format!(
        "tensor {name} is not part of a {family} model of {layers} layers; loading and saving the model with transformers drops it"
    );
    Error::model(&file.path, what)
}

/// Where both are stored and differ, transformers 5 computes with the head, and 4 with the embedding.
fn tie<'a>(dir: &Path, found: &mut Stored<'a>, head: (&'a MappedFile, String)) -> Result<()> {
    let name = Parameter::EmbedTokens.name();
    let Some(embedding) = found.get(name) else {
        found.insert(name.into(), head);
        return Ok(());
    };
    if same(embedding, &head)? {
        return Ok(());
    }
    let remedy = "set tie_word_embeddings to false in config.json to use both, or remove lm_head.weight";
    Err(Error::model(
        dir,
        format!("tie_word_embeddings is true, but {} is not {name}; {remedy}", Parameter::LmHead.name()),
    ))
}

fn same((one, name): &(&MappedFile, String), (other, head): &(&MappedFile, String)) -> Result<bool> {
    let (a, b) = (one.bytes(name)?, other.bytes(head)?);
    if a == b || one.tensors.shape(name)? != other.tensors.shape(head)? {
        return Ok(a == b);
    }
    Ok(*one.tensors.read::<f32>(name)? == *other.tensors.read::<f32>(head)?)
}
