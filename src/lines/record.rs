//! Reads and writes records: one JSON object per line, whose unknown fields keep their bytes and their order.
//!
//! A value stays the text it came as until it is read, so a stage that adds a field neither parses nor rounds the others. Knows nothing
//! of storage or tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::error::{Error, Result};

/// Most fields of a record. Each is compared with those before it, and a line has room for millions.
const MAX_FIELDS: usize = 4096;

/// One message of a chat prompt, as in TRL's conversational data sets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text.
    pub content: String,
    /// Other fields that a chat template may use, like `name`.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

impl Message {
    /// Makes a message without other fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), others: BTreeMap::new() }
    }
}

/// A line of input, with its place for error messages.
#[derive(Debug, Clone)]
pub struct Line {
    /// The input's name, `-` for standard input.
    pub path: Arc<str>,
    /// Counted from 1.
    pub number: usize,
    /// The JSON text.
    pub text: String,
}

impl Line {
    /// Makes an error that names this line.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::Record { path: self.path.to_string(), line: self.number, what: what.into() }
    }

    /// Parses the line as a record.
    ///
    /// # Errors
    /// [`Error::Record`] when it is not a JSON object.
    pub fn record(&self) -> Result<Record<'_>> {
        match serde_json::from_str::<Fields>(&self.text) {
            Ok(Fields(fields)) => Ok(Record { line: self, fields }),
            Err(err) => Err(self.error(format!("not a JSON object: {err}{}", self.remedy()))),
        }
    }

    /// Says how to convert other common formats to one object per line.
    fn remedy(&self) -> String {
        let text = self.text.trim();
        let is_csv = [".csv", ".tsv"].iter().any(|ending| self.path.ends_with(ending)) || text.contains([',', '\t']);
        let (what, program) = match text.chars().next() {
            Some('[') if self.number == 1 || serde_json::from_str::<IgnoredAny>(text).is_ok() => {
                ("a JSON array becomes", "jq -c '.[]'".to_owned())
            }
            // A line that breaks off elsewhere was cut off.
            Some('{') if text.ends_with(['{', '[', ',']) => ("objects over several lines become", "jq -c .".to_owned()),
            Some(first) if self.number == 1 && first != '{' && is_csv => {
                let between = if text.contains('\t') { ", delimiter='\\t'" } else { "" };
                let rows = format!("csv.DictReader(sys.stdin{between})");
                let program = "import csv, json, sys; [print(json.dumps(row)) for row in";
                ("a CSV file becomes", format!("python3 -c \"{program} {rows}]\""))
            }
            _ => return String::new(),
        };
        let input = if &*self.path == "-" { String::new() } else { format!(" <{}", self.path) };
        format!("; {what} JSONL with: {program}{input}")
    }
}

/// One object of a JSONL stream.
#[derive(Debug, Clone)]
pub struct Record<'a> {
    line: &'a Line,
    fields: Vec<(Cow<'a, str>, Value<'a>)>,
}

type Value<'a> = Cow<'a, RawValue>;

impl<'a> Record<'a> {
    /// Returns the value of a required field.
    ///
    /// # Errors
    /// [`Error::Record`] when it is missing or of another type.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.get_optional(name)?.ok_or_else(|| self.line.error(format!("no field \"{name}\"")))
    }

    /// Returns the value of an optional field; `None` if it is missing or null.
    ///
    /// # Errors
    /// [`Error::Record`] when it is of another type.
    pub fn get_optional<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(raw) = self.raw(name) else {
            return Ok(None);
        };
        serde_json::from_str(raw).map_err(|err| self.wrong(name, &err))
    }

    /// Returns an optional text, without copying it unless it has escapes.
    ///
    /// # Errors
    /// [`Error::Record`] when it is not a string.
    pub fn get_text(&self, name: &str) -> Result<Option<Cow<'a, str>>> {
        let Some((_, Cow::Borrowed(raw))) = self.fields.iter().find(|(key, _)| key == name) else {
            return Ok(self.get_optional::<String>(name)?.map(Cow::Owned));
        };
        let text = serde_json::from_str::<Option<Text<'a>>>(raw.get()).map_err(|err| self.wrong(name, &err))?;
        Ok(text.map(|Text(text)| text))
    }

    /// Returns an optional field that is a text or a number. A number is returned as it is written in the line.
    ///
    /// # Errors
    /// [`Error::Record`] when it is of another type.
    pub fn get_written(&self, name: &str) -> Result<Option<Cow<'a, str>>> {
        match self.raw(name) {
            Some(number) if number.starts_with(|c: char| c == '-' || c.is_ascii_digit()) => {
                Ok(Some(Cow::Owned(number.to_owned())))
            }
            Some(other) if !other.starts_with(['"', 'n']) => {
                Err(self.error(format!("field \"{name}\" is neither a text nor a number")))
            }
            _ => self.get_text(name),
        }
    }

    /// Returns the reference answer: `answer`, else `ground_truth`, else verl's `reward_model.ground_truth`. A number is returned as it is
    /// written.
    ///
    /// # Errors
    /// [`Error::Record`] when it is neither a text nor a number.
    pub fn answer(&self) -> Result<Option<Cow<'a, str>>> {
        for name in ["answer", "ground_truth"] {
            if let Some(answer) = self.get_written(name)? {
                return Ok(Some(answer));
            }
        }
        let model = self.get_optional::<serde_json::Value>("reward_model")?;
        match model.as_ref().and_then(|model| model.get("ground_truth")) {
            None | Some(serde_json::Value::Null) => Ok(None),
            Some(serde_json::Value::String(text)) => Ok(Some(Cow::Owned(text.clone()))),
            Some(serde_json::Value::Number(number)) => Ok(Some(Cow::Owned(number.to_string()))),
            Some(_) => Err(self.error("field \"reward_model\": \"ground_truth\" is neither a text nor a number")),
        }
    }

    /// Whether the field is present, even if null.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.raw(name).is_some()
    }

    /// Whether the field is present and not null.
    #[must_use]
    pub fn has_value(&self, name: &str) -> bool {
        self.raw(name).is_some_and(|value| value != "null")
    }

    /// Returns the fields not in `known`, unparsed, for a stage that makes a new record and carries them over.
    #[must_use]
    pub fn other_fields(&self, known: &[&str]) -> Vec<(String, Box<RawValue>)> {
        let others = self.fields.iter().filter(|(name, _)| !known.contains(&name.as_ref()));
        others.map(|(name, value)| (name.to_string(), RawValue::to_owned(value))).collect()
    }

    /// Adds a field at the end, or replaces its value in place.
    ///
    /// JSON has no NaN and no infinity, and serde_json silently writes them as null, so numbers that can be either are checked where they
    /// are computed.
    pub fn set(&mut self, name: &'static str, value: &(impl Serialize + ?Sized)) {
        let raw = serde_json::value::to_raw_value(value).expect("plain data serialises");
        match self.fields.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = Cow::Owned(raw),
            None => self.fields.push((Cow::Borrowed(name), Cow::Owned(raw))),
        }
    }

    /// Writes the object as one line of JSON, without a line end.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = Vec::with_capacity(self.line.text.len() + 128);
        self.write_json(&mut json);
        json
    }

    /// Appends [`Record::to_json`] to a buffer that many lines share.
    pub fn write_json(&self, json: &mut Vec<u8>) {
        json.push(b'{');
        for (at, (name, value)) in self.fields.iter().enumerate() {
            if at > 0 {
                json.push(b',');
            }
            match name {
                // Borrowed from the line, or from a literal in this program: nothing in it needs an escape.
                Cow::Borrowed(plain) => {
                    json.push(b'"');
                    json.extend_from_slice(plain.as_bytes());
                    json.push(b'"');
                }
                Cow::Owned(escaped) => serde_json::to_writer(&mut *json, escaped).expect("a string serialises"),
            }
            json.push(b':');
            json.extend_from_slice(value.get().as_bytes());
        }
        json.push(b'}');
    }

    /// Makes an error that names this record's line.
    pub fn error(&self, what: impl Into<String>) -> Error {
        self.line.error(what)
    }

    fn wrong(&self, name: &str, err: &serde_json::Error) -> Error {
        self.line.error(format!("field \"{name}\": {err}"))
    }

    fn raw(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.get())
    }
}

struct Fields<'a>(Vec<(Cow<'a, str>, Value<'a>)>);

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Fields<'de>, A::Error> {
                let mut fields: Vec<(Cow<'de, str>, Value<'de>)> = Vec::with_capacity(24);
                while let Some((Text(name), value)) = map.next_entry::<Text<'de>, &'de RawValue>()? {
                    if fields.len() == MAX_FIELDS {
                        return Err(serde::de::Error::custom(format!("more than {MAX_FIELDS} fields")));
                    }
                    if fields.iter().any(|(other, _)| *other == name) {
                        return Err(serde::de::Error::custom(format!("field \"{name}\" occurs twice")));
                    }
                    fields.push((name, Cow::Borrowed(value)));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        Line { path: "in.jsonl".into(), number: 3, text: text.into() }
    }

    #[test]
    fn unknown_fields_keep_their_bytes_and_order() {
        let line = line(r#"{ "b": 1.10, "a":{"x" : [1e3]},"ü\n":null}"#);
        let mut record = line.record().unwrap();
        record.set("reward", &0.5);
        let json = String::from_utf8(record.to_json()).unwrap();
        assert_eq!(json, r#"{"b":1.10,"a":{"x" : [1e3]},"ü\n":null,"reward":0.5}"#);
    }

    #[test]
    fn a_field_set_again_stays_where_it_stood() {
        let line = line(r#"{"reward":1,"z":2}"#);
        let mut record = line.record().unwrap();
        record.set("reward", &2.5);
        assert_eq!(record.to_json(), br#"{"reward":2.5,"z":2}"#);
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let line = line(r#"{"answer": 7}"#);
        let record = line.record().unwrap();
        let wrong_type = record.get::<String>("answer").unwrap_err().to_string();
        assert!(wrong_type.starts_with("in.jsonl:3: field \"answer\": invalid type"), "{wrong_type}");
        let missing = record.get::<String>("prompt").unwrap_err().to_string();
        assert_eq!(missing, "in.jsonl:3: no field \"prompt\"");
    }

    #[test]
    fn a_text_is_copied_only_when_it_has_escapes_or_was_set() {
        let line = line(r#"{"plain":"x","escaped":"x\n","none":null,"number":7}"#);
        let mut record = line.record().unwrap();
        assert!(matches!(record.get_text("plain"), Ok(Some(Cow::Borrowed("x")))));
        assert_eq!(record.get_text("escaped").unwrap().as_deref(), Some("x\n"));
        assert!(record.get_text("none").unwrap().is_none() && record.get_text("absent").unwrap().is_none());
        assert!(record.get_text("number").unwrap_err().to_string().starts_with("in.jsonl:3: field \"number\": "));
        record.set("plain", "y");
        assert_eq!(record.get_text("plain").unwrap().as_deref(), Some("y"));
    }

    #[test]
    fn a_number_is_the_text_that_stands_in_the_line() {
        let line = line(r#"{"a":2.50,"b":-12345678901234567890123,"c":"1,200","d":null,"e":true,"f":[1]}"#);
        let record = line.record().unwrap();
        let written = |name: &str| record.get_written(name).map(|text| text.map(Cow::into_owned));
        assert_eq!(written("a").unwrap().as_deref(), Some("2.50"));
        assert_eq!(written("b").unwrap().as_deref(), Some("-12345678901234567890123"));
        assert_eq!(written("c").unwrap().as_deref(), Some("1,200"));
        assert!(written("d").unwrap().is_none() && written("z").unwrap().is_none());
        for name in ["e", "f"] {
            let message = written(name).unwrap_err().to_string();
            assert_eq!(message, format!("in.jsonl:3: field \"{name}\" is neither a text nor a number"));
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in ["[1]", "{\"a\":1", "{\"a\":1}{", "{\"a\":1,\"a\":2}", "nul"] {
            assert!(line(text).record().is_err(), "{text}");
        }
    }
}
