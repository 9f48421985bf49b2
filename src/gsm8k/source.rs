//! Reads rows from .parquet and .jsonl files, compressed or not, and from directories of them.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::columns::{AskedColumns, Columns, Found, Said};
use super::{Row, Split, parquet};
use crate::error::{Error, Result};
use crate::lines::jsonl::Input;
use crate::process::message::note;

/// The source of rows that a command line names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowSource {
    /// A file, or `-` for standard input.
    File(PathBuf),
    /// A directory with one or more files per split.
    Directory(PathBuf),
    /// A data set on the Hub, `owner/name`.
    Hub(String),
}

/// The file name endings that can be read.
const ENDINGS: [&str; 5] = [".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json"];

impl RowSource {
    /// An existing path is a file or directory; `owner/name` is otherwise a data set; anything else is a missing file.
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

/// The published split in a file name: `train.jsonl`, `test-00000-of-00001.parquet`.
fn split_of_name(name: &str) -> Option<&'static str> {
    ["train", "test"]
        .into_iter()
        .find(|split| name.strip_prefix(split).is_some_and(|rest| rest.starts_with(['.', '-', '_'])))
}

fn ending(name: &str) -> Option<&'static str> {
    ENDINGS.into_iter().find(|ending| name.ends_with(ending))
}

/// The split to read from one file: the one asked for, else the one in its name, else train.
///
/// # Errors
/// [`Error::Usage`] if the name holds another split than the one asked for.
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

/// The files of a split among the names in a data set, sorted; a clone of `openai/gsm8k` has them in `main/`.
///
/// # Errors
/// The reason if there are none, or if the split exists in two formats.
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
/// [`Error::Io`] if the directory cannot be read, [`Error::Data`] if it has no such files.
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

/// A stream of rows; nothing after the first error means anything.
pub type RowStream = Box<dyn Iterator<Item = Result<Row>>>;

/// The rows of a file, `-` for JSONL on standard input, numbered from 0.
///
/// # Errors
/// [`Error::Io`] if the file cannot be opened, [`Error::Data`] if it is not a parquet file.
pub fn rows(path: &Path, asked: &AskedColumns) -> Result<RowStream> {
    if path.extension().is_some_and(|ext| ext == "parquet") {
        return parquet::rows(path, Reader::new(asked));
    }
    let input = Input::open(path)?;
    let mut reader = Reader::new(asked);
    Ok(Box::new(input.enumerate().map(move |(index, line)| {
        let line = line?;
        let record = line.record()?;
        let text = |name: &str| Ok(record.get_written(name)?.map(Cow::into_owned));
        let said = reader.read(|name| record.has(name), text, |what| record.error(what))?;
        let extra = record.other_fields(&reader.taken());
        Ok(Row { extra, ..Row::new(index, said.question, said.answer) })
    })))
}

/// Reads rows. The first ones decide which columns to take and where the answer stands; a message says so once.
pub(super) struct Reader {
    asked: AskedColumns,
    columns: Option<Columns>,
    place: Option<Found>,
}

impl Reader {
    fn new(asked: &AskedColumns) -> Self {
        Self { asked: asked.clone(), columns: None, place: None }
    }

    pub(super) fn read(
        &mut self,
        has: impl Fn(&str) -> bool,
        text: impl Fn(&str) -> Result<Option<String>>,
        wrong: impl Fn(String) -> Error,
    ) -> Result<Said> {
        let columns = match &mut self.columns {
            Some(columns) => columns,
            none => none.insert(Columns::find(&self.asked, &has).map_err(&wrong)?),
        };
        let said = columns.read(has, text, wrong)?;
        match self.place {
            // In a data set whose answers are marked, an unmarked text is not an answer.
            Some(place) if place != said.found && place != Found::Whole => {
                return Ok(Said { answer: String::new(), found: Found::Nowhere, ..said });
            }
            None if said.found != Found::Nowhere => {
                self.place = Some(said.found);
                columns.describe(said.found).iter().for_each(|words| note("gsm8k-prep", words));
            }
            _ => {}
        }
        Ok(said)
    }

    pub(super) fn taken(&self) -> Vec<&str> {
        self.columns.iter().flat_map(Columns::taken).collect()
    }
}

/// Chains the rows of several files.
///
/// # Errors
/// Those of [`rows`] for the first file; a later file's errors come when it is reached.
pub fn rows_of_all(files: Vec<PathBuf>, asked: &AskedColumns) -> Result<RowStream> {
    let mut files = files.into_iter();
    let first = files.next().map(|path| rows(&path, asked)).transpose()?;
    let asked = asked.clone();
    let later = files.flat_map(move |path| match rows(&path, &asked) {
        Ok(rows) => rows,
        Err(err) => Box::new(std::iter::once(Err(err))),
    });
    let numbered = first.into_iter().flatten().chain(later).enumerate();
    Ok(Box::new(numbered.map(|(index, row)| row.map(|row| Row { index, ..row }))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.into()).collect()
    }

    #[test]
    fn a_name_is_a_file_a_directory_or_a_data_set() {
        assert_eq!(RowSource::parse("openai/gsm8k"), RowSource::Hub("openai/gsm8k".into()));
        assert_eq!(RowSource::parse("."), RowSource::Directory(".".into()));
        for file in ["-", "missing", "data/train.jsonl", "./a", "../a", "/a", "a/b/c", "~/a", "a/"] {
            assert_eq!(RowSource::parse(file), RowSource::File(file.into()));
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
