//! Reads a prompt as messages, in the forms of TRL, verl, OpenAI and ShareGPT files.
//!
//! | field | form |
//! |---|---|
//! | `prompt` | messages, or a text, which is one message of the user |
//! | `messages` | messages; if the last one is the assistant's, it is the answer, not part of the prompt |
//! | `conversations` | like `messages`, with `from` (`human`, `gpt`, `system`) and `value` |
//!
//! The first of these fields that a record has is read. ShareGPT's field `system` comes before its conversation. A content is a text, or
//! parts of type `text`, which are joined by line ends, as vLLM's server does. Other fields of a message go to the chat template, as with
//! transformers. Fields that would add more than text (`tools`, `tool_calls`, images, ...) are refused by name.

mod names;

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::lines::record::{Message, Record};

pub use names::Names;

/// The fields that hold a prompt, and whether the assistant's last message in them is an answer to it.
const FIELDS: [(&str, bool); 3] = [("prompt", false), ("messages", true), ("conversations", true)];

/// Fields of a record that transformers, TRL or verl make part of the prompt.
const MORE_THAN_TEXT: [&str; 9] =
    ["tools", "functions", "chat_template_kwargs", "documents", "image", "images", "video", "videos", "audio"];

/// Fields of a message that do.
const MORE_THAN_TEXT_OF_MESSAGES: [&str; 5] = ["tool_calls", "function_call", "image", "images", "audio"];

/// A prompt as messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// At least one; the last is not the assistant's.
    pub messages: Vec<Message>,
    /// The assistant's last message in the record.
    pub answer: Option<String>,
    /// Whether the record has the prompt in this form already.
    pub is_plain: bool,
}

impl Prompt {
    /// Reads the prompt of a record.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when it has none, or one in a form that is not read.
    pub fn of(record: &Record<'_>) -> Result<Self> {
        for name in MORE_THAN_TEXT {
            if record.has_value(name) && record.get_optional::<Value>(name)?.as_ref().is_some_and(is_something) {
                return Err(record.error(format!("field \"{name}\" would be part of the prompt; only text is read")));
            }
        }
        for (name, ends_with_answer) in FIELDS {
            if let Some(value) = record.get_optional::<Value>(name)? {
                let prompt = Self::from_value(value, ends_with_answer);
                let mut prompt = prompt.map_err(|what| record.error(format!("field \"{name}\" {what}")))?;
                let system = if name == "conversations" { record.get_text("system")? } else { None };
                if let Some(system) = system.filter(|text| !text.is_empty() && prompt.messages[0].role != "system") {
                    prompt.messages.insert(0, Message::new("system", system));
                }
                return Ok(Self { is_plain: prompt.is_plain && name == "prompt", ..prompt });
            }
        }
        let none = "no field \"prompt\", \"messages\" or \"conversations\"";
        Err(record.error(format!("{none}; `gsm8k-prep` makes prompts of questions")))
    }

    /// Reads a prompt in the form of the field `prompt`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of_value(value: Value) -> std::result::Result<Self, String> {
        Self::from_value(value, false)
    }

    fn from_value(value: Value, ends_with_answer: bool) -> std::result::Result<Self, String> {
        let list = match value {
            Value::String(text) => {
                let messages = vec![Message::new("user", text)];
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
}

/// A message, and whether it is written as `role` and a text `content`.
fn message(value: Value) -> std::result::Result<(Message, bool), String> {
    let Value::Object(mut fields) = value else { return Err("no object".into()) };
    if let Some(name) = MORE_THAN_TEXT_OF_MESSAGES.iter().find(|name| fields.get(**name).is_some_and(is_something)) {
        return Err(format!("\"{name}\" would be part of the prompt; only text is read"));
    }
    let is_share_gpt = fields.contains_key("from") && !fields.contains_key("role");
    let names = if is_share_gpt { ["from", "value"] } else { ["role", "content"] };
    let written = match fields.remove(names[0]) {
        Some(Value::String(role)) => role,
        _ => return Err(format!("no text \"{}\"", names[0])),
    };
    let role = known_role(&written).ok_or_else(|| {
        format!("\"{}\" is \"{written}\", none of system, developer, user, human, assistant, gpt, tool", names[0])
    })?;
    let is_text = fields.get(names[1]).is_some_and(Value::is_string);
    let content = match fields.remove(names[1]) {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            parts.into_iter().map(part).collect::<std::result::Result<Vec<_>, _>>()?.join("\n")
        }
        _ => return Err(format!("\"{}\" is neither a text nor parts of text", names[1])),
    };
    let others = fields
        .into_iter()
        .filter(|(name, value)| !value.is_null() && !MORE_THAN_TEXT_OF_MESSAGES.contains(&name.as_str()));
    let is_plain = is_text && !is_share_gpt && role == written;
    Ok((Message { others: others.collect(), ..Message::new(role, content) }, is_plain))
}

/// Whether a value is more than the empty one that Arrow, which gives every row all fields, puts where there is none.
fn is_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::String(text) => !["", "[]"].contains(&text.trim()),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// Maps a role to the one that chat templates know. Unknown roles are refused, because templates skip them silently.
fn known_role(name: &str) -> Option<&'static str> {
    Some(match name {
        "system" | "developer" => "system",
        "user" | "human" => "user",
        "assistant" | "gpt" => "assistant",
        "tool" => "tool",
        _ => return None,
    })
}

/// Reads the text of a part of a message.
fn part(value: Value) -> std::result::Result<String, String> {
    let mut fields: Map<String, Value> = match value {
        Value::Object(fields) => fields,
        Value::String(text) => return Ok(text),
        _ => return Err("a part of the content is no object".into()),
    };
    let kind = fields.get("type").and_then(Value::as_str).unwrap_or("text").to_owned();
    match (kind.as_str(), fields.remove("text")) {
        ("text", Some(Value::String(text))) => Ok(text),
        ("text", _) => Err("a part of the content has no \"text\"".into()),
        _ => Err(format!("a part of type \"{kind}\"; only text is read")),
    }
}

/// Reads the text of a record's `completion`: a text, or as in TRL's conversational data one message of the assistant.
///
/// # Errors
/// [`crate::Error::Record`] when it is something else.
pub fn completion<'a>(record: &Record<'a>) -> Result<Option<Cow<'a, str>>> {
    if let Ok(text) = record.get_text("completion") {
        return Ok(text);
    }
    let wrong = |what: String| record.error(format!("field \"completion\" {what}"));
    let Value::Array(list) = record.get("completion")? else {
        return Err(wrong("is neither a text nor a message of the assistant".into()));
    };
    let [value] =
        <[Value; 1]>::try_from(list).map_err(|list| wrong(format!("has {} messages, not one", list.len())))?;
    match message(value).map_err(|what| wrong(format!("message 1: {what}")))?.0 {
        Message { role, content, .. } if role == "assistant" => Ok(Some(Cow::Owned(content))),
        Message { role, .. } => Err(wrong(format!("is a message of \"{role}\", not of the assistant"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::record::Line;

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
        list.iter().map(|(role, content)| Message::new(*role, *content)).collect()
    }

    #[test]
    fn every_form_of_a_prompt_is_the_same_messages() {
        let forms = [
            r#"{"prompt":[{"role":"system","content":"S"},{"role":"user","content":"Q"}]}"#,
            r#"{"prompt":[{"content":"S","role":"system","name":null},{"role":"user","content":[{"type":"text","text":"Q"}]}]}"#,
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
        assert_eq!(read(parts).messages, messages(&[("user", "a \nb")]));
        let system = r#"{"system":"S","conversations":[{"from":"human","value":"Q"}]}"#;
        assert_eq!(read(system).messages, messages(&[("system", "S"), ("user", "Q")]));
        let named = read(r#"{"prompt":[{"role":"user","content":"Q","name":"Ann"}]}"#);
        assert_eq!((named.messages[0].others["name"].as_str(), named.is_plain), (Some("Ann"), true));
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
            (r#"{"conversations":[{"from":"bot","value":"Q"}]}"#, "\"from\" is \"bot\", none of"),
            (r#"{"prompt":"Q","images":["x.png"]}"#, "field \"images\" would be part of the prompt"),
            (r#"{"prompt":"Q","tools":[{"name":"f"}]}"#, "field \"tools\" would be part"),
        ];
        for (text, message) in cases {
            assert!(refused(text).contains(message), "{text}: {}", refused(text));
        }
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
        assert!(read(r#"{"completion":7}"#).unwrap_err().contains("field \"completion\" is neither a text nor"));
        let of_user = read(r#"{"completion":[{"role":"user","content":"A"}]}"#).unwrap_err();
        assert!(of_user.ends_with("field \"completion\" is a message of \"user\", not of the assistant"), "{of_user}");
        let tools = read(r#"{"completion":[{"role":"assistant","content":null,"tool_calls":[{}]}]}"#).unwrap_err();
        assert!(tools.contains("field \"completion\" message 1: \"tool_calls\""), "{tools}");
    }
}
