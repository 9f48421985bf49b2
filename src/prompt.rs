//! What people call a prompt, as messages: the forms of TRL, verl, OpenAI and ShareGPT files.
//!
//! | field | form |
//! |---|---|
//! | `prompt` | messages, or a text: one message of the user |
//! | `messages` | messages; the assistant's last one is no part of the prompt, but its answer |
//! | `conversations` | the same with `from` (`human`, `gpt`, `system`) and `value` |
//!
//! The first of these fields that a record has counts. A content is a text, or parts of type `text`, which are joined. What a chat
//! template would have to see besides (`tools`, `tool_calls`, ...) is refused by its name.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Result;
use crate::record::{Line, Message, Record};

/// The fields that hold a prompt, and whether the assistant's last message in them is an answer to it.
const FIELDS: [(&str, bool); 3] = [("prompt", false), ("messages", true), ("conversations", true)];

/// What a message may have that templates show to the model, and this program does not.
const SHOWN: [&str; 6] = ["tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "audio"];

/// Hexadecimal digits of an id made of a prompt.
const ID_DIGITS: usize = 16;

/// A prompt as messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// At least one; the last is not the assistant's.
    pub messages: Vec<Message>,
    /// What the assistant says in the record.
    pub answer: Option<String>,
    /// Whether the record has it in this form already.
    pub is_plain: bool,
}

impl Prompt {
    /// The prompt of a record.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when it has none, or one of a form that is not read.
    pub fn of(record: &Record<'_>) -> Result<Self> {
        let is_empty = |value: &Value| matches!(value, Value::Null) || value.as_array().is_some_and(Vec::is_empty);
        if record.get_optional::<Value>("tools")?.is_some_and(|tools| !is_empty(&tools)) {
            return Err(record.error("field \"tools\" is not passed to the chat template; take it out"));
        }
        for (name, ends_with_answer) in FIELDS {
            if let Some(value) = record.get_optional::<Value>(name)? {
                let prompt = Self::from_value(value, ends_with_answer);
                let prompt = prompt.map_err(|what| record.error(format!("field \"{name}\" {what}")))?;
                return Ok(Self { is_plain: prompt.is_plain && name == "prompt", ..prompt });
            }
        }
        Err(record.error("no field \"prompt\", \"messages\" or \"conversations\""))
    }

    fn from_value(value: Value, ends_with_answer: bool) -> std::result::Result<Self, String> {
        let list = match value {
            Value::String(text) => {
                let messages = vec![Message { role: "user".into(), content: text }];
                return Ok(Self { messages, answer: None, is_plain: false });
            }
            Value::Array(list) => list,
            _ => return Err("is neither a text nor messages".into()),
        };
        let mut is_plain = true;
        let mut messages = Vec::with_capacity(list.len());
        for (at, value) in list.into_iter().enumerate() {
            let (message, plain) = message(value).map_err(|what| format!("message {}: {what}", at + 1))?;
            is_plain &= plain;
            messages.push(message);
        }
        let answer = messages.pop_if(|last| ends_with_answer && last.role == "assistant").map(|last| last.content);
        match messages.last() {
            None => Err("holds no message".into()),
            Some(last) if last.role == "assistant" => {
                Err("ends with a message of the assistant; a prompt ends with what is answered".into())
            }
            Some(_) => Ok(Self { messages, answer, is_plain }),
        }
    }

    /// A name that is the same wherever the prompt stands.
    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for text in self.messages.iter().flat_map(|message| [&message.role, &message.content]) {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        hasher.finalize().to_hex()[..ID_DIGITS].to_owned()
    }
}

/// A message, and whether it is written as `role` and a text `content`.
fn message(value: Value) -> std::result::Result<(Message, bool), String> {
    let Value::Object(mut fields) = value else { return Err("no object".into()) };
    if let Some(name) = SHOWN.iter().find(|name| fields.get(**name).is_some_and(is_something)) {
        return Err(format!("\"{name}\" is not passed to the chat template; take it out"));
    }
    let is_share_gpt = fields.contains_key("from") && !fields.contains_key("role");
    let (role, content) = if is_share_gpt { ("from", "value") } else { ("role", "content") };
    let role = match fields.remove(role) {
        Some(Value::String(role)) => role,
        _ => return Err(format!("no text \"{role}\"")),
    };
    let role = if is_share_gpt { role_of_sender(&role)?.to_owned() } else { role };
    let is_text = fields.get(content).is_some_and(Value::is_string);
    let content = match fields.remove(content) {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts.into_iter().map(part).collect::<std::result::Result<_, _>>()?,
        _ => return Err(format!("\"{content}\" is neither a text nor parts of text")),
    };
    Ok((Message { role, content }, is_text && !is_share_gpt))
}

fn is_something(value: &Value) -> bool {
    !matches!(value, Value::Null) && value.as_array().is_none_or(|list| !list.is_empty())
}

fn role_of_sender(from: &str) -> std::result::Result<&str, String> {
    match from {
        "human" | "user" => Ok("user"),
        "gpt" | "assistant" => Ok("assistant"),
        "system" => Ok("system"),
        other => Err(format!("\"from\" is \"{other}\"; human, gpt and system are read")),
    }
}

/// The text of a part.
fn part(value: Value) -> std::result::Result<String, String> {
    let mut fields: Map<String, Value> = match value {
        Value::Object(fields) => fields,
        Value::String(text) => return Ok(text),
        _ => return Err("a part of \"content\" is no object".into()),
    };
    let kind = fields.get("type").and_then(Value::as_str).unwrap_or("text").to_owned();
    match (kind.as_str(), fields.remove("text")) {
        ("text", Some(Value::String(text))) => Ok(text),
        ("text", _) => Err("a part of \"content\" has no \"text\"".into()),
        _ => Err(format!("a part of type \"{kind}\"; only text is read")),
    }
}

/// The text of a record's `completion`, which TRL's conversational data has as a message of the assistant.
///
/// # Errors
/// [`crate::Error::Record`] when it is neither a text nor one message.
pub fn completion<'a>(record: &Record<'a>) -> Result<Option<Cow<'a, str>>> {
    if let Ok(text) = record.get_text("completion") {
        return Ok(text);
    }
    let wrong = |what: String| record.error(format!("field \"completion\" {what}"));
    let list: Vec<Value> = record.get("completion")?;
    let [value] =
        <[Value; 1]>::try_from(list).map_err(|list| wrong(format!("has {} messages, not one", list.len())))?;
    Ok(Some(Cow::Owned(message(value).map_err(wrong)?.0.content)))
}

/// The names of prompts: those that records give them, or for the others a hash, with a number behind it where a prompt comes again.
#[derive(Debug, Default)]
pub struct Ids {
    seen: HashMap<String, u64>,
}

impl Ids {
    /// The name of the next record's prompt. Each record must have its turn, in their order, whether its name is needed or not.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when it has neither a name nor a prompt.
    pub fn next(&mut self, record: &Record<'_>) -> Result<String> {
        match record.get_optional::<Id>("prompt_id")? {
            Some(Id(id)) => Ok(id),
            None => Ok(self.name(&Prompt::of(record)?)),
        }
    }

    /// The same, where the prompt is known already.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when the name is no text.
    pub fn next_of(&mut self, record: &Record<'_>, prompt: &Prompt) -> Result<String> {
        let given = record.get_optional::<Id>("prompt_id")?;
        Ok(given.map_or_else(|| self.name(prompt), |Id(id)| id))
    }

    /// Passes over a line.
    ///
    /// # Errors
    /// As [`Ids::next`].
    pub fn pass(&mut self, line: &Line) -> Result<()> {
        self.next(&line.record()?).map(drop)
    }

    fn name(&mut self, prompt: &Prompt) -> String {
        let digest = prompt.digest();
        let count = self.seen.entry(digest.clone()).or_default();
        *count += 1;
        if *count == 1 { digest } else { format!("{digest}-{count}") }
    }
}

#[derive(Deserialize)]
struct Id(String);

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        Line { path: "in".into(), number: 1, text: text.into() }
    }

    fn read(text: &str) -> Prompt {
        Prompt::of(&line(text).record().unwrap()).unwrap()
    }

    fn refused(text: &str) -> String {
        Prompt::of(&line(text).record().unwrap()).unwrap_err().to_string()
    }

    fn messages(list: &[(&str, &str)]) -> Vec<Message> {
        list.iter().map(|(role, content)| Message { role: (*role).into(), content: (*content).into() }).collect()
    }

    #[test]
    fn every_form_of_a_prompt_is_the_same_messages() {
        let forms = [
            r#"{"prompt":[{"role":"system","content":"S"},{"role":"user","content":"Q"}]}"#,
            r#"{"prompt":[{"content":"S","role":"system","name":"x"},{"role":"user","content":[{"type":"text","text":"Q"}]}]}"#,
            r#"{"messages":[{"role":"system","content":"S"},{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#,
            r#"{"conversations":[{"from":"system","value":"S"},{"from":"human","value":"Q"},{"from":"gpt","value":"A"}]}"#,
            r#"{"prompt":null,"tools":[],"conversations":[{"role":"system","content":"S"},{"role":"user","content":["Q"]}]}"#,
        ];
        for form in forms {
            let prompt = read(form);
            assert_eq!(prompt.messages, messages(&[("system", "S"), ("user", "Q")]), "{form}");
            assert_eq!(prompt.answer.as_deref(), form.contains("\"A\"").then_some("A"), "{form}");
            assert_eq!(prompt.is_plain, form == forms[0], "{form}");
        }
        assert_eq!(read(r#"{"prompt":"Q"}"#).messages, messages(&[("user", "Q")]));
        let parts =
            r#"{"prompt":[{"role":"user","content":[{"type":"text","text":"a "},{"type":"text","text":"b"}]}]}"#;
        assert_eq!(read(parts).messages, messages(&[("user", "a b")]));
    }

    #[test]
    fn what_is_no_prompt_is_refused_with_the_field_and_the_message() {
        let cases = [
            (r#"{"question":"Q"}"#, "in:1: no field \"prompt\", \"messages\" or \"conversations\""),
            (r#"{"prompt":7}"#, "field \"prompt\" is neither a text nor messages"),
            (r#"{"prompt":[]}"#, "field \"prompt\" holds no message"),
            (r#"{"messages":[{"role":"assistant","content":"A"}]}"#, "field \"messages\" holds no message"),
            (r#"{"prompt":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#, "ends with a message"),
            (r#"{"prompt":[{"role":"user"}]}"#, "message 1: \"content\" is neither"),
            (r#"{"prompt":[{"content":"Q"}]}"#, "message 1: no text \"role\""),
            (r#"{"prompt":["Q"]}"#, "message 1: no object"),
            (
                r#"{"prompt":[{"role":"user","content":[{"type":"image_url","image_url":"x"}]}]}"#,
                "a part of type \"image_url\"",
            ),
            (
                r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","tool_calls":[{}]}]}"#,
                "message 2: \"tool_calls\"",
            ),
            (r#"{"conversations":[{"from":"bot","value":"Q"}]}"#, "\"from\" is \"bot\""),
            (r#"{"prompt":"Q","tools":[{"name":"f"}]}"#, "field \"tools\" is not passed"),
        ];
        for (text, message) in cases {
            assert!(refused(text).contains(message), "{text}: {}", refused(text));
        }
    }

    #[test]
    fn a_prompt_without_an_id_is_named_by_its_hash_and_by_a_number_where_it_comes_again() {
        let mut ids = Ids::default();
        let mut next = |text: &str| ids.next(&line(text).record().unwrap()).unwrap();
        let first = next(r#"{"prompt":"Q","id":3}"#);
        assert_eq!(first.len(), 16);
        assert_eq!(next(r#"{"messages":[{"role":"user","content":"Q"}]}"#), format!("{first}-2"));
        assert_ne!(next(r#"{"prompt":"R"}"#), first);
        assert_eq!(next(r#"{"prompt_id":"mine","prompt":"Q"}"#), "mine");
        assert_eq!(next(r#"{"prompt":[{"role":"user","content":"Q"}]}"#), format!("{first}-3"));
        assert_eq!(Ids::default().next(&line(r#"{"prompt":"Q"}"#).record().unwrap()).unwrap(), first);
        assert!(Ids::default().next(&line(r#"{"prompt_id":7,"prompt":"Q"}"#).record().unwrap()).is_err());
    }

    #[test]
    fn a_completion_is_a_text_or_the_assistants_message() {
        let read = |text: &str| {
            let line = line(text);
            completion(&line.record().unwrap()).map(|text| text.map(Cow::into_owned)).map_err(|err| err.to_string())
        };
        assert_eq!(read(r#"{"completion":"A"}"#), Ok(Some("A".into())));
        assert_eq!(read(r#"{"completion":[{"role":"assistant","content":"A"}]}"#), Ok(Some("A".into())));
        assert_eq!(read("{}"), Ok(None));
        assert!(read(r#"{"completion":[]}"#).unwrap_err().ends_with("has 0 messages, not one"));
        assert!(read(r#"{"completion":7}"#).unwrap_err().contains("field \"completion\""));
    }
}
