//! Reads `config.json` as transformers does. A missing entry gets the default of the family's config class, and an entry that this
//! program does not support is refused by name.
//!
//! Entries that transformers ignores are ignored here too, as are those without effect on what this program computes;
//! `tests/suite/config_fields.rs` lists both and says why for each.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::Config;
use super::family::{Family, ModelKind, Windows};
use crate::model::rope::{RopeParameters, Spelling};

/// Every entry that is read.
#[derive(Deserialize)]
pub(super) struct File {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    /// Null means as many as query heads.
    num_key_value_heads: Option<usize>,
    /// Null means `hidden_size / num_attention_heads`.
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
    attention_dropout: Option<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    is_causal: Option<bool>,
    is_encoder_decoder: Option<bool>,
    /// This and the following change what is computed or where weights are found. Any value but an empty one is refused.
    #[serde(default, deserialize_with = "present")]
    quantization_config: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    pruned_heads: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    per_layer_config: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    transformers_weights: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    configuration_files: Option<Value>,
}

/// Treats null and an empty list or object as missing.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    let value = Option::<Value>::deserialize(from)?;
    Ok(value.filter(|value| *value != Value::Array(Vec::new()) && *value != Value::Object(Map::new())))
}

impl File {
    /// Reads the entries of a `config.json`, and the family that they name.
    ///
    /// # Errors
    /// Names an entry of another type than it must have, or another architecture.
    pub(super) fn read(entries: &Map<String, Value>) -> Result<(Family, Self), String> {
        let family = ModelKind::read(entries)?.family()?;
        // A null counts as missing only where the class says so.
        let with = |own: &Map<String, Value>| {
            let mut all = family.defaults();
            all.extend(own.clone());
            serde_json::from_value::<Self>(Value::Object(all))
        };
        let wrong = |err: serde_json::Error| {
            let one = |(name, value): &(&String, &Value)| {
                let alone = Map::from_iter([((*name).clone(), (*value).clone())]);
                with(&alone).is_err()
            };
            entries.iter().find(one).map_or_else(|| err.to_string(), |(name, value)| format!("{name} = {value}: {err}"))
        };
        Ok((family, with(entries).map_err(wrong)?))
    }

    fn refuse(&self, family: Family) -> Result<(), String> {
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
                "hidden_act \"{act}\" is not supported; this program has \"silu\", which {} models were trained with",
                family.name()
            ));
        }
        if self.is_causal == Some(false) {
            return Err("is_causal = false is not supported: a token sees only those before it".into());
        }
        if self.is_encoder_decoder == Some(true) {
            return Err("is_encoder_decoder = true is not supported: the model has no encoder".into());
        }
        if let Some(dropout) = self.attention_dropout.filter(|dropout| *dropout != 0.0) {
            return Err(format!(
                "attention_dropout = {dropout} is not supported; 0.0 gives the same numbers but in training"
            ));
        }
        let biases = [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)];
        let read = |name| family.traits().biases.contains(name);
        if let Some((name, _)) = biases.iter().find(|(name, bias)| read(name) && *bias == Some(true)) {
            return Err(format!("{name} = true is not supported for {} models", family.name()));
        }
        self.refuse_head_dim(family)?;
        match family.traits().windows {
            Windows::Nowhere => Ok(()),
            Windows::Everywhere => self.refuse_window(),
            Windows::SomeLayers => self.refuse_layers_with_windows(),
        }
    }

    fn refuse_head_dim(&self, family: Family) -> Result<(), String> {
        let (heads, width) = (self.num_attention_heads, self.hidden_size);
        match self.head_dim {
            Some(dim) if !family.traits().reads_head_dim && heads.checked_mul(dim) != Some(width) => Err(format!(
                "head_dim = {dim} is not supported with hidden_size = {width} and num_attention_heads = {heads}: heads are hidden_size / num_attention_heads wide"
            )),
            _ => Ok(()),
        }
    }

    /// Refuses a sliding window of all layers, unless it is as long as any sequence.
    fn refuse_window(&self) -> Result<(), String> {
        let positions = self.max_position_embeddings;
        match self.sliding_window {
            Some(window) if window < positions => Err(format!(
                "sliding_window = {window} is not supported with max_position_embeddings = {positions}; setting max_position_embeddings to {window} gives the same model for sequences that fit the window"
            )),
            _ => Ok(()),
        }
    }

    /// Refuses layers with a sliding window, which it finds as `Qwen2Config` and `Qwen3Config` do.
    fn refuse_layers_with_windows(&self) -> Result<(), String> {
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

impl TryFrom<Map<String, Value>> for Config {
    type Error = String;

    fn try_from(entries: Map<String, Value>) -> Result<Self, String> {
        let (family, file) = File::read(&entries)?;
        file.refuse(family)?;
        let (traits, positions) = (family.traits(), file.max_position_embeddings);
        let config = Self {
            family,
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: file.num_attention_heads,
            num_key_value_heads: file.num_key_value_heads.unwrap_or(file.num_attention_heads),
            head_dim: file.head_dim.filter(|_| traits.reads_head_dim),
            qkv_bias: traits.qkv_bias,
            qk_norm: traits.qk_norm,
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
