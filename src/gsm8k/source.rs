//! Rows from files: .parquet, .jsonl, .jsonl.zst, and directories of them.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::file::reader::SerializedFileReader;
use parquet::record::Field;
use serde_json::value::RawValue;

use super::{Row, Split};
use crate::error::{Error, Result};
use crate::jsonl::Input;

/// What a name on the command line means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file, or `-` for standard input.
    File(PathBuf),
    /// A directory with a file or files for each split.
    Directory(PathBuf),
    /// A data set on the Hub, `owner/name`.
    Hub(String),
}

/// The endings that are read.
const ENDINGS: [&str; 3] = [".parquet", ".jsonl", ".jsonl.zst"];

impl Source {
    /// What is there as a file or directory is that; `owner/name` that is not is a data set; the rest is a file that is missing.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        let path = PathBuf::from(name);
        if path.is_dir() {
            return Self::Directory(path);
        }
        let is_id = name.matches('/').count() == 1 && !name.starts_with(['.', '/', '~']) && !name.ends_with('/');
        if is_id && !path.exists() && ending(name).is_none() { Self::Hub(name.into()) } else { Self::File(path) }
    }
}

/// The published split that a file name speaks of: `train.jsonl`, `test-00000-of-00001.parquet`.
fn split_of_name(name: &str) -> Option<&'static str> {
    ["train", "test"]
        .into_iter()
        .find(|split| name.strip_prefix(split).is_some_and(|rest| rest.starts_with(['.', '-', '_'])))
}

fn ending(name: &str) -> Option<&'static str> {
    ENDINGS.into_iter().find(|ending| name.ends_with(ending))
}

/// The split to read from one file: what is asked for, else what its name says, else train.
///
/// # Errors
/// [`Error::Usage`] when the name speaks of another split than the one asked for.
pub fn split_of_file(path: &Path, asked: Option<Split>) -> Result<Split> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match (asked, split_of_name(&name)) {
        (Some(asked), Some(said)) if asked.published() != said => {
            let what = format!("{}: holds the {said} split by its name, not {}", path.display(), asked.published());
            Err(Error::Usage(what))
        }
        (Some(asked), _) => Ok(asked),
        (None, Some("test")) => Ok(Split::Test),
        (None, _) => Ok(Split::Train),
    }
}

/// A split's files among names in a data set, in the order of their names; a clone of `openai/gsm8k` has them in `main/`.
///
/// # Errors
/// The reason when there are none, or when two formats leave open which is meant.
pub fn files_of_split(names: &[String], split: Split) -> std::result::Result<Vec<String>, String> {
    let split = split.published();
    for folder in ["", "main/"] {
        let in_folder = |name: &&String| name.strip_prefix(folder).is_some_and(|rest| !rest.contains('/'));
        let of_split = |name: &&String| split_of_name(&name[folder.len()..]) == Some(split) && ending(name).is_some();
        let mut found: Vec<String> = names.iter().filter(in_folder).filter(of_split).cloned().collect();
        if found.is_empty() {
            continue;
        }
        found.sort_unstable();
        let formats: BTreeSet<_> = found.iter().filter_map(|name| ending(name)).collect();
        return match formats.len() {
            1 => Ok(found),
            _ => Err(format!("{} are both the {split} split; name the file", found.join(" and "))),
        };
    }
    Err(format!("no file {split}* that ends in {}", ENDINGS.join(" or ")))
}

/// The files of a split in a directory.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Data`] when it has no such files.
pub fn files_in(dir: &Path, split: Split) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for (folder, prefix) in [(dir.to_path_buf(), ""), (dir.join("main"), "main/")] {
        if prefix.is_empty() || folder.is_dir() {
            for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
                let name = entry.map_err(Error::io(&folder))?.file_name();
                names.push(format!("{prefix}{}", name.to_string_lossy()));
            }
        }
    }
    let files = files_of_split(&names, split).map_err(|what| Error::Data(format!("{}: {what}", dir.display())))?;
    Ok(files.into_iter().map(|name| dir.join(name)).collect())
}

/// Rows as they come; the first error is the last item that means anything.
pub type Rows = Box<dyn Iterator<Item = Result<Row>>>;

/// The rows of a file, `-` for JSONL on standard input, numbered from 0.
///
/// # Errors
/// [`Error::Io`] when it cannot be opened, [`Error::Data`] when it is no parquet file.
pub fn rows(path: &Path) -> Result<Rows> {
    if path.extension().is_some_and(|ext| ext == "parquet") {
        return parquet_rows(path);
    }
    let input = Input::open(path)?;
    Ok(Box::new(input.enumerate().map(|(index, line)| {
        let line = line?;
        let record = line.record()?;
        let row = Row::new(index, record.get("question")?, record.get("answer")?);
        Ok(Row { extra: record.other_fields(&["question", "answer"]), ..row })
    })))
}

/// The rows of several files as of one.
///
/// # Errors
/// As [`rows`], for the first file; a later file's errors come when it is reached.
pub fn rows_of_all(files: Vec<PathBuf>) -> Result<Rows> {
    let mut files = files.into_iter();
    let first = files.next().map(|path| rows(&path)).transpose()?;
    let later = files.flat_map(|path| match rows(&path) {
        Ok(rows) => rows,
        Err(err) => Box::new(std::iter::once(Err(err))),
    });
    let numbered = first.into_iter().flatten().chain(later).enumerate();
    Ok(Box::new(numbered.map(|(index, row)| row.map(|row| Row { index, ..row }))))
}

fn parquet_rows(path: &Path) -> Result<Rows> {
    let file = File::open(path).map_err(Error::io(path))?;
    let name = path.display().to_string();
    let fault = {
        let name = name.clone();
        move |what: parquet::errors::ParquetError| Error::Data(format!("{name}: {what}"))
    };
    let reader = SerializedFileReader::new(file).map_err(&fault)?;
    Ok(Box::new(reader.into_iter().enumerate().map(move |(index, columns)| {
        let columns = columns.map_err(&fault)?;
        let text = |wanted: &str| {
            let found = columns.get_column_iter().find(|(column, _)| *column == wanted);
            match found {
                Some((_, Field::Str(text))) => Ok(text.clone()),
                _ => Err(Error::Record {
                    path: name.clone(),
                    line: index + 1,
                    what: format!("no text column \"{wanted}\""),
                }),
            }
        };
        let row = Row::new(index, text("question")?, text("answer")?);
        let extra = columns.get_column_iter().filter(|(column, _)| !["question", "answer"].contains(&column.as_str()));
        let extra = extra.filter_map(|(column, value)| Some((column.clone(), scalar(value)?))).collect();
        Ok(Row { extra, ..row })
    })))
}

/// A column's value as JSON; `None` for what is nested or has no JSON form, which no GSM8K-like set has.
fn scalar(value: &Field) -> Option<Box<RawValue>> {
    let json = match value {
        Field::Null => "null".into(),
        Field::Bool(value) => value.to_string(),
        Field::Int(value) => value.to_string(),
        Field::Long(value) => value.to_string(),
        Field::Double(value) if value.is_finite() => serde_json::to_string(value).ok()?,
        Field::Str(value) => serde_json::to_string(value).ok()?,
        _ => return None,
    };
    RawValue::from_string(json).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.into()).collect()
    }

    #[test]
    fn a_name_is_a_file_a_directory_or_a_data_set() {
        assert_eq!(Source::parse("openai/gsm8k"), Source::Hub("openai/gsm8k".into()));
        assert_eq!(Source::parse("."), Source::Directory(".".into()));
        for file in ["-", "missing", "data/train.jsonl", "./a", "../a", "/a", "a/b/c", "~/a", "a/"] {
            assert_eq!(Source::parse(file), Source::File(file.into()));
        }
    }

    #[test]
    fn a_file_name_that_speaks_of_another_split_is_refused() {
        let split = |name, asked| split_of_file(Path::new(name), asked);
        assert_eq!(split("x/test-00000-of-00001.parquet", None).unwrap(), Split::Test);
        assert_eq!(split("x/train.jsonl", Some(Split::Validation)).unwrap(), Split::Validation);
        assert_eq!(split("testing.jsonl", None).unwrap(), Split::Train);
        assert_eq!(split("mine.jsonl", Some(Split::Test)).unwrap(), Split::Test);
        assert_eq!(split("train.jsonl", Some(Split::Test)).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_splits_files_are_found_in_order_and_doubt_is_an_error() {
        let hub = names(&["README.md", "main/train-1.parquet", "main/train-0.parquet", "socratic/train-0.parquet"]);
        assert_eq!(files_of_split(&hub, Split::Validation).unwrap(), ["main/train-0.parquet", "main/train-1.parquet"]);
        assert!(files_of_split(&hub, Split::Test).unwrap_err().contains("no file test*"));
        assert!(files_of_split(&names(&["train.jsonl", "train.parquet"]), Split::Train).is_err());
    }
}
