//! The families of models that the engine runs, and what distinguishes them.

use serde::Serialize;
use serde_json::{Map, Value, json};

/// A family of models, under its `model_type` in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, without a mixture of experts.
    Qwen3,
    /// Llama and what has its architecture, like SmolLM2.
    Llama,
    /// Mistral.
    Mistral,
}

/// What a family's `config.json` does not say.
pub(super) struct Traits {
    model_type: &'static str,
    /// What the names of its classes in transformers begin with.
    pub name: &'static str,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether each head of queries and keys goes through an RMS norm.
    pub qk_norm: bool,
    /// Whether heads may be of another width than `hidden_size / num_attention_heads`.
    pub reads_head_dim: bool,
    /// Entries that would add biases, for which there is no code.
    pub biases: &'static [&'static str],
    /// Which layers may have a sliding window.
    pub windows: Windows,
}

/// Which layers of a family may have a sliding window.
pub(super) enum Windows {
    /// None: entries that other families have for it are ignored.
    Nowhere,
    /// All, unless `sliding_window` is null.
    Everywhere,
    /// Those of `layer_types`, or from `max_window_layers` on if `use_sliding_window` is set.
    SomeLayers,
}

const QWEN2: Traits = Traits {
    model_type: "qwen2",
    name: "Qwen2",
    qkv_bias: true,
    qk_norm: false,
    reads_head_dim: false,
    biases: &[],
    windows: Windows::SomeLayers,
};

const QWEN3: Traits = Traits {
    model_type: "qwen3",
    name: "Qwen3",
    qkv_bias: false,
    qk_norm: true,
    reads_head_dim: true,
    biases: &["attention_bias"],
    windows: Windows::SomeLayers,
};

const LLAMA: Traits = Traits {
    model_type: "llama",
    name: "Llama",
    qkv_bias: false,
    qk_norm: false,
    reads_head_dim: true,
    biases: &["attention_bias", "mlp_bias"],
    windows: Windows::Nowhere,
};

const MISTRAL: Traits =
    Traits { model_type: "mistral", name: "Mistral", biases: &[], windows: Windows::Everywhere, ..LLAMA };

/// The entries that say which kind of model a file describes.
pub(super) struct ModelKind {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
}

impl ModelKind {
    /// # Errors
    /// Says what is wrong with the entries' types.
    pub(super) fn read(entries: &Map<String, Value>) -> Result<Self, String> {
        let field = |name| entries.get(name).cloned().unwrap_or_default();
        let wrong = |name: &'static str| move |err: serde_json::Error| format!("{name}: {err}");
        Ok(Self {
            model_type: serde_json::from_value(field("model_type")).map_err(wrong("model_type"))?,
            architectures: serde_json::from_value(field("architectures")).map_err(wrong("architectures"))?,
        })
    }

    /// The family, by `model_type` or, without one, by the architecture.
    ///
    /// # Errors
    /// Names another architecture, or one without a language-model head.
    pub(super) fn family(&self) -> Result<Family, String> {
        const OURS: &str = "this program runs language models of the types qwen2, qwen3, llama and mistral";
        let names = self.architectures.as_deref().unwrap_or_default();
        let Some(model_type) = self.model_type.as_deref() else {
            let by_name = |family: &Family| names.iter().any(|name| family.has_class(name));
            return Family::ALL.into_iter().find(by_name).ok_or_else(|| format!("no model_type; {OURS}"));
        };
        match Family::ALL.into_iter().find(|family| family.traits().model_type == model_type) {
            Some(family) => {
                match names.iter().find(|name| !(name.ends_with("ForCausalLM") || family.has_class(name))) {
                    Some(name) => {
                        Err(format!("architecture \"{name}\" is not supported, it is no language model; {OURS}"))
                    }
                    None => Ok(family),
                }
            }
            None if model_type.contains("moe") || model_type == "mixtral" => {
                Err(format!("model_type \"{model_type}\", a mixture of experts, is not supported; {OURS}"))
            }
            None => Err(format!("model_type \"{model_type}\" is not supported; {OURS}")),
        }
    }
}

impl Family {
    const ALL: [Self; 4] = [Self::Qwen2, Self::Qwen3, Self::Llama, Self::Mistral];

    pub(super) fn traits(self) -> &'static Traits {
        match self {
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
            Self::Llama => &LLAMA,
            Self::Mistral => &MISTRAL,
        }
    }

    /// Its `model_type`.
    #[must_use]
    pub fn model_type(self) -> &'static str {
        self.traits().model_type
    }

    /// Its name, as its classes in transformers begin.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.traits().name
    }

    /// Whether this is the name of its language model in transformers, with or without the head.
    fn has_class(self, class: &str) -> bool {
        class.strip_prefix(self.name()).is_some_and(|rest| ["ForCausalLM", "Model"].contains(&rest))
    }

    /// The defaults of its config class in transformers 5.23; the same since 4.45, but for the place of the rope's entries.
    pub(super) fn defaults(self) -> Map<String, Value> {
        let own = match self {
            Self::Qwen2 => json!({}),
            Self::Qwen3 => json!({"head_dim": 128}),
            Self::Llama => json!({"vocab_size": 32_000, "intermediate_size": 11_008, "num_key_value_heads": null,
                "max_position_embeddings": 2048}),
            Self::Mistral => json!({"vocab_size": 32_000, "intermediate_size": 14_336, "num_key_value_heads": 8,
                "max_position_embeddings": 131_072}),
        };
        let common = json!({"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "initializer_range": 0.02, "use_sliding_window": false,
            "sliding_window": 4096, "max_window_layers": 28, "attention_dropout": 0.0});
        let (Value::Object(mut entries), Value::Object(own)) = (common, own) else { unreachable!("both are objects") };
        entries.extend(own);
        entries
    }
}
