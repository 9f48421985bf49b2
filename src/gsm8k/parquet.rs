//! Reads the rows of parquet files as JSON, nested columns included.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::SerializedFileReader;
use ::parquet::record::Field;
use serde_json::value::RawValue;

use super::Row;
use super::source::{Reader, RowStream};
use crate::error::{Error, Result};
use crate::process::message::note;

/// The rows of a file, numbered from 0.
///
/// # Errors
/// [`Error::Io`] if the file cannot be opened, [`Error::Data`] if it is not a parquet file.
pub fn rows(path: &Path, mut reader: Reader) -> Result<RowStream> {
    let file = File::open(path).map_err(Error::io(path))?;
    let name = path.display().to_string();
    let fault = {
        let name = name.clone();
        move |what: ParquetError| Error::Data(format!("{name}: {what}"))
    };
    let rows = SerializedFileReader::new(file).map_err(&fault)?;
    let mut left_out = BTreeSet::new();
    Ok(Box::new(rows.into_iter().enumerate().map(move |(index, row)| {
        let row = row.map_err(&fault)?;
        let column = |wanted: &str| row.get_column_iter().find(|(column, _)| *column == wanted).map(|(_, value)| value);
        let wrong = |what: String| Error::Record { path: name.clone(), line: index + 1, what };
        let text = |name: &str| match column(name) {
            None | Some(Field::Null) => Ok(None),
            Some(Field::Str(text)) => Ok(Some(text.clone())),
            Some(
                Field::Group(_) | Field::ListInternal(_) | Field::MapInternal(_) | Field::Bytes(_) | Field::Bool(_),
            ) => Err(wrong(format!("column \"{name}\" is neither a text nor a number"))),
            Some(value) => Ok(Some(value.to_string())),
        };
        let said = reader.read(|name| column(name).is_some(), text, wrong)?;
        let mut extra = Vec::new();
        for (column, value) in row.get_column_iter().filter(|(column, _)| !reader.taken().contains(&column.as_str())) {
            match json(value) {
                Some(value) => extra.push((column.clone(), value)),
                None if left_out.insert(column.clone()) => {
                    note("gsm8k-prep", &format!("column \"{column}\" is left out: JSON has no form for bytes"));
                }
                None => {}
            }
        }
        Ok(Row { extra, ..Row::new(index, said.question, said.answer) })
    })))
}

/// A value as JSON, `None` for bytes.
fn json(value: &Field) -> Option<Box<RawValue>> {
    let mut text = String::new();
    write(value, &mut text)?;
    Some(RawValue::from_string(text).expect("what is written is JSON"))
}

fn write(value: &Field, json: &mut String) -> Option<()> {
    match value {
        Field::Null => json.push_str("null"),
        Field::Bool(value) => json.push_str(&value.to_string()),
        Field::Bytes(_) => return None,
        Field::Str(text) => json.push_str(&quoted(text)),
        Field::Group(group) => {
            let fields = group.get_column_iter().map(|(name, value)| (Some(quoted(name)), value));
            list(json, ['{', '}'], fields)?;
        }
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, value)| match key {
                Field::Str(key) => (Some(quoted(key)), value),
                other => (Some(quoted(&other.to_string())), value),
            });
            list(json, ['{', '}'], entries)?;
        }
        Field::ListInternal(values) => {
            list(json, ['[', ']'], values.elements().iter().map(|value| (None, value)))?;
        }
        Field::Float(value) => json.push_str(&serde_json::to_string(value).ok()?),
        Field::Double(value) => json.push_str(&serde_json::to_string(value).ok()?),
        Field::Float16(value) => json.push_str(&serde_json::to_string(&value.to_f32()).ok()?),
        // Decimals and times are strings, as Arrow's own JSON writer has them.
        Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => json.push_str(&quoted(&value.to_string())),
        integer => json.push_str(&integer.to_string()),
    }
    Some(())
}

/// Writes values between brackets, each after its key if it has one.
fn list<'a>(
    json: &mut String,
    ends: [char; 2],
    values: impl Iterator<Item = (Option<String>, &'a Field)>,
) -> Option<()> {
    json.push(ends[0]);
    for (at, (key, value)) in values.enumerate() {
        if at > 0 {
            json.push(',');
        }
        if let Some(key) = key {
            json.push_str(&key);
            json.push(':');
        }
        write(value, json)?;
    }
    json.push(ends[1]);
    Some(())
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string serialises")
}
