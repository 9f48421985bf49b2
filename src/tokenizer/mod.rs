//! Converts text to token ids and back, and messages to text, with the tokenizer and chat template of a Hugging Face model directory.

mod stream;
mod template;

use std::collections::HashMap;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::directory::file_in;
use crate::error::{Error, Result};
use crate::lines::record::Message;
use template::{ChatTemplate, Templates};

pub use stream::{TextStream, unfinished_mark};
pub use template::{TemplateArgs, TemplateVariable};

const NO_TEMPLATE: &str = "no chat template; base models have none. Give rollout --raw (no template) or --chat-template FILE, or put a \
                           chat_template.jinja beside the tokenizer for all commands";

/// A model directory's tokenizer and chat template.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they are, `tokenizer_config.json` and `chat_template.jinja`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::Model`] when it is damaged.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::with_template(dir, &TemplateArgs::default())
    }

    /// Like [`Tokenizer::load`], but with another chat template, or with variables of it.
    ///
    /// # Errors
    /// Those of [`Tokenizer::load`].
    pub fn with_template(dir: &Path, args: &TemplateArgs) -> Result<Self> {
        let path = file_in(dir, "tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let config_path = file_in(dir, "tokenizer_config.json");
        let config = TokenizerConfig::load(&config_path)?;
        let beside = Some(file_in(dir, "chat_template.jinja")).filter(|path| path.is_file());
        Self::new((&path, &bytes), (&config_path, config), args.chat_template.clone().or(beside), args)
    }

    /// A tokenizer from the contents of its `tokenizer.json` and its `tokenizer_config.json`, which the file `path` holds.
    ///
    /// # Errors
    /// Those of [`Tokenizer::load`].
    pub fn of_json(path: &Path, [tokenizer, config]: [serde_json::Value; 2], args: &TemplateArgs) -> Result<Self> {
        let config = serde_json::from_value(config).map_err(|err| Error::model(path, err.to_string()))?;
        Self::new((path, tokenizer.to_string().as_bytes()), (path, config), args.chat_template.clone(), args)
    }

    /// `template` is a file with a template that replaces the config's.
    fn new(
        (path, bytes): (&Path, &[u8]),
        (config_path, mut config): (&Path, TokenizerConfig),
        template: Option<PathBuf>,
        args: &TemplateArgs,
    ) -> Result<Self> {
        let mut inner = parse(bytes).map_err(|what| Error::model(path, what))?;
        // The file holds the settings of its last use; prompts are cut only where the user is told.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|err| Error::model(path, err.to_string()))?;
        let special = config.special_tokens();
        let id =
            |wanted| special.iter().find(|(name, _)| *name == wanted).and_then(|(_, text)| inner.token_to_id(text));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let source = match template {
            Some(file) => Some((std::fs::read_to_string(&file).map_err(Error::io(&file))?, file)),
            None => config.chat_template.and_then(Templates::default).map(|source| (source, config_path.to_owned())),
        };
        let compile =
            |(source, path): (String, PathBuf)| ChatTemplate::new((source, &path), &special, &args.chat_template_arg);
        Ok(Self { template: source.map(compile).transpose()?, path: path.to_owned(), inner, bos, eos })
    }

    /// Encodes a text, in which special tokens may be written out. Adds nothing.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|err| self.error(&err))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Encodes a text for a base model, with the tokens that the tokenizer adds, like BOS; one BOS if the text begins with it, too.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn encode_raw(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, true).map_err(|err| self.error(&err))?;
        let ids = encoding.get_ids();
        let doubled = ids.len() > 1 && ids[0] == ids[1] && Some(ids[0]) == self.bos;
        Ok(ids[usize::from(doubled)..].to_vec())
    }

    /// The token that ends a turn, among those that end a completion, at least one: the tokenizer's EOS, or the first if that is not one
    /// of them. Llama 3's models end a text with one token, and a turn with another.
    #[must_use]
    pub fn end_of_turn(&self, stops: &[u32]) -> u32 {
        self.eos.filter(|eos| stops.contains(eos)).unwrap_or(stops[0])
    }

    /// Decodes token ids, leaving out special tokens and unknown ids.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|err| self.error(&err))
    }

    /// The text that each of the tokens adds, leaving out special tokens and unknown ids. A character of several tokens belongs to the
    /// last of them.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn pieces(&self, ids: &[u32]) -> Result<Vec<String>> {
        let mut stream = self.inner.decode_stream(true);
        ids.iter().map(|id| Ok(stream.step(*id).map_err(|err| self.error(&err))?.unwrap_or_default())).collect()
    }

    /// Renders messages with the chat template, up to where the model's answer begins.
    ///
    /// # Errors
    /// A message when there is no template, or the template fails, for instance because roles do not alternate.
    pub fn chat(&self, messages: &[Message]) -> std::result::Result<String, String> {
        self.template.as_ref().ok_or(NO_TEMPLATE)?.render(messages)
    }

    /// Refuses a model that has no chat template.
    ///
    /// # Errors
    /// [`Error::Model`] with the remedies.
    pub fn check_template(&self) -> Result<()> {
        self.template.as_ref().map(|_| ()).ok_or_else(|| Error::model(&self.path, NO_TEMPLATE))
    }

    fn error(&self, err: &tokenizers::Error) -> Error {
        Error::model(&self.path, err.to_string())
    }
}

/// Parses a `tokenizer.json`. The tokenizers crate panics on some damaged files, so the JSON is checked first, and a panic that is left
/// becomes an error.
fn parse(bytes: &[u8]) -> std::result::Result<tokenizers::Tokenizer, String> {
    let text = std::str::from_utf8(bytes).map_err(|err| format!("it is not UTF-8 text: {err}"))?;
    let sections: HashMap<String, &RawValue> = serde_json::from_str(text).map_err(|err| err.to_string())?;
    for (name, section) in sections.iter().filter(|(name, _)| *name != "model") {
        serde_json::from_str::<serde_json::Value>(section.get()).map_err(|err| format!("{name}: {err}"))?;
    }
    // `from_bytes` is generic: it would compile the crate's whole deserializer again, here.
    let parsed = catch_unwind(|| text.parse::<tokenizers::Tokenizer>());
    parsed.map_err(|_| "the tokenizers crate panics on it".to_owned())?.map_err(|err| err.to_string())
}

/// The fields of `tokenizer_config.json` that matter here.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Described { content: String },
}

impl TokenizerConfig {
    /// Reads the file, which need not be there.
    fn load(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            read => {
                serde_json::from_str(&read.map_err(Error::io(path))?).map_err(|err| Error::model(path, err.to_string()))
            }
        }
    }

    /// The special tokens that it names, under the names of transformers.
    fn special_tokens(&mut self) -> Vec<(&'static str, String)> {
        let tokens = [
            ("bos_token", self.bos_token.take()),
            ("eos_token", self.eos_token.take()),
            ("pad_token", self.pad_token.take()),
            ("unk_token", self.unk_token.take()),
        ];
        tokens.into_iter().filter_map(|(name, token)| Some((name, token?.text()))).collect()
    }
}

impl SpecialToken {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}

/// Returns the token ids that end a completion: those in `generation_config.json`, or if it names none, in `config.json`.
///
/// # Errors
/// [`Error::Model`] when neither file names one or a file is damaged, [`Error::Io`] when a file cannot be read.
pub fn stop_ids(dir: &Path) -> Result<Vec<u32>> {
    #[derive(Deserialize)]
    struct Eos {
        eos_token_id: Option<Ids>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    for name in ["generation_config.json", "config.json"] {
        let path = file_in(dir, name);
        let text = match std::fs::read_to_string(&path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => continue,
            read => read.map_err(Error::io(&path))?,
        };
        let eos: Eos = serde_json::from_str(&text).map_err(|err| Error::model(&path, err.to_string()))?;
        match eos.eos_token_id {
            Some(Ids::One(id)) => return Ok(vec![id]),
            Some(Ids::Many(ids)) if !ids.is_empty() => return Ok(ids),
            _ => {}
        }
    }
    Err(Error::model(dir, "no eos_token_id in generation_config.json or config.json; completions would never end"))
}
