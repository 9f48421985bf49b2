//! Lines of input as requests to the engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::ValueEnum;

use crate::engine::Request;
use crate::error::{Error, Result};
use crate::lines::prompt::{Names, Prompt};
use crate::lines::record::{Line, Message, Record};
use crate::process::message::note;
use crate::tokenizer::Tokenizer;

/// What to do with a prompt of too many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LongPrompt {
    /// End with an error that names it
    Refuse,
    /// Leave it out, and say at the end how many were
    Skip,
    /// Keep its last tokens
    TruncateLeft,
}

/// What a line holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// A record with a [`Prompt`].
    Records,
    /// A question.
    Text {
        /// Comes before each question; none when empty.
        system: String,
    },
}

/// How lines become prompts.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// What a line holds.
    pub format: Format,
    /// Whether a prompt is a text that goes to the model as it is, not messages in its chat template.
    pub raw: bool,
    /// Longest prompt [tokens].
    pub max_tokens: usize,
    /// What to do with longer ones.
    pub on_long: LongPrompt,
}

/// What the model can take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Positions besides those of the completion.
    pub positions: usize,
    /// Rows of its embedding table.
    pub vocabulary: usize,
}

/// Makes requests of lines.
pub struct Source {
    prompts: Prompts,
    limits: Limits,
    tokenizer: Arc<Tokenizer>,
    names: Names,
    has_left_off: bool,
    skipped: Arc<AtomicUsize>,
}

impl Source {
    /// Nothing read yet; see [`Names::new`] for `unique_among`.
    #[must_use]
    pub fn new(prompts: Prompts, limits: Limits, tokenizer: Arc<Tokenizer>, unique_among: Option<usize>) -> Self {
        let names = Names::new(unique_among);
        Self { prompts, limits, tokenizer, names, has_left_off: false, skipped: Arc::default() }
    }

    /// The number of prompts left out so far, readable while another thread goes on.
    #[must_use]
    pub fn skipped(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.skipped)
    }

    /// The request of a line, `None` for one that is left out.
    ///
    /// # Errors
    /// [`Error::Record`] when the line is no prompt, occurred already, or is too long for what was asked.
    pub fn request(&mut self, line: Line) -> Result<Option<Request<Line>>> {
        let line = self.as_record(line)?;
        let mut record = line.record()?;
        let prompt = Prompt::of(&record)?;
        let prompt_id = self.names.name(&record, &prompt)?;
        if prompt.answer.is_some() && !std::mem::replace(&mut self.has_left_off, true) {
            note("rollout", "the assistant's last message is left off: it is what is sampled");
        }
        let tokens = self.tokens(&record, &prompt)?;
        let Some(tokens) = self.fit(&prompt_id, tokens, &record)? else {
            self.skipped.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        };
        if !record.has_value("prompt_id") {
            record.set("prompt_id", &prompt_id);
        }
        if !prompt.is_plain && !self.prompts.raw {
            record.set("prompt", &prompt.messages);
        }
        let text = String::from_utf8(record.to_json()).expect("records are text");
        drop(record);
        Ok(Some(Request { prompt_id, tokens, payload: Line { text, ..line } }))
    }

    fn tokens(&self, record: &Record<'_>, prompt: &Prompt) -> Result<Vec<u32>> {
        if !self.prompts.raw {
            let chat = self.tokenizer.chat(&prompt.messages);
            return self.tokenizer.encode(&chat.map_err(|what| record.error(format!("chat template: {what}")))?);
        }
        match record.get_text("prompt") {
            Ok(Some(text)) => self.tokenizer.encode_raw(&text),
            _ => Err(record.error("--raw takes a \"prompt\" that is a text, not messages")),
        }
    }

    /// A question becomes the record it stands for.
    fn as_record(&self, line: Line) -> Result<Line> {
        let Format::Text { system } = &self.prompts.format else {
            return Ok(line);
        };
        let prompt_id = format!("text/{}", line.number);
        if self.prompts.raw {
            let text = serde_json::json!({ "prompt_id": prompt_id, "prompt": line.text }).to_string();
            return Ok(Line { text, ..line });
        }
        let system = Some(Message::new("system", system)).filter(|system| !system.content.is_empty());
        let prompt: Vec<Message> = system.into_iter().chain([Message::new("user", line.text.trim())]).collect();
        let text = serde_json::json!({ "prompt_id": prompt_id, "prompt": prompt }).to_string();
        Ok(Line { text, ..line })
    }

    /// The tokens, cut or refused where they are too many.
    fn fit(&self, prompt_id: &str, tokens: Vec<u32>, record: &Record<'_>) -> Result<Option<Vec<u32>>> {
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.limits.vocabulary) {
            let rows = self.limits.vocabulary;
            return Err(Error::Usage(format!(
                "the tokenizer gives token {id}, and the model has rows for {rows} only"
            )));
        }
        if tokens.is_empty() {
            return Err(record.error(format!("prompt {prompt_id} has no tokens")));
        }
        let (limit, reason) = if self.prompts.max_tokens <= self.limits.positions {
            (self.prompts.max_tokens, "--max-prompt-tokens allows")
        } else {
            (self.limits.positions, "the model's positions leave beside --max-completion-tokens:")
        };
        match self.prompts.on_long {
            _ if tokens.len() <= limit => Ok(Some(tokens)),
            LongPrompt::Skip => Ok(None),
            LongPrompt::TruncateLeft => Ok(Some(tokens[tokens.len() - limit..].to_vec())),
            LongPrompt::Refuse => {
                let what = format!("prompt {prompt_id} has {} tokens, {reason} {limit}", tokens.len());
                Err(record.error(format!("{what}; see --on-long-prompt")))
            }
        }
    }
}
