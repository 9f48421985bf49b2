//! The recipes of runs: what was changed in each, and the commands that make the same run again.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::run::Run;
use crate::run::recipe::{FORK, Recipe, SCORER, SEED};

/// A run's recipe with what it is a change of.
pub struct Pinned {
    recipe: Recipe,
    base: Option<Base>,
}

/// What a recipe was made from.
struct Base {
    recipe: Recipe,
    /// The run that was forked, or the recipe's name.
    name: String,
}

/// A number of the recipes.
#[derive(Debug, Serialize)]
pub struct Row {
    name: String,
    means: &'static str,
    /// Its value in each run, and what it was changed from.
    cells: Vec<(String, Option<String>)>,
    /// Whether it was changed, or differs between the runs.
    differs: bool,
}

impl Pinned {
    /// Reads the recipe of a run, which is compared with that of the run it was forked from, or with the one in `recipes` that it
    /// differs least from. `None` for a directory without a recipe.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Record`] when a recipe is damaged.
    pub fn read(run: &Run, recipes: Option<&Path>) -> Result<Option<Self>> {
        if !run.dir().join("recipe.env").is_file() {
            return Ok(None);
        }
        let recipe = Recipe::of_run(run)?;
        let base = match recipe.get(FORK).rsplit_once('/') {
            Some((old, _)) => {
                let old = run.dir().parent().unwrap_or(Path::new(".")).join(old);
                let there = old.join("recipe.env").is_file();
                let name = recipe.get(FORK).to_owned();
                there.then(|| Recipe::of_run(&Run::new(&old))).transpose()?.map(|recipe| Base { recipe, name })
            }
            None => recipes.map(|dir| nearest(&recipe, dir)).transpose()?.flatten(),
        };
        Ok(Some(Self { recipe, base }))
    }

    /// The value of a number; empty where there is none.
    #[must_use]
    pub fn get(&self, name: &str) -> &str {
        self.recipe.get(name)
    }

    /// What the recipe was compared with: a recipe's name, or a run and its checkpoint.
    #[must_use]
    pub fn base(&self) -> Option<&str> {
        self.base.as_ref().map(|base| base.name.as_str())
    }

    /// The value that a number was changed from.
    fn was(&self, name: &str) -> Option<&str> {
        let was = self.base.as_ref()?.recipe.get(name);
        (!is_own(name) && was != self.recipe.get(name)).then_some(was)
    }

    /// The commands that make the run again under another name.
    #[must_use]
    pub fn commands(&self, run: &str) -> Vec<String> {
        let fork = self.get(FORK).rsplit_once('/');
        let changed = |name: &str| match &self.base {
            Some(_) => self.was(name).is_some(),
            None => !is_own(name),
        };
        let changed = self.recipe.numbers().filter(|(name, ..)| changed(name));
        let mut numbers: Vec<String> = changed.map(|(name, value, _)| format!("{name}={}", quote(value))).collect();
        let scorer = Some(self.get(SCORER)).filter(|scorer| !scorer.is_empty());
        numbers.extend(scorer.map(|scorer| format!("{SCORER}={}", quote(scorer))));
        let numbers = numbers.iter().map(|number| format!(" {number}")).collect::<String>();
        let again = quote(&format!("{run}-again"));
        match (fork, self.base()) {
            (Some((old, from)), _) => vec![
                format!("make fork RUN={} FROM={} NAME={again}{numbers}", quote(old), quote(from)),
                format!("make train NAME={again}"),
            ],
            (None, base) => {
                let recipe = quote(base.unwrap_or("tiny"));
                vec![format!("make train RECIPE={recipe} SEED={} NAME={again}{numbers}", quote(self.get(SEED)))]
            }
        }
    }
}

/// Rows of all numbers that any of the recipes has.
#[must_use]
pub fn rows(recipes: &[&Option<Pinned>]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (name, _, means) in recipes.iter().copied().flatten().flat_map(|pinned| pinned.recipe.numbers()) {
        if rows.iter().any(|row| row.name == name) {
            continue;
        }
        let cell = |pinned: &&Option<Pinned>| match pinned {
            Some(pinned) => (pinned.get(name).to_owned(), pinned.was(name).map(str::to_owned)),
            None => (String::new(), None),
        };
        let cells: Vec<_> = recipes.iter().map(cell).collect();
        let differs = cells.iter().any(|(value, was)| was.is_some() || *value != cells[0].0);
        rows.push(Row { name: name.to_owned(), means, cells, differs });
    }
    rows
}

/// Numbers that are a run's own, and no change of a recipe.
fn is_own(name: &str) -> bool {
    [FORK, SEED, SCORER].contains(&name)
}

/// The recipe in a directory that differs least; the first of several by name.
fn nearest(recipe: &Recipe, dir: &Path) -> Result<Option<Base>> {
    let entries = fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "env"));
    files.sort();
    let mut best: Option<(usize, Base)> = None;
    for file in files {
        let other = Recipe::of_file(&file)?;
        let differs = |(name, value, _): &(&str, &str, &str)| !is_own(name) && other.get(name) != *value;
        let distance = recipe.numbers().filter(differs).count();
        if best.as_ref().is_none_or(|(least, _)| distance < *least) {
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            best = Some((distance, Base { recipe: other, name }));
        }
    }
    Ok(best.map(|(_, base)| base))
}

/// A value as one word of a shell.
fn quote(value: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !value.is_empty() && value.chars().all(is_plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn what_was_changed_is_told_against_the_nearest_recipe_and_given_to_make() {
        let dir = tempfile::tempdir().unwrap();
        let recipes = dir.path().join("recipes");
        write(&recipes.join("far.env"), "STEPS=900\nLOSS=gspo\nBETA=1\n");
        write(&recipes.join("near.env"), "STEPS=150\nLOSS=grpo\nBETA=0\n");
        let run = Run::new(&dir.path().join("runs/x"));
        write(&run.dir().join("recipe.env"), "SEED=7\nSCORER=./a b\nSTEPS=20\nLOSS=grpo\nBETA=0\n");
        let pinned = Pinned::read(&run, Some(&recipes)).unwrap().unwrap();
        assert_eq!(pinned.base(), Some("near"));
        assert_eq!(pinned.commands("x"), ["make train RECIPE=near SEED=7 NAME=x-again STEPS=20 SCORER='./a b'"]);
        let rows = rows(&[&Some(pinned)]);
        let steps = rows.iter().find(|row| row.name == "STEPS").unwrap();
        assert_eq!((steps.differs, &steps.cells[0]), (true, &("20".to_owned(), Some("150".to_owned()))));
        assert_eq!(rows.iter().filter(|row| row.differs).count(), 1);
    }

    #[test]
    fn a_fork_is_told_against_the_run_that_it_began_from() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new] = ["old", "new"].map(|name| Run::new(&dir.path().join(name)));
        write(&old.dir().join("recipe.env"), "SEED=7\nSCORER=\nSTEPS=20\nBETA=0\n");
        write(&new.dir().join("recipe.env"), "FORK=old/step_000010\nSEED=7\nSCORER=\nSTEPS=20\nBETA=0.1\n");
        let pinned = Pinned::read(&new, None).unwrap().unwrap();
        let want = ["make fork RUN=old FROM=step_000010 NAME=new-again BETA=0.1", "make train NAME=new-again"];
        assert_eq!(pinned.commands("new"), want);
        assert!(Pinned::read(&Run::new(dir.path()), None).unwrap().is_none());
    }

    #[test]
    fn words_that_a_shell_would_read_otherwise_are_quoted() {
        assert_eq!(["a=1,b", "", "a b", "it's", "$(x)"].map(quote), ["a=1,b", "''", "'a b'", r"'it'\''s'", "'$(x)'"]);
    }
}
