//! Builds the engine's requests from lines of input.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::ValueEnum;

use crate::checkpoint;
use crate::directory::file_in;
use crate::engine::Request;
use crate::error::{Error, Result};
use crate::gsm8k::prompt::SYSTEM_PROMPT;
use crate::lines::prompt::{Names, Prompt};
use crate::lines::record::{Line, Message, Record};
use crate::process::message::note;
use crate::tokenizer::Tokenizer;

/// What to do with a prompt of too many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LongPrompt {
    /// End with an error that names the prompt
    Refuse,
    /// Leave the prompt out, and report at the end how many were left out
    Skip,
    /// Keep the last tokens of the prompt
    TruncateLeft,
}

/// What a line holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LineFormat {
    /// A record with a [`Prompt`].
    Records,
    /// A question as plain text.
    Questions {
        /// The file of the system prompt; by default the model's `system_prompt.txt`, or without that the XML format of GSM8K.
        system_prompt: Option<PathBuf>,
    },
}

impl LineFormat {
    /// The system prompt before each question, for a model in `dir`; empty for records.
    ///
    /// # Errors
    /// [`Error::Io`] when its file cannot be read.
    pub fn system_prompt(&self, dir: &Path) -> Result<String> {
        let Self::Questions { system_prompt } = self else { return Ok(String::new()) };
        let beside = || Some(file_in(dir, checkpoint::SYSTEM_PROMPT)).filter(|path| path.exists());
        match system_prompt.clone().or_else(beside) {
            Some(path) => std::fs::read_to_string(&path).map_err(Error::io(&path)),
            None => Ok(SYSTEM_PROMPT.into()),
        }
    }
}

/// How lines become prompts.
#[derive(Debug, Clone)]
pub struct PromptOptions {
    /// What a line holds.
    pub format: LineFormat,
    /// Whether a prompt is text that goes to the model as it is, without a chat template.
    pub raw: bool,
    /// What to do with prompts that are too long.
    pub on_long: LongPrompt,
}

/// What the model can take.
#[derive(Debug, Clone, Copy)]
pub struct ModelLimits {
    /// Longest prompt that the options allow (tokens).
    pub prompt_tokens: usize,
    /// Positions that are left beside those of the longest completion.
    pub positions: usize,
    /// Rows of the embedding table.
    pub vocabulary: usize,
}

/// Builds requests from lines.
pub struct RequestBuilder {
    options: PromptOptions,
    system: String,
    /// What makes tokens, and how many; a server does that itself.
    model: Option<(ModelLimits, Arc<Tokenizer>)>,
    names: Names,
    has_left_off: bool,
    skipped: Arc<AtomicUsize>,
}

impl RequestBuilder {
    /// `system` is the system prompt of questions, none if empty; see [`Names::new`] for `unique_among`.
    #[must_use]
    pub fn new(
        options: PromptOptions,
        system: String,
        limits: ModelLimits,
        tokenizer: Arc<Tokenizer>,
        unique_among: Option<usize>,
    ) -> Self {
        let (names, model) = (Names::new(unique_among), Some((limits, tokenizer)));
        Self { options, system, model, names, has_left_off: false, skipped: Arc::default() }
    }

    /// Builds requests without tokens, for a server.
    #[must_use]
    pub fn for_a_server(options: PromptOptions, system: String) -> Self {
        Self { options, system, model: None, names: Names::new(None), has_left_off: false, skipped: Arc::default() }
    }

    /// The number of prompts left out so far, for another thread to read.
    #[must_use]
    pub fn skipped(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.skipped)
    }

    /// The message that comes before each question, if there is one.
    #[must_use]
    pub fn system_message(&self) -> Option<Message> {
        Some(Message::new("system", self.system.as_str())).filter(|system| !system.content.is_empty())
    }

    /// Builds the request of a line; `None` for a prompt that is left out.
    ///
    /// # Errors
    /// [`Error::Record`] when the line has no prompt, its `prompt_id` occurred already, or the prompt is too long.
    pub fn build(&mut self, line: Line) -> Result<Option<Request<Line>>> {
        let line = self.as_record(line);
        let mut record = line.record()?;
        let prompt = Prompt::of(&record)?;
        let prompt_id = self.names.name(&record, &prompt)?;
        if prompt.answer.is_some() && !std::mem::replace(&mut self.has_left_off, true) {
            note("rollout", "the assistant's last message is left off: it is what is sampled");
        }
        let fitted = match &self.model {
            None => Some(Vec::new()),
            Some((limits, tokenizer)) => {
                let tokens = self.tokens(&record, &prompt, tokenizer)?;
                self.fit(&prompt_id, tokens, *limits).map_err(|err| match err {
                    Error::Data(what) => record.error(what),
                    other => other,
                })?
            }
        };
        let Some(tokens) = fitted else {
            self.skipped.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        };
        if !record.has_value("prompt_id") {
            record.set("prompt_id", &prompt_id);
        }
        if !prompt.is_plain && !self.options.raw {
            record.set("prompt", &prompt.messages);
        }
        let text = String::from_utf8(record.to_json()).expect("records are text");
        drop(record);
        Ok(Some(Request { prompt_id, tokens, payload: Line { text, ..line }, own: None }))
    }

    /// Names and tokenizes messages that are no record. Equal messages have equal names.
    ///
    /// # Errors
    /// [`Error::Data`] when they are no prompt, or too long; [`Error::Usage`] as for a line.
    pub fn chat(&self, messages: serde_json::Value) -> Result<(String, Prompt, Vec<u32>)> {
        let prompt = Prompt::of_value(messages).map_err(Error::Data)?;
        let (limits, tokenizer) = self.model.as_ref().expect("only a model answers chats");
        let text = tokenizer.chat(&prompt.messages);
        let tokens = tokenizer.encode(&text.map_err(|what| Error::Data(format!("chat template: {what}")))?)?;
        let prompt_id = prompt.name();
        let tokens = self.fit(&prompt_id, tokens, *limits)?;
        let too_long = || Error::Data(format!("prompt {prompt_id} is too long"));
        Ok((prompt.name(), prompt, tokens.ok_or_else(too_long)?))
    }

    fn tokens(&self, record: &Record<'_>, prompt: &Prompt, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        if !self.options.raw {
            let chat = tokenizer.chat(&prompt.messages);
            return tokenizer.encode(&chat.map_err(|what| record.error(format!("chat template: {what}")))?);
        }
        match record.get_text("prompt") {
            Ok(Some(text)) => tokenizer.encode_raw(&text),
            _ => Err(record.error("--raw takes a \"prompt\" that is a text, not messages")),
        }
    }

    /// Turns a question into a record.
    fn as_record(&self, line: Line) -> Line {
        if self.options.format == LineFormat::Records {
            return line;
        }
        let prompt_id = format!("text/{}", line.number);
        if self.options.raw {
            let text = serde_json::json!({ "prompt_id": prompt_id, "prompt": line.text }).to_string();
            return Line { text, ..line };
        }
        let system = self.system_message();
        let prompt: Vec<Message> = system.into_iter().chain([Message::new("user", line.text.trim())]).collect();
        let text = serde_json::json!({ "prompt_id": prompt_id, "prompt": prompt }).to_string();
        Line { text, ..line }
    }

    /// Checks the tokens, and applies [`LongPrompt`] to those that are too many.
    fn fit(&self, prompt_id: &str, tokens: Vec<u32>, limits: ModelLimits) -> Result<Option<Vec<u32>>> {
        if let Some(id) = tokens.iter().find(|id| **id as usize >= limits.vocabulary) {
            let rows = limits.vocabulary;
            return Err(Error::Usage(format!(
                "the tokenizer gives token {id}, and the model has rows for {rows} only"
            )));
        }
        if tokens.is_empty() {
            return Err(Error::Data(format!("prompt {prompt_id} has no tokens")));
        }
        let (asked, room) = (limits.prompt_tokens, limits.positions);
        let limit = asked.min(room);
        match self.options.on_long {
            _ if tokens.len() <= limit => Ok(Some(tokens)),
            LongPrompt::Skip => Ok(None),
            LongPrompt::TruncateLeft => Ok(Some(tokens[tokens.len() - limit..].to_vec())),
            LongPrompt::Refuse => {
                let most = match asked <= room {
                    true => format!("--max-prompt-tokens allows {asked}"),
                    false => format!("beside --max-completion-tokens the model has room for {room}"),
                };
                let what = format!("prompt {prompt_id} has {} tokens, and {most}", tokens.len());
                Err(Error::Data(format!("{what}; see --on-long-prompt")))
            }
        }
    }
}
