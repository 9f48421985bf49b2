//! Reads the evaluations of a run before and after training, and compares them.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::plot::number;
use crate::error::{Error, Result};
use crate::eval::{Outcomes, Paired, Rate, Summary};
use crate::lines::jsonl::Input;
use crate::run::Run;

/// The times at which a run is evaluated.
const TIMES: [&str; 2] = ["before", "after"];

/// One way of sampling the held-out prompts, before and after training.
#[derive(Debug, Serialize)]
pub struct Evaluation {
    /// Its name: `greedy`, `sampled`, or that of a file of the user's.
    pub kind: String,
    num_prompts: usize,
    num_completions: usize,
    rates: Vec<Row>,
    /// Other numbers: a name, before, after.
    means: Vec<(String, [String; 2])>,
    paired: Option<String>,
    is_done: bool,
}

/// A rate at both times.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    times: Vec<Shown>,
    /// The difference in points, with its sign.
    change: String,
}

/// A rate with its interval, as places on a scale of 0 to 100.
#[derive(Debug, Serialize)]
struct Shown {
    time: &'static str,
    value: f64,
    low: f64,
    width: f64,
    words: String,
    interval: String,
}

/// The evaluations in a run's directory: pairs of `before.KIND.json` and `after.KIND.json`, of which the second may not be there yet.
///
/// # Errors
/// [`Error::Io`]; [`Error::Data`] when a file is not what `evaluate --json` writes.
pub fn read(run: &Run) -> Result<Vec<Evaluation>> {
    let dir = run.evaluations();
    let Ok(files) = fs::read_dir(&dir) else { return Ok(Vec::new()) };
    let names = files.flatten().filter_map(|file| file.file_name().into_string().ok());
    let kind = |name: String| Some(name.strip_suffix(".json")?.split_once('.')?.1.to_owned());
    let mut kinds: Vec<String> = names.filter_map(kind).collect();
    kinds.sort();
    kinds.dedup();
    let one = |kind: String| evaluation(&dir, kind).transpose();
    kinds.into_iter().filter_map(one).collect()
}

fn evaluation(dir: &Path, kind: String) -> Result<Option<Evaluation>> {
    let path = |time: &str, ending: &str| dir.join(format!("{time}.{kind}.{ending}"));
    let [before, after] = TIMES.map(|time| summary(&path(time, "json")));
    let (before, after) = (before?, after?);
    let Some(any) = before.as_ref().or(after.as_ref()) else { return Ok(None) };
    let records = TIMES.map(|time| path(time, "jsonl.zst"));
    let is_done = after.is_some();
    let paired = if is_done && records.iter().all(|path| path.is_file()) { paired(&records)? } else { None };
    Ok(Some(Evaluation {
        num_prompts: any.num_prompts,
        num_completions: any.num_completions,
        rates: rates(before.as_ref(), after.as_ref()),
        means: means(before.as_ref(), after.as_ref()),
        paired,
        is_done,
        kind,
    }))
}

fn summary(path: &Path) -> Result<Option<Summary>> {
    if !path.is_file() {
        return Ok(None);
    }
    Summary::read(path).map(Some)
}

fn rates(before: Option<&Summary>, after: Option<&Summary>) -> Vec<Row> {
    type Get = fn(&Summary) -> Option<Rate>;
    let all: [(&str, Get); 4] = [
        ("Accuracy, strict", |summary| summary.accuracy_strict),
        ("Accuracy, flexible", |summary| summary.accuracy_flexible),
        ("In format", |summary| summary.format_rate),
        ("Cut off", |summary| summary.truncation_rate),
    ];
    let row = |(name, get): (&'static str, Get)| {
        let rates = [before.and_then(get), after.and_then(get)];
        let times = TIMES.into_iter().zip(rates).filter_map(|(time, rate)| Some(shown(time, rate?))).collect();
        let change = match rates {
            [Some(before), Some(after)] => format!("{:+.1}", 100.0 * (after.value - before.value)),
            _ => String::new(),
        };
        Row { name, times, change }
    };
    all.into_iter().map(row).filter(|row| !row.times.is_empty()).collect()
}

fn shown(time: &'static str, Rate { value, low, high }: Rate) -> Shown {
    let [value, low, high] = [value, low, high].map(|part| (1000.0 * part).round() / 10.0);
    let interval = format!("95 % interval {low:.1} to {high:.1} %");
    Shown { time, value, low, width: high - low, words: format!("{value:.1} %"), interval }
}

fn means(before: Option<&Summary>, after: Option<&Summary>) -> Vec<(String, [String; 2])> {
    let of = |summary: Option<&Summary>| -> Vec<(String, f64)> {
        let Some(summary) = summary else { return Vec::new() };
        let percent = |value: f64| 100.0 * value;
        let at_k = [("pass", &summary.pass_at_k), ("maj", &summary.maj_at_k)].into_iter().flat_map(|(name, means)| {
            means.iter().filter_map(move |(k, value)| Some((format!("{name}@{k} (%)"), percent(value.as_f64()?))))
        });
        let parts =
            summary.rewards.iter().filter_map(|(name, value)| Some((format!("reward {name}"), value.as_f64()?)));
        let plain = [("Reward", summary.reward), ("Length (tokens)", summary.mean_length_tokens)];
        let plain = plain.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        plain.chain(parts).chain(at_k).collect()
    };
    let both = [of(before), of(after)];
    let mut names: Vec<&String> = Vec::new();
    both.iter().flatten().map(|(name, _)| name).for_each(|name| {
        if !names.contains(&name) {
            names.push(name);
        }
    });
    let value = |means: &[(String, f64)], name: &String| {
        means.iter().find(|(other, _)| other == name).map_or("-".into(), |(_, value)| number(*value))
    };
    names.into_iter().map(|name| (name.clone(), [value(&both[0], name), value(&both[1], name)])).collect()
}

/// Says for how many prompts strict accuracy changed. `None` where nothing was judged.
fn paired(records: &[std::path::PathBuf; 2]) -> Result<Option<String>> {
    let mut outcomes = [Outcomes::default(), Outcomes::default()];
    for (path, outcomes) in records.iter().zip(&mut outcomes) {
        Input::open(path)?.try_for_each(|line| outcomes.add(&line?))?;
    }
    let [before, after] = &outcomes;
    let Paired { num_prompts, difference, better, worse, p_value, .. } = match Paired::of(after, before, &[]) {
        Err(Error::Data(_)) => return Ok(None),
        paired => paired?,
    };
    let [value, low, high] = [difference.value, difference.low, difference.high].map(|part| 100.0 * part);
    Ok(Some(format!(
        "Prompt by prompt, {better} of {num_prompts} were solved more often after training and {worse} less often: {value:+.1} points \
         (95 % interval {low:+.1} to {high:+.1}; p = {p_value:.1e} by an exact test)."
    )))
}
