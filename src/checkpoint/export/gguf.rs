//! Exports a checkpoint as a GGUF file, with the `Modelfile` that Ollama reads beside it.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::check::same_answers;
use super::{Card, refuse_not_finite};
use crate::checkpoint::{self, Publication};
use crate::error::{Error, Result};
use crate::gguf::{About, Companions, Gguf, write};
use crate::lines::record::Message;
use crate::model::Model;
use crate::numbers::dtype::Dtype;
use crate::numbers::quantization::Quantization;
use crate::tokenizer::{TemplateArgs, Tokenizer, stop_ids};

/// Writes the model in `checkpoint` as `NAME-TYPE.gguf` in a directory that appears as `target` when it is complete.
///
/// # Errors
/// As [`super::directory`]; [`Error::Model`] when GGUF has no entry for what the model needs, [`Error::Numerics`] when the file read back
/// does not answer as the checkpoint does.
pub fn directory(checkpoint: &Path, target: &Path, quantization: Quantization, card: &Card) -> Result<()> {
    let publication = Publication::begin(target)?;
    let model = Model::load(checkpoint)?;
    refuse_not_finite(checkpoint, &model, |value| value.is_finite(), "f32")?;
    let name = format!("{}-{}.gguf", card.name(), quantization.name());
    let path = publication.dir().join(&name);

    let (tokenizer, stops) = (Tokenizer::load(checkpoint)?, stop_ids(checkpoint)?);
    let files = [json(&checkpoint.join("tokenizer.json"))?, tokenizer_config(checkpoint)?];
    let companions =
        Companions { tokenizer: &files[0], tokenizer_config: &files[1], ends: (tokenizer.end_of_turn(&stops), &stops) };
    let about = About {
        name: card.name().into(),
        base_model: card.base_model().map(Into::into),
        license: card.license().map(Into::into),
        description: card.history(),
    };
    let stored = write(&path, &model, quantization, &about, &companions)?;
    drop(model);

    let written = Gguf::open(&path)?;
    same_answers(&path, &written.load(Dtype::F32)?, &stored)?;
    let read = Tokenizer::of_json(&path, written.tokenizer()?, &TemplateArgs::default())?;
    same_tokens(&path, [&read, &tokenizer])?;
    if let Some(lost) = stops.iter().find(|id| !written.stop_ids().is_ok_and(|ids| ids.contains(*id))) {
        return Err(Error::model(&path, format!("GGUF has no entry for the end token {lost}")));
    }
    let modelfile = publication.dir().join("Modelfile");
    let system = fs::read_to_string(checkpoint.join(checkpoint::SYSTEM_PROMPT)).ok();
    let system = system.map(|prompt| format!("SYSTEM \"\"\"{prompt}\"\"\"\n")).unwrap_or_default();
    fs::write(&modelfile, format!("FROM ./{name}\n{system}")).map_err(Error::io(&modelfile))?;
    let readme = publication.dir().join("README.md");
    fs::write(&readme, card.render("gguf", &format!("GGUF, {}", quantization.name()))).map_err(Error::io(&readme))?;
    publication.publish()
}

fn json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|err| Error::model(path, err.to_string()))
}

/// The contents of `tokenizer_config.json`, with the chat template in it.
fn tokenizer_config(checkpoint: &Path) -> Result<Value> {
    let (path, template) = (checkpoint.join("tokenizer_config.json"), checkpoint.join("chat_template.jinja"));
    let mut config = if path.is_file() { json(&path)? } else { Value::Object(serde_json::Map::new()) };
    if template.is_file() {
        config["chat_template"] = fs::read_to_string(&template).map_err(Error::io(&template))?.into();
    }
    Ok(config)
}

/// Compares the tokens of texts and of a chat.
fn same_tokens(path: &Path, [got, want]: [&Tokenizer; 2]) -> Result<()> {
    let texts = [
        "How many apples does Tom have? 3 + 4 = 7.",
        " leading and trailing \n\n",
        "tabs\tand\r\n line ends, caf\u{e9} \u{65e5}\u{672c}\u{8a9e} \u{1f34e} x\u{b2} 1234567 3.14 it's I'LL",
        "<|im_start|>user\n<reasoning>\n</reasoning><|im_end|>",
    ];
    let chat = |one: &Tokenizer| one.chat(&[Message::new("user", texts[0])]).ok();
    let same = texts.iter().all(|text| {
        let tokens = |one: &Tokenizer| (one.encode(text).ok(), one.encode_raw(text).ok());
        tokens(got) == tokens(want)
    });
    if same && chat(got) == chat(want) {
        return Ok(());
    }
    Err(Error::model(path, "GGUF has no entries that give this model's tokens"))
}
