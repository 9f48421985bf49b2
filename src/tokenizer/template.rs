//! Chat templates: Jinja, set up as transformers does it.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use minijinja::{Environment, ErrorKind, Value, context};
use regex::{Captures, Regex};
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::lines::record::Message;

/// Limit on a chat template's work per prompt (interpreter instructions): about a second, a thousand times what a long chat takes. A
/// template is a program that came with the model.
const TEMPLATE_FUEL: u64 = 20_000_000;

/// The options of commands that apply a chat template.
#[derive(Debug, Clone, Default, PartialEq, clap::Args)]
pub struct TemplateArgs {
    /// File with a chat template (Jinja) that replaces the model's
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Variable of the chat template, like enable_thinking=false of Qwen3's; a VALUE that is not JSON is text. Can be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    pub chat_template_arg: Vec<TemplateVariable>,
}

impl TemplateArgs {
    /// A hash of what differs from the model's own template, if anything does: other tokens from the same records.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read.
    pub fn identity(&self) -> Result<Option<[u8; 32]>> {
        let Self { chat_template, chat_template_arg } = self;
        if chat_template.is_none() && chat_template_arg.is_empty() {
            return Ok(None);
        }
        let source = chat_template.as_ref().map(|file| std::fs::read(file).map_err(Error::io(file))).transpose()?;
        let mut hash = blake3::Hasher::new();
        hash.update(blake3::hash(&source.unwrap_or_default()).as_bytes());
        hash.update(serde_json::json!(chat_template_arg).to_string().as_bytes());
        Ok(Some(hash.finalize().into()))
    }
}

/// A variable of a template and its value.
pub type TemplateVariable = (String, serde_json::Value);

/// Variables that a template gets in any case.
const OWN: [&str; 2] = ["messages", "add_generation_prompt"];

fn variable(text: &str) -> std::result::Result<TemplateVariable, String> {
    let (name, value) = text.split_once('=').ok_or("it is not NAME=VALUE")?;
    if name.is_empty() || OWN.contains(&name) {
        return Err(format!("\"{name}\" is not a variable that can be set"));
    }
    Ok((name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}

/// The templates in a `tokenizer_config.json`.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
pub(super) struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    /// The only one, or that named `default`.
    pub(super) fn default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(list) => list.into_iter().find(|named| named.name == "default").map(|named| named.template),
        }
    }
}

/// A template with its variables.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    variables: Value,
}

impl ChatTemplate {
    /// Compiles the template in `source`, which came from the file `path`. `special_tokens` are variables, too, as are `own`.
    pub(super) fn new(
        (source, path): (String, &Path),
        special_tokens: &[(&'static str, String)],
        own: &[TemplateVariable],
    ) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        // In Python, nothing that is None can be iterated.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        let compiled = environment.add_template_owned("chat", without_generation_tags(source));
        compiled.map_err(|err| Error::model(path, format!("chat template: {err:#}")))?;
        let absent = ["tools", "documents"].map(|name| (name.to_owned(), Value::from(()))); // as transformers passes them
        let special = special_tokens.iter().map(|(name, text)| ((*name).to_owned(), Value::from(text.as_str())));
        let own = own.iter().map(|(name, value)| (name.clone(), Value::from_serialize(value)));
        Ok(Self { environment, variables: Value::from_iter(absent.into_iter().chain(special).chain(own)) })
    }

    /// Renders messages up to where the model's answer begins.
    pub(super) fn render(&self, messages: &[Message]) -> std::result::Result<String, String> {
        let template = self.environment.get_template("chat").expect("added in new");
        let context = context! { messages, add_generation_prompt => true, ..self.variables.clone() };
        template.render(context).map_err(|err| err.detail().map_or_else(|| err.to_string(), str::to_owned))
    }
}

/// transformers has a tag `generation` around what an assistant says, for masks; of the text it changes nothing.
fn without_generation_tags(source: String) -> String {
    static TAG: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a constant"));
    let block = |found: &Captures<'_>| {
        let tag = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {tag} {}%}}", &found[1], &found[3])
    };
    match TAG.replace_all(&source, block) {
        std::borrow::Cow::Borrowed(_) => source,
        std::borrow::Cow::Owned(replaced) => replaced,
    }
}
