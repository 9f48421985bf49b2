//! Reads the recipe of a run, and refuses to continue the run with other numbers.
//!
//! A recipe is a file of lines `NAME=VALUE  # comment`; an environment variable of the same name overrides it. A recipe is data,
//! wherever it comes from: every line must hold a known name and a value of its kind.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Run, step_name, step_of};
use crate::checkpoint::entries;
use crate::error::{Error, Result};
use crate::lines::jsonl::Output;

/// What a value must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Number,
    /// A number or nothing.
    Optional,
    /// Any text that does not begin like an option.
    Text,
}
use Kind::{Number, Optional, Text};

/// The names that a recipe may have, the kind of each, and its meaning.
const NAMES: [(&str, Kind, &str); 46] = [
    (FORK, Text, "run and checkpoint that a fork began from"),
    (SEED, Number, "seed of everything random"),
    (SCORER, Text, "command in the place of score; empty: score"),
    ("MODEL", Text, "model directory or Hub id; without weights: starts at random"),
    ("SYSTEM_PROMPT", Text, "file with the system prompt; empty: the XML format"),
    ("CHAT_TEMPLATE_ARG", Text, "NAME=VALUE for the chat template; empty: none"),
    ("DTYPE", Text, "numbers that are multiplied"),
    ("DATA", Text, "`generate`, or a data set"),
    ("MAX_NUMBER", Number, "largest number in a generated problem"),
    ("EPOCHS", Number, "passes over the problems"),
    ("TEST_PROMPTS", Number, "held-out problems of an evaluation"),
    ("TEST_SAMPLES", Number, "completions per problem in the sampled evaluation"),
    ("SUPERVISED_STEPS", Number, "optimizer steps of the supervised start; 0: none"),
    ("SUPERVISED_BATCH", Number, "demonstrations per step"),
    ("SUPERVISED_LEARNING_RATE", Number, "learning rate of the supervised start"),
    ("SLOPPY_FORMAT", Number, "fraction of demonstrations in a broken format"),
    ("SLOPPY_ARITHMETIC", Number, "fraction of demonstrations with a wrong result"),
    (PROMPTS_PER_STEP, Number, "groups per step"),
    ("NUM_GENERATIONS", Number, "completions per group"),
    ("TEMPERATURE", Number, "sampling temperature"),
    ("MAX_PROMPT_TOKENS", Number, "longest prompt (tokens)"),
    ("MAX_COMPLETION_TOKENS", Number, "longest completion (tokens)"),
    (STEPS, Number, "steps of the run"),
    ("LOSS", Text, "grpo, bnpo, dr_grpo, dapo, cispo, sapo, gspo or luspo"),
    ("BETA", Number, "weight of the KL divergence from the start"),
    ("KL_ESTIMATOR", Text, "of that divergence: k1, k2, k3 or k3-weighted"),
    ("EPSILON", Number, "clip range of the ratio"),
    ("EPSILON_HIGH", Text, "upper clip range; empty: EPSILON"),
    ("LEARNING_RATE", Number, "largest learning rate"),
    ("SCHEDULE", Text, "constant, linear or cosine"),
    ("WARMUP_RATIO", Number, "fraction of the steps in which the learning rate rises"),
    ("ADAM_BETA1", Number, "decay of AdamW's first moment"),
    ("ADAM_BETA2", Number, "decay of AdamW's second moment"),
    ("WEIGHT_DECAY", Number, "weight decay of matrices"),
    ("OPTIMIZER_STATE", Text, "type of AdamW's moments"),
    ("LORA_RANK", Optional, "rank of an adapter that is trained in the place of the weights; empty: none"),
    ("LORA_ALPHA", Optional, "what the adapter adds is multiplied by this / LORA_RANK; empty: 2 LORA_RANK"),
    ("LORA_TARGETS", Text, "matrices that get an adapter; empty: all of each layer"),
    ("MAX_GRAD_NORM", Number, "gradients are clipped to this norm; 0: never"),
    ("REWARDS", Text, "weights of score's rewards"),
    ("SCALE_REWARDS", Text, "what advantages are divided by: group, batch or none"),
    ("MAX_STALENESS", Number, "steps that sampling is ahead of training"),
    ("IMPORTANCE_SAMPLING_CLIP_MAX", Text, "largest weight of a token for weights that differ; empty: off"),
    ("EVALUATE_EVERY", Optional, "steps between evaluations during training; empty: none"),
    ("SAVE_EVERY", Number, "steps between checkpoints"),
    ("KEEP", Number, "checkpoints kept besides the start"),
];

/// Where a fork began: a run and its checkpoint.
pub const FORK: &str = "FORK";
/// The seed of everything random.
pub const SEED: &str = "SEED";
/// The command in the place of `score`.
pub const SCORER: &str = "SCORER";
/// The steps of a run.
pub const STEPS: &str = "STEPS";
pub(super) const PROMPTS_PER_STEP: &str = "PROMPTS_PER_STEP";

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

/// Says what is wrong with a value. One that begins with a minus would be taken for an option.
fn check(name: &str, value: &str) -> std::result::Result<(), String> {
    let kind = NAMES.iter().find(|(known, ..)| *known == name).map(|(_, kind, _)| *kind);
    let is_number = kind == Some(Number) || kind == Some(Optional) && !value.is_empty();
    if is_number && !looks_like_a_number(value) {
        return Err(format!("{name} is a number, and not \"{value}\""));
    }
    if value.starts_with('-') {
        return Err(format!("{name} begins with a minus"));
    }
    if value.contains(char::is_control) {
        return Err(format!("{name} has a control character"));
    }
    if value.contains(char::REPLACEMENT_CHARACTER) {
        return Err(format!("{name} is not UTF-8 text"));
    }
    Ok(())
}

/// Digits, a point, digits, and an exponent: the form that shells and commands read alike.
fn looks_like_a_number(text: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or(("", mantissa));
    let exponent = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
    digits(whole) && [fraction, exponent].iter().all(|part| !part.is_empty() && digits(part))
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
    fn numbers_have_one_form() {
        for text in ["1", "0.5", ".5", "3e-3", "1e+4", "12.25e3"] {
            assert!(looks_like_a_number(text), "{text}");
        }
        for text in ["", ".", "1.", "-1", "1e", "e3", "0x1", "1,0", "a[$(x)]", "1e-", "1.5.2", "inf"] {
            assert!(!looks_like_a_number(text), "{text}");
        }
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
            ("STEPS=a[$(touch own)]", ":1: STEPS is a number, and not \"a[$(touch own)]\""),
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
