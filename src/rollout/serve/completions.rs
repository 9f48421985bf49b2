//! Answers with completions: whole, or as events while they are sampled.

use std::io;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::answers::Answers;
use super::api::ChatRequest;
use super::choice::Choice;
use super::http::Connection;
use super::service::{Broken, stopping};

/// How often a client is looked after while it waits.
const LOOK: Duration = Duration::from_millis(100);

/// What all parts of an answer have.
pub struct Completions<'a> {
    /// The answer's own name.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: &'a str,
    /// The id of its weights.
    pub policy_id: &'a str,
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
}

impl Completions<'_> {
    /// Sends all completions when the last has ended.
    ///
    /// # Errors
    /// Why the answer ends early.
    pub fn send_whole(
        &self,
        mut choices: Vec<Choice>,
        (answers, connection): (Answers, &mut Connection),
    ) -> Result<(), Broken> {
        follow(&answers, connection, &mut choices, |_, _| Ok(()))?;
        let usage = self.usage(&choices);
        let with_ids = choices.iter().any(|choice| choice.token_ids().is_some());
        let choices = choices.iter_mut().enumerate().map(|(index, choice)| {
            let logprobs = choice.take_logprobs();
            let finish_reason = choice.finish_reason;
            let message = json!({ "role": "assistant", "content": choice.take_text(), "refusal": null });
            let mut body =
                json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason });
            if let Some(ids) = choice.token_ids() {
                body["token_ids"] = ids.into();
            }
            body
        });
        let mut body = self.head("chat.completion", choices.collect());
        if with_ids {
            body["prompt_token_ids"] = json!(self.prompt);
        }
        body["usage"] = usage;
        Ok(connection.respond(200, &[], body.to_string().as_bytes())?)
    }

    /// Sends each completion as it is sampled.
    ///
    /// # Errors
    /// When the client is gone.
    pub fn send_events(
        &self,
        chat: &ChatRequest,
        mut choices: Vec<Choice>,
        (answers, connection): (Answers, &mut Connection),
    ) -> Result<(), Broken> {
        let event = |choices: Vec<Value>, usage: Option<Value>| {
            let mut body = self.head("chat.completion.chunk", choices);
            if chat.stream_usage {
                body["usage"] = usage.unwrap_or_default();
            }
            format!("data: {body}\n\n")
        };
        let delta = |index: usize, delta: Value, logprobs: Value, finish_reason: Option<&str>| json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason });
        connection.begin_events()?;
        let role = || json!({ "role": "assistant", "content": "" });
        let first = (0..choices.len()).map(|index| event(vec![delta(index, role(), Value::Null, None)], None));
        connection.send_events(&first.collect::<String>())?;
        let mut ended = vec![false; choices.len()];
        let followed = follow(&answers, connection, &mut choices, |choices, connection| {
            let mut events = String::new();
            for (index, choice) in choices.iter_mut().enumerate() {
                if std::mem::replace(&mut ended[index], choice.finish_reason.is_some()) {
                    continue;
                }
                let (finish, logprobs) = (choice.finish_reason, choice.take_logprobs());
                let text = choice.take_text();
                let has_logprobs = logprobs["content"].as_array().is_some_and(|list| !list.is_empty());
                if !text.is_empty() || has_logprobs {
                    events += &event(vec![delta(index, json!({ "content": text }), logprobs, None)], None);
                }
                if finish.is_some() {
                    events += &event(vec![delta(index, json!({}), Value::Null, finish)], None);
                }
            }
            if events.is_empty() { Ok(()) } else { connection.send_events(&events) }
        });
        match followed {
            Ok(()) if chat.stream_usage => connection.send_events(&event(Vec::new(), Some(self.usage(&choices))))?,
            Ok(()) => {}
            Err(Broken::Refused(refusal)) => {
                let body = String::from_utf8_lossy(&refusal.body()).into_owned();
                connection.send_events(&format!("data: {body}\n\n"))?;
            }
            Err(gone) => return Err(gone),
        }
        connection.send_events("data: [DONE]\n\n")?;
        Ok(connection.end_events()?)
    }

    fn head(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.policy_id,
            "choices": choices,
        })
    }

    fn usage(&self, choices: &[Choice]) -> Value {
        let (prompt, completion) = (self.prompt.len(), choices.iter().map(|choice| choice.tokens).sum::<usize>());
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
    }
}

/// Takes tokens until all completions have ended. `report` is called when there is something new.
fn follow(
    answers: &Answers,
    connection: &mut Connection,
    choices: &mut [Choice],
    mut report: impl FnMut(&mut [Choice], &mut Connection) -> io::Result<()>,
) -> Result<(), Broken> {
    let mut looked = Instant::now();
    while choices.iter().any(|choice| choice.finish_reason.is_none()) {
        match answers.tokens.recv_timeout(LOOK) {
            Ok(first) => {
                for heard in std::iter::once(first).chain(answers.tokens.try_iter()) {
                    let choice = &mut choices[heard.sample];
                    choice.hear(heard)?;
                    if choice.finish_reason.is_some() {
                        answers.end(heard.sample);
                    }
                }
                report(choices, connection)?;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Broken::Refused(stopping())),
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if connection.is_closed() {
                return Err(Broken::Gone(io::ErrorKind::BrokenPipe.into()));
            }
        }
    }
    Ok(())
}
