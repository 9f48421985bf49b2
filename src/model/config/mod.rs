//! The shape of a transformer, read from a Hugging Face `config.json`.

mod family;
mod file;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::rope::RopeParameters;
use crate::directory;
use crate::error::{Error, Result};
use file::File;

pub use family::Family;

/// The largest value of any size but the number of layers; with [`MAX_LAYERS`] no product of sizes overflows.
const MAX_SIZE: usize = 1 << 24;

/// The most layers: ten times as many as the deepest models have.
const MAX_LAYERS: usize = 1 << 10;

/// The most numbers in a rotary table, positions times half a head: 512 MiB, enough for a million positions of a common head.
/// Nothing else in a model directory bounds the positions, and a GPU holds the whole table.
const MAX_ROPE_NUMBERS: usize = 1 << 26;

/// The entries of `config.json` that decide shapes and numbers, as the family's config class in transformers reads them. Serialised, it
/// is a `config.json` again; code that copies the file keeps the other entries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct Config {
    /// The family.
    #[serde(rename = "model_type")]
    pub family: Family,
    /// V, rows of the embedding table.
    pub vocab_size: usize,
    /// D, width of the residual stream.
    pub hidden_size: usize,
    /// F, width of the MLP.
    pub intermediate_size: usize,
    /// L, number of layers.
    pub num_hidden_layers: usize,
    /// H, number of query heads.
    pub num_attention_heads: usize,
    /// K, number of key and value heads; each serves H / K query heads.
    pub num_key_value_heads: usize,
    /// E, if it need not be D / H.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Whether queries, keys and values have biases, by the family.
    #[serde(skip_serializing)]
    pub qkv_bias: bool,
    /// Whether each head of queries and keys goes through an RMS norm before rope, by the family.
    #[serde(skip_serializing)]
    pub qk_norm: bool,
    /// The longest sequence in pretraining (tokens); see [`Config::positions`].
    pub max_position_embeddings: usize,
    /// Added to the mean square in each RMS norm.
    pub rms_norm_eps: f32,
    /// Parameters of the rotary positions.
    #[serde(rename = "rope_parameters")]
    pub rope: RopeParameters,
    /// Whether the LM head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Standard deviation of randomly initialised matrices.
    pub initializer_range: f32,
    /// The token whose embedding gets no gradient from its lookups, as in PyTorch; a tied head still trains it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token_id: Option<u32>,
}

impl Config {
    /// Reads `config.json` in a model directory.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Model`] when it does not describe a model that this program can run, or the
    /// directory is not a model's.
    pub fn load(dir: &Path) -> Result<Self> {
        directory::check(dir)?;
        Self::read(&directory::file_in(dir, directory::CONFIG))
    }

    /// Reads a `config.json` without looking at the rest of its directory.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let wrong = |what: String| Error::model(path, what);
        let entries: Map<String, Value> = serde_json::from_str(&text).map_err(|err| wrong(err.to_string()))?;
        entries.try_into().map_err(wrong)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim.unwrap_or(1)),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        let layers = ("num_hidden_layers", self.num_hidden_layers);
        let mut limits = sizes.iter().map(|size| (size, MAX_SIZE)).chain([(&layers, MAX_LAYERS)]);
        if let Some(((name, size), most)) = limits.find(|((_, size), most)| !(1..=*most).contains(size)) {
            return Err(format!("{name} = {size} is out of range: 1 to {most}"));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"));
        }
        let is_even = match self.head_dim {
            None => self.hidden_size.is_multiple_of(2 * heads),
            Some(dim) => dim.is_multiple_of(2),
        };
        if !is_even {
            let dim =
                self.head_dim.map_or("hidden_size / num_attention_heads".into(), |dim| format!("head_dim = {dim}"));
            return Err(format!("{dim} is not an even number"));
        }
        self.check_reals()?;
        self.check_positions()
    }

    fn check_reals(&self) -> std::result::Result<(), String> {
        let reals = [("rms_norm_eps", self.rms_norm_eps), ("initializer_range", self.initializer_range)];
        match reals.iter().find(|(_, real)| !(real.is_finite() && *real >= 0.0)) {
            Some((name, real)) => Err(format!("{name} = {real} is out of range: a number from 0 on")),
            None => Ok(()),
        }
    }

    fn check_positions(&self) -> std::result::Result<(), String> {
        let (given, positions, half) = (self.max_position_embeddings, self.positions(), self.head_dim() / 2);
        let most = MAX_ROPE_NUMBERS / half;
        if positions <= most {
            return Ok(());
        }
        let what = if positions == given { "" } else { ", lengthened by its rope's factor," };
        Err(format!("max_position_embeddings = {given}{what} is out of range: at most {most} with such heads"))
    }

    /// The longest sequence (tokens).
    #[must_use]
    pub fn positions(&self) -> usize {
        self.rope.positions(self.max_position_embeddings)
    }

    /// E, the width of one head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// H * E, the width of all query heads, and of what attention gives.
    #[must_use]
    pub fn attention_width(&self) -> usize {
        self.num_attention_heads * self.head_dim()
    }

    /// K * E, the width of all key heads, and of all value heads.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }
}

/// Completes a `config.json` for transformers 4 and 5: `model_type`, and the rope's entries in both spellings, for version 4 `rope_theta`
/// and, if there is scaling, `rope_scaling`; for version 5 `rope_parameters`. The latter reads `rope_scaling` first if it is there.
///
/// # Errors
/// Says what is wrong with the entries.
pub fn complete(config: &mut Map<String, Value>) -> std::result::Result<(), String> {
    let (family, file) = File::read(config)?;
    let entries = file.rope.entries(file.max_position_embeddings)?;
    let mut scaling = entries.clone();
    scaling.shift_remove("rope_theta");
    config.insert("rope_theta".into(), entries["rope_theta"].clone());
    if entries["rope_type"] == "default" {
        config.shift_remove("rope_scaling");
    } else {
        config.insert("rope_scaling".into(), Value::Object(scaling));
    }
    config.insert("rope_parameters".into(), Value::Object(entries));
    config.insert("model_type".into(), family.model_type().into());
    Ok(())
}
