//! The shape of a model from the header of a GGUF file, as the `config.json` that it would have.

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, json};

use super::Gguf;
use crate::error::Result;
use crate::model::{Config, Parameter, Scaling};

/// Divisors of the rope's frequencies, `(E / 2)`: how llama.cpp's converter writes Llama 3's scaling.
pub(super) const FACTORS: &str = "rope_freqs.weight";

/// Architectures of the engine's families. A Mistral is a `llama`, too.
const ARCHITECTURES: [&str; 3] = ["qwen2", "qwen3", "llama"];

impl Gguf {
    /// Whether the engine runs its architecture.
    #[must_use]
    pub fn is_of_the_engine(&self) -> bool {
        ARCHITECTURES.contains(&self.architecture())
    }

    /// The shape of a model that the engine runs.
    ///
    /// # Errors
    /// [`crate::Error::Model`] naming what is missing in the header, or not supported.
    pub fn config(&self) -> Result<Config> {
        let arch = self.architecture();
        if !self.is_of_the_engine() {
            return Err(self.error(format!("architecture \"{arch}\" is not one of {}", ARCHITECTURES.join(", "))));
        }
        let key = |name: &str| format!("{arch}.{name}");
        let needed = |name: &str| {
            self.integer(&key(name)).ok_or_else(|| self.error(format!("the header has no number {}", key(name))))
        };
        for (name, unless) in [("expert_count", 0), ("attention.sliding_window", 0)] {
            if let Some(value) = self.integer(&key(name)).filter(|value| *value != unless) {
                return Err(self.error(format!("{} = {value} is not supported", key(name))));
            }
        }
        let (heads, width) = (needed("attention.head_count")?, needed("embedding_length")?);
        let dim = self.integer(&key("attention.key_length")).unwrap_or(width / heads.max(1));
        for name in ["rope.dimension_count", "attention.value_length"] {
            if let Some(other) = self.integer(&key(name)).filter(|other| *other != dim) {
                return Err(self.error(format!("{} = {other} is not supported with heads of {dim}", key(name))));
            }
        }
        let entries = json!({
            "model_type": arch,
            "vocab_size": self.vocabulary()?,
            "hidden_size": width,
            "intermediate_size": needed("feed_forward_length")?,
            "num_hidden_layers": needed("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer(&key("attention.head_count_kv")).unwrap_or(heads),
            "head_dim": dim,
            "max_position_embeddings": needed("context_length")?,
            "rms_norm_eps": self.number(&key("attention.layer_norm_rms_epsilon"))
                .ok_or_else(|| self.error(format!("the header has no number {}", key("attention.layer_norm_rms_epsilon"))))?,
            "rope_parameters": self.rope(arch)?,
            "tie_word_embeddings": !self.has_tensor("output.weight"),
        });
        let mut config: Config = serde_json::from_value(entries).map_err(|err| self.error(err))?;
        if self.has_tensor(FACTORS) {
            config.rope.scaling = Scaling::Factors(self.factors(dim as usize / 2)?);
        }
        Ok(config)
    }

    /// The longest sequence (tokens).
    ///
    /// # Errors
    /// [`crate::Error::Model`] when the header does not say.
    pub fn positions(&self) -> Result<usize> {
        let key = format!("{}.context_length", self.architecture());
        let positions = self.integer(&key).and_then(|length| usize::try_from(length).ok());
        positions.ok_or_else(|| self.error(format!("the header has no number {key}")))
    }

    /// V, the rows of the embedding.
    ///
    /// # Errors
    /// [`crate::Error::Model`] when there is none.
    pub fn vocabulary(&self) -> Result<usize> {
        let name = super::names::stored(None, Parameter::EmbedTokens);
        let shape = self.header.tensor_infos.get(&name).map(|info| info.shape.dims());
        match shape {
            Some(&[rows, _]) => Ok(rows),
            _ => Err(self.error(format!("there is no matrix {name}"))),
        }
    }

    fn rope(&self, arch: &str) -> Result<Map<String, serde_json::Value>> {
        let key = |name: &str| format!("{arch}.rope.{name}");
        let mut entries = Map::new();
        entries.insert("rope_theta".into(), self.number(&key("freq_base")).unwrap_or(10_000.0).into());
        let kind = self.text(&key("scaling.type")).unwrap_or("none");
        let mut copy = |from: &str, to: &str| {
            if let Some(number) = self.number(&key(from)) {
                entries.insert(to.into(), number.into());
            }
        };
        match kind {
            "none" => {}
            "linear" => copy("scaling.factor", "factor"),
            "yarn" => {
                copy("scaling.factor", "factor");
                copy("scaling.original_context_length", "original_max_position_embeddings");
                // llama.cpp multiplies its own factor of the scores by this one.
                if let Some(factor) = self.number(&key("scaling.attn_factor")).filter(|factor| *factor != 1.0) {
                    return Err(self.error(format!("{} = {factor} is not supported", key("scaling.attn_factor"))));
                }
            }
            other => return Err(self.error(format!("{} = \"{other}\" is not supported", key("scaling.type")))),
        }
        entries.insert("rope_type".into(), if kind == "none" { "default" } else { kind }.into());
        Ok(entries)
    }

    fn factors(&self, half: usize) -> Result<Vec<f32>> {
        let factors = self.tensor(FACTORS, &[half])?;
        match factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
            true => Ok(factors.to_vec()),
            false => Err(self.error(format!("{FACTORS} holds numbers that are not above 0"))),
        }
    }
}

/// The header's entries of a shape, in the order that llama.cpp's converter writes them.
pub(super) fn entries(config: &Config, arch: &str) -> Vec<(String, Value)> {
    let integer = |name: &str, value: usize| (format!("{arch}.{name}"), Value::U32(value as u32));
    let real = |name: &str, value: f64| (format!("{arch}.{name}"), Value::F32(value as f32));
    let mut entries = vec![
        integer("block_count", config.num_hidden_layers),
        integer("context_length", config.positions()),
        integer("embedding_length", config.hidden_size),
        integer("feed_forward_length", config.intermediate_size),
        integer("attention.head_count", config.num_attention_heads),
        integer("attention.head_count_kv", config.num_key_value_heads),
        integer("attention.key_length", config.head_dim()),
        integer("attention.value_length", config.head_dim()),
        real("attention.layer_norm_rms_epsilon", f64::from(config.rms_norm_eps)),
        real("rope.freq_base", config.rope.rope_theta),
        integer("rope.dimension_count", config.head_dim()),
        integer("vocab_size", config.vocab_size),
    ];
    let scaling = match &config.rope.scaling {
        Scaling::Linear { factor } => Some(("linear", *factor, None)),
        Scaling::Yarn(yarn) => Some(("yarn", yarn.factor, Some(yarn.original_max_position_embeddings))),
        // Up to the model's positions there is no scaling; Llama 3's is a tensor.
        Scaling::Default | Scaling::Dynamic { .. } | Scaling::Llama3(_) | Scaling::Factors(_) => None,
    };
    if let Some((kind, factor, original)) = scaling {
        entries.push((format!("{arch}.rope.scaling.type"), Value::String(kind.into())));
        entries.push(real("rope.scaling.factor", factor));
        entries.extend(original.map(|length| integer("rope.scaling.original_context_length", length as usize)));
    }
    entries
}
