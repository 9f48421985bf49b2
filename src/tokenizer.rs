//! Converts text to token ids and back, and messages to text, with the tokenizer and chat template of a Hugging Face model directory.

use std::collections::HashMap;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use minijinja::{Environment, ErrorKind, Value, context};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::lines::record::Message;

/// Limit on a chat template's work per prompt (interpreter instructions): about a second, a thousand times what a long chat takes. A
/// template is a program that came with the model.
const TEMPLATE_FUEL: u64 = 20_000_000;

const NO_TEMPLATE: &str = "no chat template; base models have none. Give rollout --raw (no template) or --chat-template FILE, or put a \
                           chat_template.jinja beside the tokenizer for all commands";

/// A model directory's tokenizer and chat template.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they are, `tokenizer_config.json` and `chat_template.jinja`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::Model`] when it is damaged.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::with_template(dir, None)
    }

    /// Like [`Tokenizer::load`], but with the chat template in the file `template`, if that is given.
    ///
    /// # Errors
    /// Those of [`Tokenizer::load`].
    pub fn with_template(dir: &Path, template: Option<&Path>) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let mut inner = parse(&bytes).map_err(|what| Error::model(&path, what))?;
        // The file holds the settings of its last use; prompts are cut only where the user is told.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|err| Error::model(&path, err.to_string()))?;
        Ok(Self { template: ChatTemplate::load(dir, template)?, path, inner })
    }

    /// Encodes a text, in which special tokens may be written out. Adds nothing.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|err| self.error(&err))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Encodes a text for a base model, with the tokens that the tokenizer adds, like BOS.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn encode_raw(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, true).map_err(|err| self.error(&err))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Decodes token ids, leaving out special tokens and unknown ids.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|err| self.error(&err))
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

/// Jinja, set up as transformers does it.
struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
}

/// The fields of `tokenizer_config.json` that matter to a template.
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
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Described { content: String },
}

impl ChatTemplate {
    /// Loads the template in `file`, else that of the directory, if there is one.
    fn load(dir: &Path, file: Option<&Path>) -> Result<Option<Self>> {
        let path = dir.join("tokenizer_config.json");
        let config = match std::fs::read_to_string(&path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => TokenizerConfig::default(),
            read => serde_json::from_str(&read.map_err(Error::io(&path))?)
                .map_err(|err| Error::model(&path, err.to_string()))?,
        };
        let beside = Some(dir.join("chat_template.jinja")).filter(|path| path.is_file());
        let source = match file.map(Path::to_path_buf).or(beside) {
            Some(file) => Some((std::fs::read_to_string(&file).map_err(Error::io(&file))?, file)),
            None => config.chat_template.and_then(Templates::default).map(|source| (source, path)),
        };
        let Some((source, path)) = source else { return Ok(None) };
        let special = [
            ("bos_token", config.bos_token),
            ("eos_token", config.eos_token),
            ("pad_token", config.pad_token),
            ("unk_token", config.unk_token),
        ];
        let special = special.into_iter().filter_map(|(name, token)| Some((name, token?.text())));
        let template = Self::new(source, special.collect());
        template.map(Some).map_err(|err| Error::model(&path, format!("chat template: {err:#}")))
    }

    fn new(source: String, special_tokens: Vec<(&'static str, String)>) -> std::result::Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", source)?;
        Ok(Self { environment, special_tokens })
    }

    fn render(&self, messages: &[Message]) -> std::result::Result<String, String> {
        let template = self.environment.get_template("chat").expect("added in new");
        let special = Value::from_iter(self.special_tokens.iter().map(|(name, text)| (*name, text.as_str())));
        let context = context! { messages, add_generation_prompt => true, ..special };
        template.render(context).map_err(|err| err.detail().map_or_else(|| err.to_string(), str::to_owned))
    }
}

impl Templates {
    fn default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(list) => list.into_iter().find(|named| named.name == "default").map(|named| named.template),
        }
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
        let path = dir.join(name);
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
