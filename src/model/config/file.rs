//! Reads `config.json` as transformers does. A missing entry gets the default of `Qwen2Config` (5.23; the same since 4.45, but for the
//! place of the rope's entries), and an entry that this program does not support is refused by name.
//!
//! Entries that transformers ignores are ignored here too, as are those without effect on what this program computes;
//! `tests/suite/config_fields.rs` lists both and says why for each.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::Config;
use crate::model::rope::{RopeParameters, Spelling};

/// The entries that say which kind of model a file describes.
#[derive(Deserialize)]
pub(super) struct ModelKind {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
}

/// Every entry that is read.
#[derive(Deserialize)]
#[serde(default)]
pub(super) struct File {
    #[serde(flatten)]
    kind: ModelKind,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    /// Null means as many as query heads.
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: String,
    pub(super) max_position_embeddings: usize,
    rms_norm_eps: f32,
    #[serde(flatten)]
    pub(super) rope: Spelling,
    tie_word_embeddings: bool,
    initializer_range: f32,
    pad_token_id: Option<i64>,
    use_sliding_window: bool,
    sliding_window: Option<usize>,
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
    attention_dropout: f64,
    is_causal: Option<bool>,
    is_encoder_decoder: Option<bool>,
    /// This and the following change what is computed or where weights are found. Any value but an empty one is refused.
    #[serde(deserialize_with = "present")]
    quantization_config: Option<Value>,
    #[serde(deserialize_with = "present")]
    pruned_heads: Option<Value>,
    #[serde(deserialize_with = "present")]
    per_layer_config: Option<Value>,
    #[serde(deserialize_with = "present")]
    transformers_weights: Option<Value>,
    #[serde(deserialize_with = "present")]
    configuration_files: Option<Value>,
}

/// Treats null and an empty list or object as missing.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    let value = Option::<Value>::deserialize(from)?;
    Ok(value.filter(|value| *value != Value::Array(Vec::new()) && *value != Value::Object(Map::new())))
}

impl Default for File {
    fn default() -> Self {
        Self {
            kind: ModelKind { model_type: None, architectures: None },
            vocab_size: 151_936,
            hidden_size: 4096,
            intermediate_size: 22_016,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: Some(32),
            head_dim: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            rope: Spelling::default(),
            tie_word_embeddings: false,
            initializer_range: 0.02,
            pad_token_id: None,
            use_sliding_window: false,
            sliding_window: Some(4096),
            max_window_layers: 28,
            layer_types: None,
            attention_dropout: 0.0,
            is_causal: None,
            is_encoder_decoder: None,
            quantization_config: None,
            pruned_heads: None,
            per_layer_config: None,
            transformers_weights: None,
            configuration_files: None,
        }
    }
}

impl ModelKind {
    /// Refuses other architectures, and Qwen2 models without a language-model head.
    pub(super) fn check(&self) -> Result<(), String> {
        const OURS: &str = "this program runs Qwen2 and Qwen2.5 language models, model_type \"qwen2\"";
        let language =
            |name: &String| name.starts_with("Qwen2") && (name.ends_with("ForCausalLM") || name == "Qwen2Model");
        let names = self.architectures.as_deref().unwrap_or_default();
        match self.model_type.as_deref() {
            None if names.iter().any(language) => Ok(()),
            None => Err(format!("no model_type; {OURS}")),
            Some("qwen2") => match names.iter().find(|name| !name.ends_with("ForCausalLM") && *name != "Qwen2Model") {
                Some(name) => Err(format!("architecture \"{name}\" is not supported, it is no language model; {OURS}")),
                None => Ok(()),
            },
            Some(moe) if moe.contains("moe") => {
                Err(format!("model_type \"{moe}\", a mixture of experts, is not supported; {OURS}"))
            }
            Some(other) => Err(format!("model_type \"{other}\" is not supported; {OURS}")),
        }
    }
}

impl File {
    fn refuse(&self) -> Result<(), String> {
        if let Some(how) = &self.quantization_config {
            return Err(quantized(how));
        }
        let whole = [
            ("pruned_heads", &self.pruned_heads, "the heads of all layers must be alike"),
            ("per_layer_config", &self.per_layer_config, "all layers must be alike"),
            (
                "transformers_weights",
                &self.transformers_weights,
                "weights are read from model.safetensors or its shards",
            ),
            ("configuration_files", &self.configuration_files, "the model is described by config.json alone"),
        ];
        if let Some((name, _, instead)) = whole.iter().find(|(_, value, _)| value.is_some()) {
            return Err(format!("{name} is not supported; {instead}"));
        }
        if !["silu", "swish"].contains(&self.hidden_act.as_str()) {
            let act = &self.hidden_act;
            return Err(format!(
                "hidden_act \"{act}\" is not supported; this program has \"silu\", which Qwen2 was trained with"
            ));
        }
        if self.is_causal == Some(false) {
            return Err("is_causal = false is not supported: a token sees only those before it".into());
        }
        if self.is_encoder_decoder == Some(true) {
            return Err("is_encoder_decoder = true is not supported: Qwen2 has no encoder".into());
        }
        if self.attention_dropout != 0.0 {
            let dropout = self.attention_dropout;
            return Err(format!(
                "attention_dropout = {dropout} is not supported; 0.0 gives the same numbers but in training"
            ));
        }
        let (heads, width) = (self.num_attention_heads, self.hidden_size);
        match self.head_dim {
            Some(dim) if heads.checked_mul(dim) != Some(width) => Err(format!(
                "head_dim = {dim} is not supported with hidden_size = {width} and num_attention_heads = {heads}: heads are hidden_size / num_attention_heads wide"
            )),
            _ => self.refuse_windows(),
        }
    }

    /// Refuses layers with a sliding window, which it finds as `Qwen2Config` does.
    fn refuse_windows(&self) -> Result<(), String> {
        const WHOLE: [&str; 2] = ["full_attention", "attention"]; // the second by an old name
        let layers = self.num_hidden_layers;
        if let Some(types) = &self.layer_types {
            if let Some(other) = types.iter().find(|kind| !WHOLE.contains(&kind.as_str())) {
                return Err(format!(
                    "layer_types has \"{other}\", which is not supported; this program has full_attention"
                ));
            }
            if types.len() != layers {
                return Err(format!("layer_types has {} layers, but num_hidden_layers = {layers}", types.len()));
            }
            return Ok(());
        }
        match self.sliding_window {
            Some(window) if self.use_sliding_window && self.max_window_layers < layers => Err(format!(
                "use_sliding_window with sliding_window = {window} is not supported for the layers from max_window_layers = {} on",
                self.max_window_layers
            )),
            _ => Ok(()),
        }
    }
}

fn quantized(how: &Value) -> String {
    let flag = |name: &str| how.get(name) == Some(&Value::Bool(true));
    let method = match how.get("quant_method").and_then(Value::as_str) {
        Some(method) => method,
        None if flag("load_in_4bit") || flag("load_in_8bit") => "bitsandbytes",
        None => "of no named method",
    };
    format!("quantization_config ({method}) is not supported; use the model's weights in bf16, f16 or f32")
}

impl TryFrom<File> for Config {
    type Error = String;

    fn try_from(file: File) -> Result<Self, String> {
        file.kind.check()?;
        file.refuse()?;
        let positions = file.max_position_embeddings;
        let config = Self {
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: file.num_attention_heads,
            num_key_value_heads: file.num_key_value_heads.unwrap_or(file.num_attention_heads),
            head_dim: None,
            attention_bias: true,
            max_position_embeddings: positions,
            rms_norm_eps: file.rms_norm_eps,
            rope: RopeParameters::read(&file.rope.entries(positions)?, positions)?,
            tie_word_embeddings: file.tie_word_embeddings,
            initializer_range: file.initializer_range,
            pad_token_id: file.pad_token_id.map(|id| padding(id, file.vocab_size)).transpose()?,
        };
        config.check()?;
        Ok(config)
    }
}

/// Checks the padding token. Negative ids count from the end, as in PyTorch.
fn padding(id: i64, vocabulary: usize) -> Result<u32, String> {
    let size = vocabulary as i64;
    let row = if id < 0 { id.saturating_add(size) } else { id };
    match u32::try_from(row) {
        Ok(row) if i64::from(row) < size => Ok(row),
        _ => Err(format!("pad_token_id = {id} is not in the vocabulary of {vocabulary}")),
    }
}
