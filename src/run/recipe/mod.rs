//! Reads the recipe of a run, and refuses to continue the run with other numbers.
//!
//! A recipe is a file of lines `NAME=VALUE  # comment`; an environment variable of the same name overrides it. A recipe is data,
//! wherever it comes from: every line must hold a known name and a value of its kind.

mod names;
pub mod options;

use std::fs;
use std::path::{Path, PathBuf};

use super::{Run, step_name, step_of};
use crate::checkpoint::entries;
use crate::error::{Error, Result};
use crate::lines::jsonl::Output;
use names::{NAMES, check};

/// Where a fork began: a run and its checkpoint.
pub const FORK: &str = "FORK";
/// The seed of everything random.
pub const SEED: &str = "SEED";
/// The command in the place of `score`.
pub const SCORER: &str = "SCORER";
/// The steps of a run.
pub const STEPS: &str = "STEPS";
pub(super) const PROMPTS_PER_STEP: &str = "PROMPTS_PER_STEP";
pub(super) const DYNAMIC_SAMPLING: &str = "DYNAMIC_SAMPLING";

/// Names with their values, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe(pub(super) Vec<(String, String)>);

/// Makes the directory of a run and pins the recipe in `file` there, or compares it with the one pinned before. Without a file, and for a
/// fork, which has no other recipe, the pinned one is read. `say` gets each difference.
///
/// # Errors
/// [`Error::Usage`] when there is no such recipe or run, a value of the environment is refused, or the run began with other numbers;
/// [`Error::Record`] and [`Error::Data`] when the file is no recipe; [`Error::Io`].
pub fn begin(run: &Run, file: Option<&Path>, say: &dyn Fn(&str)) -> Result<Recipe> {
    // A command is never taken from a file.
    let environment = |name: &str| variable(name).or((name == SCORER).then(String::new));
    let pinned = pinned(run);
    let file = file.filter(|_| !is_fork(&pinned));
    let recipe = if let Some(file) = file {
        refuse_missing(file)?;
        let rest = Recipe::read(file, &environment)?.0;
        let mut own = Vec::new();
        // The recipe of a run, which another may take, has its own.
        for (name, default) in [(SEED, "1"), (SCORER, "")].into_iter().filter(|(name, _)| !has(&rest, name)) {
            let value = variable(name).filter(|value| !value.is_empty()).unwrap_or_else(|| default.into());
            check(name, &value).map_err(in_environment)?;
            own.push((name.to_owned(), value));
        }
        own.extend(rest);
        Recipe(own)
    } else if pinned.is_file() {
        Recipe::read(&pinned, &environment)?
    } else {
        return Err(Error::Usage(format!("no run {}", run.dir().display())));
    };
    recipe.refuse_gaps(file.unwrap_or(&pinned))?;
    recipe.pin(run, say)?;
    Ok(recipe)
}

fn pinned(run: &Run) -> PathBuf {
    run.dir().join("recipe.env")
}

fn is_fork(pinned: &Path) -> bool {
    fs::read_to_string(pinned).is_ok_and(|text| text.lines().any(|line| line.starts_with("FORK=")))
}

/// The environment's value for a name. Bytes that are not UTF-8 become U+FFFD, which [`check`] refuses.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()).filter(|_| name != FORK)
}

fn in_environment(what: String) -> Error {
    Error::Usage(format!("environment: {what}"))
}

fn refuse_missing(file: &Path) -> Result<()> {
    if file.is_file() {
        return Ok(());
    }
    let stem = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let others = entries(file.parent().unwrap_or(Path::new("."))).unwrap_or_default();
    let is_recipe = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "env");
    let mut others: Vec<String> = others.iter().filter(is_recipe).map(|path| stem(path)).collect();
    others.sort();
    Err(Error::Usage(format!("no recipe {}; there are: {}", stem(file), others.join(" "))))
}

impl Recipe {
    /// Reads a file; a value that `environment` has for a name overrides the file's.
    ///
    /// # Errors
    /// [`Error::Record`] when a line is not `NAME=VALUE`, its name unknown, or its value of another kind; [`Error::Usage`] when that
    /// of the environment is; [`Error::Io`].
    pub(super) fn read(file: &Path, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let bytes = fs::read(file).map_err(Error::io(file))?;
        let mut values: Vec<(String, String)> = Vec::new();
        for (before, line) in String::from_utf8_lossy(&bytes).split('\n').enumerate() {
            let refuse = |what: String| Error::Record { path: file.display().to_string(), line: before + 1, what };
            let line = line.split('#').next().unwrap_or_default().trim_end();
            if line.is_empty() {
                continue;
            }
            let (name, value) = split(line).ok_or_else(|| refuse("not NAME=VALUE".into()))?;
            if !NAMES.iter().any(|(known, ..)| *known == name) {
                let what = "the names are those of pipelines/recipes/tiny.env";
                return Err(refuse(format!("a recipe has no {name}; {what}")));
            }
            if has(&values, name) {
                return Err(refuse(format!("{name} comes a second time")));
            }
            let value = match environment(name) {
                Some(value) => check(name, &value).map_err(in_environment).map(|()| value)?,
                None => check(name, value).map_err(refuse).map(|()| value.to_owned())?,
            };
            values.push((name.to_owned(), value));
        }
        Ok(Self(values))
    }

    /// The recipe that a run keeps.
    ///
    /// # Errors
    /// [`Error::Record`] when it is damaged, [`Error::Io`].
    pub fn of_run(run: &Run) -> Result<Self> {
        Self::of_file(&pinned(run))
    }

    /// The recipe in a file, whatever the environment has.
    ///
    /// # Errors
    /// Those of [`Recipe::of_run`].
    pub fn of_file(file: &Path) -> Result<Self> {
        Self::read(file, &|_| None)
    }

    /// Each name with its value and its meaning, in the order of the file.
    pub fn numbers(&self) -> impl Iterator<Item = (&str, &str, &'static str)> {
        let meaning = |name: &str| NAMES.iter().find(|(known, ..)| *known == name).map_or("", |(.., means)| means);
        self.0.iter().map(move |(name, value)| (name.as_str(), value.as_str(), meaning(name)))
    }

    /// The value under a name; empty where there is none.
    #[must_use]
    pub fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(other, _)| other == name).map_or("", |(_, value)| value)
    }

    /// Lines `NAME=VALUE`.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    fn refuse_gaps(&self, file: &Path) -> Result<()> {
        match NAMES.iter().find(|(name, ..)| *name != FORK && !has(&self.0, name)) {
            Some((name, _, means)) => Err(Error::Data(format!("{}: no {name}= ({means})", file.display()))),
            None => Ok(()),
        }
    }

    /// A run keeps the numbers it began with: going on with others would be another run.
    pub(super) fn pin(&self, run: &Run, say: &dyn Fn(&str)) -> Result<()> {
        for name in ["checkpoints", "rollouts", "eval"] {
            let dir = run.dir().join(name);
            fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        }
        let path = pinned(run);
        if !path.exists() {
            let mut out = Output::create(Some(&path))?; // appears when it is whole and on the disk
            self.lines().iter().try_for_each(|line| out.write_line(line.as_bytes()))?;
            return out.finish();
        }
        let old = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let (old, new): (Vec<&str>, _) = (old.lines().collect(), self.lines());
        let (was, now): (Vec<&&str>, Vec<&String>) = (
            old.iter().filter(|line| !new.iter().any(|other| other == *line)).collect(),
            // A run that an older version began lacks names that came later; an empty value is as if there were none.
            new.iter().filter(|line| !old.contains(&line.as_str()) && !is_new_and_empty(line, &old)).collect(),
        );
        if was.is_empty() && now.is_empty() {
            return Ok(());
        }
        was.iter().for_each(|line| say(&format!("was: {line}")));
        now.iter().for_each(|line| say(&format!("now: {line}")));
        let (dir, name) = (run.dir().display(), run.dir().file_name().unwrap_or_default().to_string_lossy());
        let step = step_name(run.policy().ok().and_then(|policy| step_of(&policy)).unwrap_or(0));
        Err(Error::Usage(format!(
            "{dir} was started with other numbers; go on with those, or take these to another NAME or a fork: \
             make fork RUN={name} FROM={step} NAME=... NUMBER=..."
        )))
    }
}

fn has(values: &[(String, String)], name: &str) -> bool {
    values.iter().any(|(other, _)| other == name)
}

fn is_new_and_empty(line: &str, old: &[&str]) -> bool {
    line.ends_with('=') && !old.iter().any(|other| other.starts_with(line))
}

/// A name and its value, from a line without its comment.
fn split(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.split_once('=')?;
    let begins = name.starts_with(|c: char| c.is_ascii_uppercase());
    let is_name = begins && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    (is_name && !value.contains(char::is_control)).then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_not_utf8_is_refused_and_not_changed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"LOSS=grpo # caf\xe9\nMODEL=caf\xe9\n").unwrap();
        let error = Recipe::read(file.path(), &|_| None).unwrap_err();
        assert!(matches!(&error, Error::Record { line: 2, what, .. } if what == "MODEL is not UTF-8 text"), "{error}");
    }

    #[test]
    fn lines_are_names_and_values_and_the_environment_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.env");
        let read = |text: &str| {
            fs::write(&file, text).unwrap();
            Recipe::read(&file, &|name| (name == "KEEP").then(|| "7".into())).map(|recipe| recipe.lines())
        };
        let got = read("# words\nSTEPS=5   # more\r\n\nKEEP=3\nREWARDS=int=1,math=2\nSYSTEM_PROMPT=").unwrap();
        assert_eq!(got, ["STEPS=5", "KEEP=7", "REWARDS=int=1,math=2", "SYSTEM_PROMPT="]);
        let cases = [
            ("STEPS=5\nsteps=5", ":2: not NAME=VALUE"),
            (" STEPS=5", ":1: not NAME=VALUE"),
            ("STEP=5", ":1: a recipe has no STEP; "),
            ("STEPS=a[$(touch own)]", ":1: STEPS is a whole number, and not \"a[$(touch own)]\""),
            ("DATA=--output=own", ":1: DATA begins with a minus"),
            ("DATA=a\tb", ":1: not NAME=VALUE"),
        ];
        for (text, want) in cases {
            let error = read(text).unwrap_err();
            assert!(error.exit_code() == 3 && error.to_string().contains(want), "{error}");
        }
    }

    #[test]
    fn a_run_keeps_its_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(&dir.path().join("run"));
        let recipe = |steps: &str| Recipe(vec![("STEPS".into(), steps.into()), ("KEEP".into(), "3".into())]);
        let silent = |words: &str| panic!("said {words}");
        recipe("5").pin(&run, &silent).unwrap();
        recipe("5").pin(&run, &silent).unwrap();
        let newer = |value: &str| Recipe([recipe("5").0, vec![("NEW".into(), value.into())]].concat());
        newer("").pin(&run, &silent).unwrap();
        assert!(newer("x").pin(&run, &|_| ()).is_err(), "a number that the run began without");
        let said = std::cell::RefCell::new(Vec::new());
        let error = recipe("6").pin(&run, &|words| said.borrow_mut().push(words.to_owned())).unwrap_err();
        assert_eq!(*said.borrow(), ["was: STEPS=5", "now: STEPS=6"]);
        assert!(error.exit_code() == 2 && error.to_string().contains("make fork RUN=run FROM=step_000000"), "{error}");
        assert_eq!(fs::read_to_string(pinned(&run)).unwrap(), "STEPS=5\nKEEP=3\n");
    }
}
