//! `adapter_config.json`, as PEFT writes it: every entry that changes numbers is read, or refused by name.

use std::path::Path;

use serde_json::{Value, json};

use crate::directory::{ADAPTER, adapter_entries};
use crate::error::{Error, Result};
use crate::model::{Config, Parameter};

/// The matrices that may have an adapter, in the order of a layer.
pub const TARGETS: [Parameter; 7] = [
    Parameter::QProj,
    Parameter::KProj,
    Parameter::VProj,
    Parameter::OProj,
    Parameter::GateProj,
    Parameter::UpProj,
    Parameter::DownProj,
];

/// The name that PEFT gives a matrix of a layer, such as `q_proj`.
#[must_use]
pub fn target_name(target: Parameter) -> &'static str {
    module_name(target).rsplit('.').next().expect("a split has a part")
}

/// The name of a matrix within its layer, such as `self_attn.q_proj`.
pub(super) fn module_name(target: Parameter) -> &'static str {
    target.name().strip_suffix(".weight").expect("a matrix is a weight")
}

/// The numbers of a low-rank adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// r, the rows of A and columns of B.
    pub rank: usize,
    /// B A is multiplied by alpha / r.
    pub alpha: f64,
    /// By alpha / sqrt(r) instead (<https://arxiv.org/abs/2312.03732>).
    pub is_rank_stabilized: bool,
    /// The matrices that have one, in the order of [`TARGETS`].
    pub targets: Vec<Parameter>,
}

/// Entries that say how an adapter was made or trained and change nothing about what it computes, or that the tensors' own names and
/// shapes repeat.
const WITHOUT_EFFECT: [&str; 14] = [
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size", // of use_qalora
    "target_modules",
    "task_type",
    "use_rslora", // read below
];

impl AdapterConfig {
    /// Reads rank and factor from the `adapter_config.json` in `dir`; the targets are those that `has` finds among the stored tensors.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::Model`] when it is damaged, or has an entry that is not supported.
    pub(super) fn load(dir: &Path, has: impl Fn(Parameter) -> bool) -> Result<Self> {
        let path = dir.join(ADAPTER);
        let wrong = |what: String| Error::model(&path, what);
        let entries = adapter_entries(dir)?;
        for (name, value) in &entries {
            refuse(name, value).map_err(wrong)?;
        }
        let rank = entries.get("r").and_then(Value::as_u64).filter(|rank| *rank > 0);
        let alpha = entries.get("lora_alpha").and_then(Value::as_f64);
        let rank = rank.ok_or_else(|| wrong("r is not a whole number above 0".into()))? as usize;
        let alpha = alpha.ok_or_else(|| wrong("lora_alpha is not a number".into()))?;
        let is_rank_stabilized = entries.get("use_rslora") == Some(&Value::Bool(true));
        Ok(Self { rank, alpha, is_rank_stabilized, targets: TARGETS.into_iter().filter(|one| has(*one)).collect() })
    }

    /// Writes the file, for an adapter of the model `base`, a directory or a Hub id.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn save(&self, dir: &Path, base: &str) -> Result<()> {
        let whole = self.alpha as i64;
        let alpha = if whole as f64 == self.alpha { json!(whole) } else { json!(self.alpha) };
        let config = json!({
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": self.targets.iter().map(|one| target_name(*one)).collect::<Vec<_>>(),
            "task_type": "CAUSAL_LM",
            "use_rslora": self.is_rank_stabilized,
        });
        let path = dir.join(ADAPTER);
        std::fs::write(&path, format!("{config:#}\n")).map_err(Error::io(&path))
    }

    /// How many numbers A and B have in all layers of a model of this shape, and how many the matrices have that they belong to.
    #[must_use]
    pub fn numbers(&self, shape: &Config) -> [usize; 2] {
        let stored = shape.stored();
        let adapted = stored.iter().filter(|(parameter, _)| self.targets.contains(parameter)).map(|(_, shape)| shape);
        adapted.fold([0, 0], |[own, all], shape| {
            [own + self.rank * shape.iter().sum::<usize>(), all + shape.iter().product::<usize>()]
        })
    }

    /// What B A is multiplied by.
    #[must_use]
    pub fn factor(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.is_rank_stabilized { rank.sqrt() } else { rank }) as f32
    }
}

/// Refuses an entry with a value that asks for other numbers than plain LoRA computes. Entries that came with later versions of PEFT are off
/// while they are null, false, empty or 0.
fn refuse(name: &str, value: &Value) -> std::result::Result<(), String> {
    let is_off = match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    };
    let is_plain = match (name, value) {
        ("r" | "lora_alpha", _) => true,
        ("peft_type", Value::String(kind)) => kind == "LORA",
        ("bias", Value::String(which)) => which == "none",
        ("revision", Value::String(revision)) => revision == "main",
        // The other ways change the base model, too.
        ("init_lora_weights", Value::String(how)) => ["gaussian", "orthogonal"].contains(&how.as_str()),
        ("init_lora_weights", Value::Bool(_)) => true,
        _ => is_off || WITHOUT_EFFECT.contains(&name),
    };
    let merge =
        "merge it in Python, AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)";
    if is_plain { Ok(()) } else { Err(format!("{name} = {value} is not supported; {merge}")) }
}
