//! Tensors only: the Qwen2 transformer, written once for sampling and training.
//!
//! Knows nothing of text, records, sampling or losses. Shapes are given in the letters of [`Config`]: T tokens, D width, F MLP
//! width, H query heads, K key and value heads, E head width, V vocabulary, L layers.

mod config;

use std::path::Path;

use crate::error::Result;

pub use config::Config;

/// A transformer with its weights in f32: memory-mapped from a checkpoint, or owned once they are trained.
pub struct Model {}

/// Keys (after rope) and values of a run of positions in every layer; memory for `capacity` positions is taken at once.
pub struct KvCache {}

/// One sequence's part in a decode step.
pub struct DecodeRow<'a> {
    /// The token whose successor is wanted.
    pub token: u32,
    /// Keys and values of the prompt, shared by its group.
    pub prompt: &'a KvCache,
    /// Keys and values of the tokens since; the step appends `token`'s.
    pub own: &'a mut KvCache,
}

/// Sequences laid end to end without padding.
pub struct Packed {
    /// All tokens, `[T]`.
    pub tokens: Vec<u32>,
    /// First token of each sequence, and T at the end.
    pub starts: Vec<usize>,
}

/// A token whose log-probability is wanted: `tokens[row + 1]` given everything of its sequence up to `row`.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Index into [`Packed::tokens`] of the token before it.
    pub row: usize,
    /// The token itself.
    pub token: u32,
}

/// What the head says of one target.
#[derive(Debug, Clone, Copy)]
pub struct TokenStats {
    /// Log-probability of the token [nats].
    pub logprob: f32,
    /// Entropy of its distribution [nats].
    pub entropy: f32,
}

/// One buffer a parameter, in the order of [`Config::parameters`].
pub struct Gradients(pub Vec<Vec<f32>>);

impl KvCache {
    /// An empty cache with room for `capacity` positions.
    pub fn new(_config: &Config, _capacity: usize) -> Self {
        todo!()
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        todo!()
    }
}

impl Model {
    /// Maps the weights of a Hugging Face model directory into memory.
    pub fn load(_dir: &Path) -> Result<Self> {
        todo!()
    }

    /// Random weights as transformers initialises them: normal with `initializer_range`, biases 0, norms 1.
    pub fn random(_config: Config, _seed: u64) -> Self {
        todo!()
    }

    /// Writes `model.safetensors`.
    pub fn save(&self, _path: &Path) -> Result<()> {
        todo!()
    }

    /// The shape.
    pub fn config(&self) -> &Config {
        todo!()
    }

    /// Runs a prompt: its keys and values, and the logits `[V]` after its last token.
    pub fn prefill(&self, _tokens: &[u32]) -> (KvCache, Vec<f32>) {
        todo!()
    }

    /// One step of many sequences: appends each row's token and writes the logits after it to `logits`, `[rows, V]`.
    ///
    /// A row's logits are the same bits whatever else is in the batch, and the same as [`Model::prefill`]'s and the trainer's.
    pub fn decode(&self, _rows: &mut [DecodeRow<'_>], _logits: &mut [f32]) {
        todo!()
    }

    /// Log-probabilities and entropies of `targets` (in ascending `row` order) at a temperature; nothing is kept for a backward.
    pub fn logprobs(&self, _batch: &Packed, _targets: &[Target], _temperature: f32) -> Vec<TokenStats> {
        todo!()
    }

    /// As [`Model::logprobs`], and adds to `gradients` those of a loss given by its derivative after each log-probability:
    /// `slope(i, logprob)` = dLoss / dlogprob of `targets[i]`, called once for each target in order.
    pub fn accumulate(
        &self,
        _batch: &Packed,
        _targets: &[Target],
        _temperature: f32,
        _gradients: &mut Gradients,
        _slope: &mut dyn FnMut(usize, f32) -> f32,
    ) -> Vec<TokenStats> {
        todo!()
    }

    /// The parameters, in the order of [`Config::parameters`]; copied out of the memory map the first time.
    pub fn parameters_mut(&mut self) -> Vec<&mut [f32]> {
        todo!()
    }
}

impl Gradients {
    /// All zero, in the model's shapes.
    pub fn zeros(_config: &Config) -> Self {
        todo!()
    }
}
