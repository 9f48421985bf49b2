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
mod span;
mod train;
mod weights;

use std::path::Path;
use std::sync::OnceLock;

use crate::error::Result;
use crate::floats::Floats;
use crate::stop::Stop;
use crate::tensorfile::{self, Storage, Tensor};
use matmul::Weight;

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
    /// Matrices as [`matmul::turned`] gives them, each made when it is first used.
    turned: Vec<OnceLock<Option<Floats>>>,
    rope: ops::Rope,
    stop: Stop,
}

/// One block's weights: matrices `(out, in)`, vectors `(out)`.
struct Layer<'a> {
    input_norm: &'a [f32],
    q: Weight<'a>,
    q_bias: &'a [f32],
    k: Weight<'a>,
    k_bias: &'a [f32],
    v: Weight<'a>,
    v_bias: &'a [f32],
    o: Weight<'a>,
    post_norm: &'a [f32],
    gate: Weight<'a>,
    up: Weight<'a>,
    down: Weight<'a>,
}

/// Weights up to this size stay in a core's own cache, so threads share out sequences instead of each product [bytes].
const CACHED_WEIGHTS: usize = 2 << 20;

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
        let turned = tensors.iter().map(|_| OnceLock::new()).collect();
        Self { config, tensors, turned, rope, stop: Stop::default() }
    }

    /// Lets work on it end early when that is wished; what it then gives is worth nothing, so callers look at `stop` too.
    pub fn stop_with(&mut self, stop: &Stop) {
        self.stop = stop.clone();
    }

    /// The wish that work on it ends.
    #[must_use]
    pub fn stop(&self) -> &Stop {
        &self.stop
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
        self.turned.fill_with(OnceLock::new);
        self.tensors.iter_mut().map(weights::Tensor::to_mut).collect()
    }

    fn fits_a_cores_cache(&self) -> bool {
        self.tensors.iter().map(|tensor| size_of_val(&**tensor)).sum::<usize>() <= CACHED_WEIGHTS
    }

    /// Cosines, then sines of the rotary angles of the first `positions` positions, `(positions, E / 2)` each.
    #[must_use]
    pub fn rope_table(&self, positions: usize) -> Vec<f32> {
        self.rope.table(positions)
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
    fn head(&self) -> Weight<'_> {
        self.matrix(self.head_index(), self.config.hidden_size)
    }

    fn matrix(&self, index: usize, depth: usize) -> Weight<'_> {
        let plain = &*self.tensors[index];
        Weight { plain, turned: self.turned[index].get_or_init(|| matmul::turned(plain, depth)).as_deref() }
    }

    fn head_index(&self) -> usize {
        if self.config.tie_word_embeddings { 0 } else { self.final_norm_index() + 1 }
    }

    fn layer(&self, layer: usize) -> Layer<'_> {
        let first = 1 + LAYER_PARAMETERS * layer;
        let (d, f) = (self.config.hidden_size, self.config.intermediate_size);
        let tensor = |i: usize| &*self.tensors[first + i];
        let matrix = |i: usize, depth| self.matrix(first + i, depth);
        Layer {
            input_norm: tensor(0),
            q: matrix(1, d),
            q_bias: tensor(2),
            k: matrix(3, d),
            k_bias: tensor(4),
            v: matrix(5, d),
            v_bias: tensor(6),
            o: matrix(7, d),
            post_norm: tensor(8),
            gate: matrix(9, d),
            up: matrix(10, d),
            down: matrix(11, f),
        }
    }
}
