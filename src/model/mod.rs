//! Tensors only: the Qwen2 transformer, written once for sampling and training.
//!
//! Knows nothing of text, records or losses. Shapes are given in the letters of [`Config`]: T tokens, D width, F MLP
//! width, H query heads, K key and value heads, E head width, V vocabulary, L layers.
//!
//! On plain f32 slices with kernels of our own: sampler and trainer run the same products in the same order, so the
//! log-probability of a sampled token and the trainer's are the same bits, in any batch. `attention`, `matmul`, `ops` and `rope` hold the
//! arithmetic, `block` the forward of one block, `infer` and `train` the two ways to use it.

mod attention;
mod backward;
mod block;
mod cache;
mod config;
mod directory;
mod head;
mod infer;
mod matmul;
mod ops;
mod rope;
mod sampling;
mod simd;
mod slice_pass;
mod threads;
mod train;
mod weights;

use std::path::Path;
use std::sync::OnceLock;

use crate::error::Result;
use crate::numbers::aligned::{Floats, Number};
use crate::numbers::dtype::Dtype;
use crate::numbers::tensors::{self, Tensor};
use crate::process::cancel::Stop;
use matmul::Weight;
use weights::Weights;

pub use cache::KvCache;
pub use config::{CONFIG, Config, spell_rope};
pub use directory::{ADAPTER, INDEX, WEIGHTS, check, has_weights, not_a_directory, unsupported, weight_files};
pub use head::Normalizer;
pub use infer::DecodeRow;
pub use rope::{RopeParameters, Scaling, Yarn};
pub use sampling::Sampling;
pub use train::{Gradients, Packed, Target, TokenStats};

/// A transformer whose weights are held as `W`, memory-mapped from a checkpoint that stores them so. Whatever they are held as, it
/// computes in f32, and as one whose weights are the same numbers in f32: the same bits.
pub struct Transformer<W> {
    config: Config,
    weights: Weights<W>,
    /// Matrices as [`matmul::turned`] gives them, each made when it is first used.
    turned: Vec<OnceLock<Option<Floats>>>,
    rope: rope::Rope,
    stop: Stop,
}

/// A transformer in f32, which can be trained.
pub type Model = Transformer<f32>;

/// What transformers wants a weight file to say of itself.
const FORMAT: (&str, &str) = ("format", "pt");

/// One block's weights: matrices `(out, in)`, vectors `(out)`.
struct Layer<'a, W> {
    input_norm: &'a [f32],
    q: Weight<'a, W>,
    q_bias: &'a [f32],
    k: Weight<'a, W>,
    k_bias: &'a [f32],
    v: Weight<'a, W>,
    v_bias: &'a [f32],
    o: Weight<'a, W>,
    post_norm: &'a [f32],
    gate: Weight<'a, W>,
    up: Weight<'a, W>,
    down: Weight<'a, W>,
}

/// Weights up to this size stay in a core's own cache, so threads share out sequences instead of each product [bytes].
const CACHED_WEIGHTS: usize = 2 << 20;

/// Parameters of a block, in the order of [`Config::parameters`], and how many of them are matrices.
const LAYER_PARAMETERS: usize = 12;
const LAYER_MATRICES: usize = 7;
const LAYER_VECTORS: usize = LAYER_PARAMETERS - LAYER_MATRICES;

impl<W: Number> Transformer<W> {
    /// Maps the weights of a Hugging Face model directory into memory, or converts them where they are stored as other numbers.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when a file cannot be read, [`crate::Error::Model`] when config and weights do not fit together.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = Config::load(dir)?;
        let weights = weights::load(dir, &config)?;
        Ok(Self::new(config, weights))
    }

    fn new(config: Config, weights: Weights<W>) -> Self {
        let rope = rope::Rope::new(&config.rope, config.head_dim(), config.positions());
        let turned = weights.matrices.iter().map(|_| OnceLock::new()).collect();
        Self { config, weights, turned, rope, stop: Stop::default() }
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

    /// The shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What all weights take [bytes].
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let Weights { matrices, vectors } = &self.weights;
        let matrices: usize = matrices.iter().map(|matrix| size_of_val(&**matrix)).sum();
        matrices + vectors.iter().map(|vector| size_of_val(&**vector)).sum::<usize>()
    }

    fn fits_a_cores_cache(&self) -> bool {
        self.weight_bytes() <= CACHED_WEIGHTS
    }

    /// Cosines, then sines of the rotary angles of the first `positions` positions, `(positions, E / 2)` each.
    #[must_use]
    pub fn rope_table(&self, positions: usize) -> Vec<f32> {
        self.rope.table(positions)
    }

    fn rope(&self) -> &rope::Rope {
        &self.rope
    }

    /// `(V, D)`.
    fn embedding(&self) -> &[W] {
        &self.weights.matrices[0]
    }

    fn final_norm(&self) -> &[f32] {
        &self.weights.vectors[LAYER_VECTORS * self.config.num_hidden_layers]
    }

    /// `(V, D)`.
    fn head(&self) -> Weight<'_, W> {
        let own = 1 + LAYER_MATRICES * self.config.num_hidden_layers;
        self.matrix(if self.config.tie_word_embeddings { 0 } else { own }, self.config.hidden_size)
    }

    fn matrix(&self, index: usize, depth: usize) -> Weight<'_, W> {
        let plain = &*self.weights.matrices[index];
        Weight { plain, turned: self.turned[index].get_or_init(|| matmul::turned(plain, depth)).as_deref() }
    }

    fn layer(&self, layer: usize) -> Layer<'_, W> {
        let (d, f) = (self.config.hidden_size, self.config.intermediate_size);
        let vector = |i: usize| &*self.weights.vectors[LAYER_VECTORS * layer + i];
        let matrix = |i: usize, depth| self.matrix(1 + LAYER_MATRICES * layer + i, depth);
        Layer {
            input_norm: vector(0),
            q: matrix(0, d),
            q_bias: vector(1),
            k: matrix(1, d),
            k_bias: vector(2),
            v: matrix(2, d),
            v_bias: vector(3),
            o: matrix(3, d),
            post_norm: vector(4),
            gate: matrix(4, d),
            up: matrix(5, d),
            down: matrix(6, f),
        }
    }
}

/// The same weights in memory of their own, where they are not a file's.
impl Clone for Model {
    fn clone(&self) -> Self {
        Self::new(self.config.clone(), self.weights.clone())
    }
}

impl Model {
    /// Random weights as transformers initialises them: normal with `initializer_range`, biases 0, norms 1.
    #[must_use]
    pub fn random(config: Config, seed: u64) -> Self {
        let weights = weights::random(&config, seed);
        Self::new(config, weights)
    }

    /// Writes `model.safetensors` as transformers reads it, tied weights once.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn save(&self, path: &Path, storage: Dtype) -> Result<()> {
        tensors::write(path, FORMAT, storage, &self.tensors())
    }

    /// The same in f32 for a reader of this moment, into a new file or over one that nobody reads any more.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn hand_over(&self, path: &Path) -> Result<()> {
        tensors::write_mapped(path, FORMAT, Dtype::F32, &self.tensors())
    }

    fn tensors(&self) -> Vec<Tensor<'_>> {
        let named = self.config.parameters().into_iter().zip(self.parameters());
        named.map(|((name, shape), values)| Tensor { name, shape, values }).collect()
    }

    /// The parameters, in the order of [`Config::parameters`].
    #[must_use]
    pub fn parameters(&self) -> Vec<&[f32]> {
        let Weights { matrices, vectors } = &self.weights;
        in_order(&self.config, matrices.iter().map(|tensor| &**tensor), vectors.iter().map(|tensor| &**tensor))
    }

    /// The parameters to change; copied out of the memory map the first time.
    pub fn parameters_mut(&mut self) -> Vec<&mut [f32]> {
        self.turned.fill_with(OnceLock::new);
        let Weights { matrices, vectors } = &mut self.weights;
        let (matrices, vectors) = (matrices.iter_mut(), vectors.iter_mut());
        in_order(&self.config, matrices.map(weights::Tensor::to_mut), vectors.map(weights::Tensor::to_mut))
    }

    fn final_norm_index(&self) -> usize {
        1 + LAYER_PARAMETERS * self.config.num_hidden_layers
    }

    fn head_index(&self) -> usize {
        if self.config.tie_word_embeddings { 0 } else { self.final_norm_index() + 1 }
    }
}

/// Matrices and vectors in the order of [`Config::parameters`].
fn in_order<T>(config: &Config, mut matrices: impl Iterator<Item = T>, mut vectors: impl Iterator<Item = T>) -> Vec<T> {
    let next = |(_, shape): (_, Vec<usize>)| if shape.len() == 2 { matrices.next() } else { vectors.next() };
    config.parameters().into_iter().filter_map(next).collect()
}
