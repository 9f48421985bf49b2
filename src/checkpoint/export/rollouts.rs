//! Records, such as the rollouts of a run, as a data set on the Hub.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::recipe::Recipe;
use crate::checkpoint::entries;
use crate::checkpoint::hub::push::PushFile;
use crate::error::{Error, Result};
use crate::lines::jsonl::Input;

/// Endings of files of records.
pub const ENDINGS: [&str; 3] = [".jsonl", ".jsonl.zst", ".jsonl.gz"];

/// The files of a data set `name` from `source`, a file of JSONL records or a directory of such files, with a card that is written to
/// `card`.
///
/// # Errors
/// [`Error::Usage`] when there are no such files, [`Error::Record`] when the first record is none, [`Error::Io`].
pub fn files(source: &Path, name: &str, license: Option<&str>, card: &Path) -> Result<Vec<PushFile>> {
    let is_records = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        !name.starts_with('.') && ENDINGS.iter().any(|ending| name.ends_with(ending))
    };
    let mut paths = if source.is_dir() { entries(source)? } else { vec![source.to_path_buf()] };
    paths.retain(is_records);
    paths.sort();
    let Some(first) = paths.first() else {
        let endings = ENDINGS.join(", ");
        return Err(Error::Usage(format!("{}: no file of records ({endings})", source.display())));
    };
    let fields = fields(first)?;
    let resolved = source.canonicalize().map_err(Error::io(source))?;
    let recipe =
        Recipe::beside(if source.is_dir() { resolved.parent() } else { resolved.parent().and_then(Path::parent) });
    fs::write(card, render(name, license, &recipe, &fields)).map_err(Error::io(card))?;
    let named = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        PushFile { name: format!("data/{name}"), path }
    };
    let card = PushFile { path: card.to_path_buf(), name: "README.md".into() };
    Ok([card].into_iter().chain(paths.into_iter().map(named)).collect())
}

/// The fields of the first record.
fn fields(path: &Path) -> Result<Vec<String>> {
    let first = Input::open(path)?.next().ok_or_else(|| Error::Data(format!("{}: empty", path.display())))??;
    let record: Map<String, Value> = serde_json::from_str(&first.text).map_err(|err| first.error(err.to_string()))?;
    Ok(record.keys().cloned().collect())
}

fn render(name: &str, license: Option<&str>, recipe: &Recipe, fields: &[String]) -> String {
    let license = license.map(|license| format!("license: {}\n", Value::from(license))).unwrap_or_default();
    let mut text = format!(
        "---\n{license}task_categories:\n- text-generation\ntags:\n- grpo\n- rollouts\n\
         configs:\n- config_name: default\n  data_files: data/*\n---\n\n\
         # {name}\n\nCompletions sampled with grpo-pipes {}, one JSON record per line.\n",
        env!("CARGO_PKG_VERSION"),
    );
    let mut line = |words: std::fmt::Arguments<'_>| writeln!(text, "{words}").expect("a string takes all");
    if let Some(model) = recipe.base_model() {
        line(format_args!("\nThe run began from [{model}](https://huggingface.co/{model})."));
    }
    if let Some(data) = recipe.data_set() {
        line(format_args!("\nIts problems are from [{data}](https://huggingface.co/datasets/{data})."));
    }
    let fields: Vec<String> = fields.iter().map(|field| format!("`{field}`")).collect();
    line(format_args!("\nFields of a record: {}.", fields.join(", ")));
    recipe.table(&mut line);
    text
}
