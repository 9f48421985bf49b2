//! Turns scored rollouts into a data set for supervised training: right completions, no two alike, in the forms that trainers read.
//!
//! Knows records and rewards by their names, no tokens and no models.

mod card;
mod near;

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::lines::jsonl::{Input, Output};
use crate::lines::prompt::{Prompt, completion};
use crate::lines::record::{Line, Message, Record};
use crate::process::message::note;
use crate::reward::{has_verdict, is_right};

use card::card;
use near::NearDuplicates;

/// The files of a data set beside its card: messages as TRL and OpenAI have them, and ShareGPT's conversations.
pub(crate) const FILES: [&str; 2] = ["messages.jsonl", "sharegpt.jsonl"];

/// What became of the completions.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Questions that were asked.
    pub questions: usize,
    /// Questions that have a completion in the data set.
    pub questions_kept: usize,
    /// Completions that were read.
    pub completions: usize,
    /// Without a reward, because there is no answer to compare with.
    pub unscored: usize,
    /// Not right.
    pub wrong: usize,
    /// Right, but cut off at the longest length.
    pub truncated: usize,
    /// Right, and much like one that is kept.
    pub duplicates: usize,
    /// In the data set.
    pub kept: usize,
}

/// Writes a data set of the right ones among scored rollouts (`-` is standard input) to a directory. Its files are replaced, each when
/// the new one is complete, so the same command makes the data set anew when there are more rollouts.
///
/// # Errors
/// [`Error::Io`], [`Error::Record`] for a line that is no scored rollout, [`Error::Data`] when no completion has a reward.
pub fn export(rollouts: &Path, out: &Path) -> Result<Counts> {
    std::fs::create_dir_all(out).map_err(Error::io(out))?;
    let mut files = [Output::create(Some(&out.join(FILES[0])))?, Output::create(Some(&out.join(FILES[1])))?];
    let mut selection = Selection::default();
    for line in Input::open(rollouts)? {
        if let Some((prompt_id, messages)) = selection.select(&line?)? {
            for (file, row) in
                files.iter_mut().zip([in_messages(&prompt_id, &messages), in_share_gpt(&prompt_id, &messages)])
            {
                file.write_line(row.to_string().as_bytes())?;
            }
        }
    }
    let counts = selection.counts();
    if counts.completions > 0 && counts.unscored == counts.completions {
        return Err(Error::Data(format!(
            "{}: no completion has a reward; `score` gives them to prompts that have an \"answer\"",
            rollouts.display()
        )));
    }
    files.into_iter().try_for_each(Output::finish)?;
    let mut readme = Output::create(Some(&out.join("README.md")))?;
    readme.write_lines(card(&counts, &selection.sources).as_bytes())?;
    readme.finish()?;
    let Counts { questions, completions, unscored, wrong, truncated, duplicates, kept, questions_kept } = counts;
    let right = completions - unscored - wrong;
    note(
        "export-hf",
        &format!("{completions} completions of {questions} questions, {right} right, {unscored} without a reward"),
    );
    note("export-hf", &format!("left out: {truncated} truncated, {duplicates} much like another"));
    note("export-hf", &format!("{}: {kept} completions of {questions_kept} questions", out.display()));
    Ok(counts)
}

/// The files of a data set that [`export`] made; `None` if `dir` has none.
#[must_use]
pub fn names_in(dir: &Path) -> Option<[&'static str; 3]> {
    let names = ["README.md", FILES[0], FILES[1]];
    names.iter().all(|name| dir.join(name).is_file()).then_some(names)
}

/// Chooses completions one by one.
#[derive(Default)]
struct Selection {
    counts: Counts,
    asked: HashSet<String>,
    answered: HashSet<String>,
    seen: NearDuplicates,
    /// Where the completions come from: weights, seed and temperature.
    sources: Vec<String>,
}

impl Selection {
    /// The conversation of a record that is chosen, with its prompt's name.
    fn select(&mut self, line: &Line) -> Result<Option<(String, Vec<Message>)>> {
        let record = line.record()?;
        let prompt = Prompt::of(&record)?;
        let text = completion(&record)?.ok_or_else(|| record.error("no field \"completion\""))?;
        let prompt_id = record.get_optional("prompt_id")?.unwrap_or_else(|| prompt.name());
        self.counts.completions += 1;
        self.asked.insert(prompt_id.clone());
        let counter = match verdict(&record)? {
            None => &mut self.counts.unscored,
            Some(false) => &mut self.counts.wrong,
            Some(true) if record.get_text("finish_reason")?.as_deref() == Some("length") => &mut self.counts.truncated,
            Some(true) if !self.seen.is_new(&question(&prompt), &text) => &mut self.counts.duplicates,
            Some(true) => {
                self.answered.insert(prompt_id.clone());
                self.remember_source(&record)?;
                self.counts.kept += 1;
                let mut messages = prompt.messages;
                messages.push(Message::new("assistant", text));
                return Ok(Some((prompt_id, messages)));
            }
        };
        *counter += 1;
        Ok(None)
    }

    fn remember_source(&mut self, record: &Record<'_>) -> Result<()> {
        let Some(policy) = record.get_optional::<String>("policy_id")? else { return Ok(()) };
        let number = |name: &str| record.get_written(name).map(|text| text.unwrap_or("unknown".into()));
        let source = format!("weights `{policy}`, seed {}, temperature {}", number("seed")?, number("temperature")?);
        if !self.sources.contains(&source) && self.sources.len() < 16 {
            self.sources.push(source);
        }
        Ok(())
    }

    fn counts(&self) -> Counts {
        Counts { questions: self.asked.len(), questions_kept: self.answered.len(), ..self.counts.clone() }
    }
}

/// What the user said last.
fn question(prompt: &Prompt) -> String {
    prompt.messages.last().map(|last| last.content.clone()).unwrap_or_default()
}

/// Whether the reward for the answer is above 0; without such a reward, whether their sum is.
fn verdict(record: &Record<'_>) -> Result<Option<bool>> {
    let rewards: Map<String, Value> = record.get_optional("rewards")?.unwrap_or_default();
    if has_verdict(&rewards) {
        return Ok(is_right(&rewards));
    }
    if !record.has("reward") {
        return Err(record.error("no field \"rewards\" or \"reward\"; `score` adds them"));
    }
    Ok(record.get_optional::<f64>("reward")?.map(|value| value > 0.0))
}

fn in_messages(prompt_id: &str, messages: &[Message]) -> Value {
    json!({ "prompt_id": prompt_id, "messages": messages })
}

fn in_share_gpt(prompt_id: &str, messages: &[Message]) -> Value {
    let turn = |message: &Message| {
        let from = match message.role.as_str() {
            "user" => "human",
            "assistant" => "gpt",
            other => other,
        };
        json!({ "from": from, "value": message.content })
    };
    json!({ "id": prompt_id, "conversations": messages.iter().map(turn).collect::<Vec<_>>() })
}
