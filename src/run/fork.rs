//! Begins a new run from a checkpoint of an old one: its past up to there, and its recipe but for what the environment changes.

use std::fs;
use std::path::{Path, PathBuf};

use super::recipe::{DYNAMIC_SAMPLING, FORK, PROMPTS_PER_STEP, Recipe, STEPS, variable};
use super::recover::cut_metrics;
use super::{Run, step_name, step_of};
use crate::checkpoint::{State, entries};
use crate::error::{Error, Result};

/// Makes the run `new` from the checkpoint `from` (`step_000100`) of `old`, and returns what to tell the user. It appears when it is
/// whole.
///
/// # Errors
/// [`Error::Usage`] when there is no such run or checkpoint, `new` exists, or nothing is left to train; as [`super::recipe::begin`]
/// for the recipe; [`Error::Io`].
pub fn fork(old: &Run, from: &str, new: &Path) -> Result<String> {
    let usage = |what: String| Err(Error::Usage(what));
    let (dir, to) = (old.dir().display(), new.display());
    let (old_name, new_name) = (name(old.dir()), name(new));
    let pinned = old.dir().join("recipe.env");
    if !pinned.is_file() {
        return usage(format!("no run {dir}"));
    }
    if !old.checkpoints().join(from).is_dir() {
        return usage(format!("{dir} has no checkpoint {from}; there are: {}", names(&old.checkpoints())?));
    }
    if new.symlink_metadata().is_ok() {
        return usage(format!("{to} exists already; give the fork another NAME"));
    }
    let Some(step) = step_of(Path::new(from)).filter(|step| step_name(*step) == from) else {
        return usage(format!("{from} is no step_NUMBER"));
    };
    let mut recipe = Recipe::read(&pinned, &variable)?;
    recipe.0.retain(|(name, _)| name != FORK);
    recipe.0.insert(0, (FORK.into(), format!("{old_name}/{from}")));
    let prompts = prompts_left(old, step, from, &recipe)?;

    let unfinished = new.with_file_name(format!(".{new_name}.tmp"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(Error::io(&unfinished))?;
    }
    let fork = Run::new(&unfinished);
    recipe.pin(&fork, &|_| ())?;
    fs::write(fork.prompts(), prompts).map_err(Error::io(fork.prompts()))?;
    copy_past(old, step, &fork)?;
    fork.point_policy_at(step)?;
    fs::rename(&unfinished, new).map_err(Error::io(new))?;
    Ok(format!("{to}: a fork of {dir} at {from}; 'make train NAME={new_name}' goes on from there"))
}

/// The first prompts of the old run, as many as the fork takes: those that are left decide how many steps follow.
fn prompts_left(old: &Run, step: u64, from: &str, recipe: &Recipe) -> Result<Vec<u8>> {
    let count = |name| {
        let value: &str = recipe.get(name);
        value.parse::<u64>().map_err(|_| Error::Usage(format!("{name}={value}: not a whole number")))
    };
    let (steps, groups) = (count(STEPS)?, count(PROMPTS_PER_STEP)?);
    let budget = if recipe.get(DYNAMIC_SAMPLING).is_empty() { 1 } else { count(DYNAMIC_SAMPLING)? };
    let per_step = groups.saturating_mul(budget);
    if steps <= step {
        return Err(Error::Usage(format!("STEPS={steps}: nothing is left to do after {from}")));
    }
    let consumed = State::load(&old.checkpoint(step))?.map_or(0, |state| state.prompts_consumed);
    let wanted = consumed.saturating_add((steps - step).saturating_mul(per_step));
    let all = fs::read(old.prompts()).map_err(Error::io(old.prompts()))?;
    let lines: Vec<&[u8]> = all.split_inclusive(|byte| *byte == b'\n').collect();
    if wanted > lines.len() as u64 {
        let (dir, there) = (old.dir().display(), lines.len());
        return Err(Error::Usage(format!("STEPS={steps} take {wanted} prompts, and {dir} has {there}")));
    }
    Ok(lines[..wanted as usize].concat())
}

/// Checkpoints, rollouts and metrics up to a step, the supervised start's metrics, and the evaluation of the start.
fn copy_past(old: &Run, step: u64, fork: &Run) -> Result<()> {
    let mut past: Vec<PathBuf> = Vec::new();
    for dir in [old.checkpoints(), old.rollouts_dir()] {
        past.extend(entries(&dir)?.into_iter().filter(|path| step_of(path).is_some_and(|found| found <= step)));
    }
    let evaluations = entries(&old.dir().join("eval"))?;
    past.extend(evaluations.into_iter().filter(|path| name(path).starts_with("before.")));
    past.extend([old.metrics(), old.dir().join("supervised.jsonl")].into_iter().filter(|path| path.is_file()));
    for path in past {
        copy(&path, &fork.dir().join(path.strip_prefix(old.dir()).expect("it is in the old run")))?;
    }
    cut_metrics(&fork.metrics(), step)
}

/// Copies a file, or a directory with all that is in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        return fs::copy(from, to).map(drop).map_err(Error::io(from));
    }
    fs::create_dir(to).map_err(Error::io(to))?;
    entries(from)?.iter().try_for_each(|path| copy(path, &to.join(path.file_name().expect("an entry has a name"))))
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The names in a directory but for hidden ones.
fn names(dir: &Path) -> Result<String> {
    let mut names: Vec<String> = entries(dir)?.iter().map(|path| name(path)).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    Ok(names.join(" "))
}
