//! Writes the model card: what was trained, from what, and the metrics of the run.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::State;
use crate::error::{Error, Result};
use crate::lines::jsonl::Input;

/// The contents of a model card.
#[derive(Debug)]
pub struct Card {
    name: String,
    base_model: Option<String>,
    state: Option<State>,
    last_metrics: Option<Map<String, Value>>,
    evaluation: Option<Map<String, Value>>,
}

impl Card {
    /// Collects the contents from the checkpoint, the last line of `metrics` (written by `grpo-step`), and `evaluation` (written by
    /// `evaluate --json`).
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::Record`] or [`Error::Model`] when it is damaged.
    pub fn of(checkpoint: &Path, metrics: Option<&PathBuf>, evaluation: Option<&PathBuf>) -> Result<Self> {
        let last_object = |path: &PathBuf| -> Result<Map<String, Value>> {
            let mut last = None;
            for line in Input::open(path)? {
                let line = line?;
                last = Some(serde_json::from_str(&line.text).map_err(|err| line.error(err.to_string()))?);
            }
            last.ok_or_else(|| Error::Data(format!("{}: empty", path.display())))
        };
        let resolved = checkpoint.canonicalize().map_err(Error::io(checkpoint))?;
        Ok(Self {
            name: resolved.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            base_model: base_model(&resolved),
            state: State::load(checkpoint)?,
            last_metrics: metrics.map(last_object).transpose()?,
            evaluation: evaluation.map(last_object).transpose()?,
        })
    }

    /// The name of the checkpoint's directory.
    #[cfg(feature = "candle")]
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The Hub id of the model that the run began from.
    #[cfg(feature = "candle")]
    pub(super) fn base_model(&self) -> Option<&str> {
        self.base_model.as_deref()
    }

    /// How the weights were made, in one sentence.
    #[cfg(feature = "candle")]
    pub(super) fn history(&self) -> String {
        let Some(state) = &self.state else { return "A model as it was before training.".into() };
        format!(
            "GRPO with grpo-pipes {}: {} steps on {} groups, seed {}, policy_id {}.",
            state.package_version, state.step, state.prompts_consumed, state.seed, state.policy_id
        )
    }

    /// The card as Markdown, with the front matter that the Hub reads, for weights in `dtype`.
    pub(super) fn render(&self, library: &str, dtype: &str) -> String {
        let base = self.base_model.as_ref().map(|id| format!("base_model: {id}\n")).unwrap_or_default();
        let mut text =
            format!("---\nlibrary_name: {library}\npipeline_tag: text-generation\n{base}tags:\n- grpo\n---\n\n");
        let mut line = |words: std::fmt::Arguments<'_>| writeln!(text, "{words}").expect("a string takes all");
        line(format_args!("# {}\n\nWeights in {dtype}.", self.name));
        if let Some(state) = &self.state {
            line(format_args!(
                "Trained by group relative policy optimisation with grpo-pipes {}: {} steps on {} groups, {} tokens, seed {}.\n\n\
                 * policy_id: `{}`\n* parent: `{}`",
                state.package_version,
                state.step,
                state.prompts_consumed,
                state.tokens_consumed,
                state.seed,
                state.policy_id,
                state.parent_policy_id,
            ));
        }
        for (title, numbers) in [("Evaluation", &self.evaluation), ("Last step of training", &self.last_metrics)] {
            let Some(numbers) = numbers else { continue };
            line(format_args!("\n## {title}\n\n| | |\n|---|---|"));
            flat("", numbers, &mut |name, value| line(format_args!("| {name} | {value} |")));
        }
        text
    }
}

/// The Hub id in the recipe of the run that a checkpoint belongs to.
fn base_model(checkpoint: &Path) -> Option<String> {
    let recipe = std::fs::read_to_string(checkpoint.parent()?.parent()?.join("recipe.env")).ok()?;
    let model = recipe.lines().find_map(|line| line.strip_prefix("MODEL="))?.trim();
    let is_id = model.split('/').count() == 2 && !model.starts_with(['/', '.']) && !Path::new(model).exists();
    is_id.then(|| model.to_owned())
}

/// Passes each number and text of an object to `tell`; those of inner objects are named `outer.inner`.
fn flat(prefix: &str, object: &Map<String, Value>, tell: &mut impl FnMut(&str, &Value)) {
    for (name, value) in object {
        let name = format!("{prefix}{name}");
        match value {
            Value::Object(inner) => flat(&format!("{name}."), inner, tell),
            value => tell(&name, value),
        }
    }
}
