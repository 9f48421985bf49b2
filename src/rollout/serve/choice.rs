//! A completion on its way to a client: tokens in, text out, up to a stop text.

use std::sync::Arc;

use serde_json::{Value, json};

use super::api::ChatRequest;
use crate::engine::Heard;
use crate::error::Result;
use crate::tokenizer::{TextStream, Tokenizer, unfinished_mark};

/// One of a request's completions.
pub struct Choice {
    tokenizer: Arc<Tokenizer>,
    decoder: TextStream,
    stops: Arc<[String]>,
    text: String,
    /// What of the text can be no part of a stop text (bytes).
    safe: usize,
    /// What of it was sent (bytes).
    sent: usize,
    /// Log-probabilities that were not sent yet, if they are wanted.
    logprobs: Option<Vec<Value>>,
    /// The tokens, if they are wanted.
    token_ids: Option<Vec<u32>>,
    /// Tokens sampled.
    pub tokens: usize,
    /// Why it ended: `stop` or `length`.
    pub finish_reason: Option<&'static str>,
}

impl Choice {
    /// Starts with no token.
    #[must_use]
    pub fn new(tokenizer: &Arc<Tokenizer>, stops: &Arc<[String]>, chat: &ChatRequest) -> Self {
        Self {
            tokenizer: Arc::clone(tokenizer),
            decoder: TextStream::new(tokenizer),
            stops: Arc::clone(stops),
            text: String::new(),
            safe: 0,
            sent: 0,
            logprobs: chat.logprobs.then(Vec::new),
            token_ids: chat.token_ids.then(Vec::new),
            tokens: 0,
            finish_reason: None,
        }
    }

    /// Adds a token, unless the completion has ended.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn hear(&mut self, heard: Heard) -> Result<()> {
        if self.finish_reason.is_some() {
            return Ok(());
        }
        self.tokens += 1;
        if heard.end != Some(true) {
            self.text += &self.decoder.push(heard.token)?;
        }
        // OpenAI's end token has none; with ids each token has one.
        if let Some(logprobs) = &mut self.logprobs
            && (heard.end != Some(true) || self.token_ids.is_some())
        {
            logprobs.push(logprob(&self.tokenizer.decode(&[heard.token])?, heard.logprob));
        }
        if let Some(ids) = &mut self.token_ids {
            ids.push(heard.token);
        }
        if heard.end.is_some() {
            self.text += &self.decoder.finish()?;
        }
        self.finish_reason = heard.end.map(|is_stop| if is_stop { "stop" } else { "length" });
        let found = self.stops.iter().filter_map(|stop| self.text[self.safe..].find(stop.as_str())).min();
        if let Some(at) = found {
            self.text.truncate(self.safe + at);
            self.finish_reason = Some("stop");
        }
        let held = if self.finish_reason.is_some() { 0 } else { unfinished_mark(&self.text, &self.stops) };
        self.safe = self.text.len() - held;
        Ok(())
    }

    /// The text that can be sent, and was not yet.
    pub fn take_text(&mut self) -> &str {
        let from = std::mem::replace(&mut self.sent, self.safe);
        &self.text[from..self.safe]
    }

    /// The ids of all tokens, if they are wanted.
    pub fn token_ids(&self) -> Option<&[u32]> {
        self.token_ids.as_deref()
    }

    /// The log-probabilities that were not sent yet, in OpenAI's form; null if none are wanted.
    pub fn take_logprobs(&mut self) -> Value {
        match &mut self.logprobs {
            Some(logprobs) => json!({ "content": std::mem::take(logprobs), "refusal": null }),
            None => Value::Null,
        }
    }
}

fn logprob(text: &str, logprob: f32) -> Value {
    let bytes = (!text.contains('\u{fffd}')).then_some(text.as_bytes());
    json!({ "token": text, "logprob": logprob, "bytes": bytes, "top_logprobs": [] })
}
