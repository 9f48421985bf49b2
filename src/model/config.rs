//! The shape of a Qwen2 transformer, read from a Hugging Face `config.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The largest size of anything but the blocks; with [`MAX_LAYERS`] no product of sizes overflows.
const MAX_SIZE: usize = 1 << 24;

/// The most blocks: an order of magnitude more than the deepest model has.
const MAX_LAYERS: usize = 1 << 10;

/// The most numbers of a rotary table, positions times half a head: what a million positions of a common head take, 512 MiB.
/// Nothing else in a model directory vouches for the positions, and the tables are made before the first one is used.
const MAX_ROPE_NUMBERS: usize = 1 << 26;

/// The fields of `config.json` that decide shapes and numbers; others are kept by whoever copies the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Must be `qwen2`.
    pub model_type: String,
    /// V, rows of the embedding table.
    pub vocab_size: usize,
    /// D, width of the residual stream.
    pub hidden_size: usize,
    /// F, width of the MLP.
    pub intermediate_size: usize,
    /// L, number of blocks.
    pub num_hidden_layers: usize,
    /// H, number of query heads.
    pub num_attention_heads: usize,
    /// K, number of key and value heads; each serves H / K query heads.
    pub num_key_value_heads: usize,
    /// The longest sequence the positions were trained for [tokens].
    pub max_position_embeddings: usize,
    /// Added to the mean square in each RMS norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the LM head is the embedding table.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Standard deviation of a random start.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f32,
    /// Sliding-window attention, which is not supported.
    #[serde(default)]
    pub use_sliding_window: bool,
}

fn default_initializer_range() -> f32 {
    0.02
}

impl Config {
    /// Reads `config.json` in a model directory.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Model`] when it describes no Qwen2 model that can be run.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let config: Self = serde_json::from_str(&text).map_err(|err| Error::model(&path, err.to_string()))?;
        config.check().map_err(|what| Error::model(&path, what))?;
        Ok(config)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.model_type != "qwen2" {
            return Err(format!("model_type \"{}\" is not supported; this program runs \"qwen2\"", self.model_type));
        }
        if self.use_sliding_window {
            return Err("use_sliding_window is not supported".into());
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        let layers = ("num_hidden_layers", self.num_hidden_layers);
        let mut limits = sizes.iter().map(|size| (size, MAX_SIZE)).chain([(&layers, MAX_LAYERS)]);
        if let Some(((name, size), most)) = limits.find(|((_, size), most)| !(1..=*most).contains(size)) {
            return Err(format!("{name} = {size} is out of range: 1 to {most}"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err("num_attention_heads is not a multiple of num_key_value_heads".into());
        }
        if !self.hidden_size.is_multiple_of(2 * self.num_attention_heads) {
            return Err("hidden_size / num_attention_heads is not an even number".into());
        }
        let (positions, half) = (self.max_position_embeddings, self.head_dim() / 2);
        if positions * half > MAX_ROPE_NUMBERS {
            let most = MAX_ROPE_NUMBERS / half;
            return Err(format!(
                "max_position_embeddings = {positions} is out of range: at most {most} with such heads"
            ));
        }
        self.check_reals()
    }

    fn check_reals(&self) -> std::result::Result<(), String> {
        let reals = [
            ("rms_norm_eps", f64::from(self.rms_norm_eps), 0.0),
            ("rope_theta", self.rope_theta, 1.0),
            ("initializer_range", f64::from(self.initializer_range), 0.0),
        ];
        match reals.iter().find(|(_, real, least)| !(real.is_finite() && real >= least)) {
            Some((name, real, least)) => Err(format!("{name} = {real} is out of range: a number from {least} on")),
            None => Ok(()),
        }
    }

    /// E, the width of one head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// K * E, the width of all key heads, and of all value heads.
    #[must_use]
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    /// Of all parameters in f32 [bytes].
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        4 * self
            .parameters()
            .iter()
            .map(|(_, shape)| shape.iter().map(|&length| length as u64).product::<u64>())
            .sum::<u64>()
    }

    /// Name and shape of each trainable tensor in the checkpoint's order: embedding, blocks, final norm, and the LM head if it is
    /// not the embedding. Parameters, gradients and optimizer state all follow it.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (d, f, kv) = (self.hidden_size, self.intermediate_size, self.kv_dim());
        let mut list = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, d])];
        for layer in 0..self.num_hidden_layers {
            let block: [(&str, Vec<usize>); 12] = [
                ("input_layernorm.weight", vec![d]),
                ("self_attn.q_proj.weight", vec![d, d]),
                ("self_attn.q_proj.bias", vec![d]),
                ("self_attn.k_proj.weight", vec![kv, d]),
                ("self_attn.k_proj.bias", vec![kv]),
                ("self_attn.v_proj.weight", vec![kv, d]),
                ("self_attn.v_proj.bias", vec![kv]),
                ("self_attn.o_proj.weight", vec![d, d]),
                ("post_attention_layernorm.weight", vec![d]),
                ("mlp.gate_proj.weight", vec![f, d]),
                ("mlp.up_proj.weight", vec![f, d]),
                ("mlp.down_proj.weight", vec![d, f]),
            ];
            list.extend(block.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
        }
        list.push(("model.norm.weight".to_owned(), vec![d]));
        if !self.tie_word_embeddings {
            list.push(("lm_head.weight".to_owned(), vec![self.vocab_size, d]));
        }
        list
    }
}
