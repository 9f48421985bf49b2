//! Tensors only: the Qwen2 transformer, written once for sampling and training.
//!
//! Knows nothing of text, records, sampling or losses. Shapes are given in the letters of [`Config`]: T tokens, D width, F MLP
//! width, H query heads, K key and value heads, E head width, V vocabulary, L layers.
//!
//! On plain f32 slices with kernels of our own: sampler and trainer run the same products in the same order, so the
//! log-probability of a sampled token and the trainer's are the same bits, in any batch. `attention`, `matmul` and `ops` hold the
//! arithmetic, `block` the forward of one block, `infer` and `train` the two ways to use it.

mod attention;
mod backward;
mod block;
mod cache;
mod config;
mod head;
mod infer;
mod matmul;
mod ops;
mod simd;
mod train;
mod weights;

use std::path::Path;

use crate::error::Result;
use crate::tensorfile::{self, Storage, Tensor};

pub use cache::KvCache;
pub use config::Config;
pub use head::Normalizer;
pub use infer::DecodeRow;
pub use train::{Gradients, Packed, Target, TokenStats};
pub use weights::has_weights;

/// A transformer with its weights in f32: memory-mapped from a checkpoint, or owned once they are trained.
pub struct Model {
    config: Config,
    tensors: Vec<weights::Tensor>,
    rope: ops::Rope,
}

/// One block's weights: matrices `(out, in)`, vectors `(out)`.
struct Layer<'a> {
    input_norm: &'a [f32],
    q: &'a [f32],
    q_bias: &'a [f32],
    k: &'a [f32],
    k_bias: &'a [f32],
    v: &'a [f32],
    v_bias: &'a [f32],
    o: &'a [f32],
    post_norm: &'a [f32],
    gate: &'a [f32],
    up: &'a [f32],
    down: &'a [f32],
}

/// Parameters of a block, in the order of [`Config::parameters`].
const LAYER_PARAMETERS: usize = 12;

impl Model {
    /// Maps the weights of a Hugging Face model directory into memory.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when a file cannot be read, [`crate::Error::Model`] when config and weights do not fit together.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = Config::load(dir)?;
        let tensors = weights::load(dir, &config)?;
        Ok(Self::new(config, tensors))
    }

    /// Random weights as transformers initialises them: normal with `initializer_range`, biases 0, norms 1.
    #[must_use]
    pub fn random(config: Config, seed: u64) -> Self {
        let tensors = weights::random(&config, seed);
        Self::new(config, tensors)
    }

    fn new(config: Config, tensors: Vec<weights::Tensor>) -> Self {
        let rope = ops::Rope::new(config.rope_theta, config.head_dim(), config.max_position_embeddings);
        Self { config, tensors, rope }
    }

    /// Writes `model.safetensors` as transformers reads it, tied weights once.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn save(&self, path: &Path, storage: Storage) -> Result<()> {
        let named = self.config.parameters().into_iter().zip(&self.tensors);
        let tensors: Vec<_> = named.map(|((name, shape), values)| Tensor { name, shape, values }).collect();
        tensorfile::write(path, ("format", "pt"), storage, &tensors)
    }

    /// The shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The parameters, in the order of [`Config::parameters`].
    #[must_use]
    pub fn parameters(&self) -> Vec<&[f32]> {
        self.tensors.iter().map(|tensor| &**tensor).collect()
    }

    /// The parameters to change; copied out of the memory map the first time.
    pub fn parameters_mut(&mut self) -> Vec<&mut [f32]> {
        self.tensors.iter_mut().map(weights::Tensor::to_mut).collect()
    }

    fn rope(&self) -> &ops::Rope {
        &self.rope
    }

    /// `(V, D)`.
    fn embedding(&self) -> &[f32] {
        &self.tensors[0]
    }

    fn final_norm(&self) -> &[f32] {
        &self.tensors[self.final_norm_index()]
    }

    fn final_norm_index(&self) -> usize {
        1 + LAYER_PARAMETERS * self.config.num_hidden_layers
    }

    /// `(V, D)`.
    fn head(&self) -> &[f32] {
        &self.tensors[self.head_index()]
    }

    fn head_index(&self) -> usize {
        if self.config.tie_word_embeddings { 0 } else { self.final_norm_index() + 1 }
    }

    fn layer(&self, layer: usize) -> Layer<'_> {
        let first = 1 + LAYER_PARAMETERS * layer;
        let tensor = |i: usize| &*self.tensors[first + i];
        Layer {
            input_norm: tensor(0),
            q: tensor(1),
            q_bias: tensor(2),
            k: tensor(3),
            k_bias: tensor(4),
            v: tensor(5),
            v_bias: tensor(6),
            o: tensor(7),
            post_norm: tensor(8),
            gate: tensor(9),
            up: tensor(10),
            down: tensor(11),
        }
    }
}
