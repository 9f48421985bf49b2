//! Writes the model card: what was trained, from what, with which recipe, and the metrics of the run.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::recipe::Recipe;
use crate::checkpoint::State;
use crate::error::{Error, Result};
use crate::lines::jsonl::Input;

/// The contents of a model card.
#[derive(Debug)]
pub struct Card {
    name: String,
    license: Option<String>,
    recipe: Recipe,
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
            license: license(checkpoint).map(Into::into),
            recipe: Recipe::beside(resolved.parent().and_then(Path::parent)),
            state: State::load(checkpoint)?,
            last_metrics: metrics.map(last_object).transpose()?,
            evaluation: evaluation.map(last_object).transpose()?,
        })
    }

    /// Names the model otherwise than its directory is named.
    #[must_use]
    pub fn with_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Puts a licence, by the Hub's name for it, in the place of that of the checkpoint's LICENSE file.
    #[must_use]
    pub fn with_license(mut self, license: Option<&str>) -> Self {
        self.license = license.map(Into::into).or(self.license);
        self
    }

    /// The name of the model.
    #[cfg(feature = "candle")]
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The Hub id of the model whose weights the run began with.
    pub(super) fn start(&self) -> Option<&str> {
        self.recipe.base_model().filter(|_| self.recipe.get("SUPERVISED_STEPS").is_none_or(|steps| steps == "0"))
    }

    /// The Hub id of the model that the run began from.
    #[cfg(feature = "candle")]
    pub(super) fn base_model(&self) -> Option<&str> {
        self.recipe.base_model()
    }

    /// The licence, by the Hub's name for it.
    #[cfg(feature = "candle")]
    pub(super) fn license(&self) -> Option<&str> {
        self.license.as_deref()
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
        let mut text = self.front_matter(library);
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
        self.recipe.table(&mut line);
        for (title, numbers) in [("Evaluation", &self.evaluation), ("Last step of training", &self.last_metrics)] {
            let Some(numbers) = numbers else { continue };
            line(format_args!("\n## {title}\n\n| | |\n|---|---|"));
            flat("", numbers, &mut |name, value| line(format_args!("| {name} | {value} |")));
        }
        text
    }

    /// What the Hub reads of the card: it finds models by their base model, data sets and accuracies.
    fn front_matter(&self, library: &str) -> String {
        let mut text = format!("---\nlibrary_name: {library}\npipeline_tag: text-generation\n");
        let mut line = |words: std::fmt::Arguments<'_>| writeln!(text, "{words}").expect("a string takes all");
        if let Some(license) = &self.license {
            line(format_args!("license: {}", Value::from(license.as_str())));
        }
        if let Some(id) = self.recipe.base_model() {
            line(format_args!("base_model: {id}"));
        }
        if let Some(id) = self.recipe.data_set() {
            line(format_args!("datasets:\n- {id}"));
        }
        line(format_args!("tags:\n- grpo"));
        let accuracies: Vec<_> = ["accuracy_strict", "accuracy_flexible"]
            .into_iter()
            .filter_map(|name| Some((name, self.evaluation.as_ref()?.get(name)?.get("value")?)))
            .collect();
        if !accuracies.is_empty() {
            let (name, data) = (Value::from(self.name.as_str()), self.recipe.data_set().unwrap_or("held-out problems"));
            line(format_args!("model-index:\n- name: {name}\n  results:\n  - task:\n      type: text-generation"));
            line(format_args!("    dataset:\n      name: {data}\n      type: {data}\n    metrics:"));
        }
        for (name, value) in accuracies {
            line(format_args!("    - type: accuracy\n      name: {name}\n      value: {value}"));
        }
        text.push_str("---\n\n");
        text
    }
}

/// The licence that a LICENSE file holds, by the Hub's name for it.
fn license(checkpoint: &Path) -> Option<&'static str> {
    let text = std::fs::read_to_string(checkpoint.join("LICENSE")).ok()?;
    let known = [
        ("Apache License", "apache-2.0"),
        ("MIT License", "mit"),
        ("LLAMA 3.2", "llama3.2"),
        ("LLAMA 3.1", "llama3.1"),
    ];
    Some(known.iter().find(|(words, _)| text.contains(words)).map_or("other", |(_, name)| name))
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
