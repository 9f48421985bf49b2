//! The transformer of Qwen2, Qwen3, Llama and Mistral, written once for sampling and training.
//!
//! It knows nothing of text, records, sampling or losses. Docs give shapes in the letters of [`Config`]: T tokens, D width, F MLP
//! width, H query heads, K key and value heads, E head width, V vocabulary, L layers.
//!
//! It works on plain f32 slices with kernels of its own. Sampler and trainer run the same products in the same order, so the
//! log-probability of a sampled token and the trainer's are the same bits, in any batch.
//!
//! `attention`, `matmul`, `ops` and `rope` hold the arithmetic, `block` and `backward` one layer, `infer` and `train` the two ways to
//! use the model. `tests/suite/plain_transformer.rs` is the same model in a hundred lines of plain f64, which the tests compare this one
//! with: read it first.

mod adapter;
mod attention;
mod backward;
mod batch;
mod block;
mod cache;
mod config;
mod head;
mod head_norms;
mod infer;
mod matmul;
mod ops;
mod parameters;
mod rope;
mod sampling;
mod simd;
mod slice_pass;
mod stored;
mod threads;
mod train;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::directory;
use crate::error::{Error, Result};
use crate::numbers::aligned::AlignedVec;
use crate::numbers::dtype::Dtype;
use crate::process::cancel::Stop;
use adapter::Adapter;
use head_norms::HeadNorms;
use matmul::{Bf16Weight, Weight};
use weights::ParameterValues;

pub use adapter::{AdaptedMatrix, AdapterConfig, TARGETS, target_name};
pub use batch::{Packed, Slope, Target, TokenSlope, TokenStats};
pub use cache::KvCache;
pub use config::{Config, Family, complete};
pub use head::Normalizer;
pub use infer::DecodeRow;
pub use matmul::WeightPart;
pub use parameters::{Parameter, ParameterList};
pub use rope::{Llama3, RopeParameters, Scaling, Yarn};
pub use sampling::Sampling;
pub use stored::TrainableParts;
pub use train::Gradients;

/// How products in this type are computed here: the type, and for bf16 the instructions.
#[must_use]
pub fn compute_name(dtype: Dtype) -> String {
    match dtype {
        Dtype::Bf16 if matmul::tiles::has_matrix_units() => "bf16 by AMX".into(),
        Dtype::Bf16 => format!("bf16 by {}", simd::level().name()),
        _ => dtype.name().into(),
    }
}

/// A transformer with weights in f32, memory-mapped from a checkpoint that stores them so, or in bf16. Products are computed in the type of
/// the weights, with sums in f32; all else in f32.
pub struct Model {
    config: Config,
    stored: ParameterList,
    /// Empty with an adapter.
    trainable: ParameterList,
    /// In the order of `stored`.
    weights: Vec<ParameterValues>,
    /// Matrices as [`matmul::panels`] packs them, on first use; in the order of `stored`.
    panels: Vec<OnceLock<Option<AlignedVec<f32>>>>,
    /// Matrices in f32 that are trained with products in bf16, as those products need them; in the order of `stored`, or empty.
    packed: Vec<Bf16Weight>,
    /// What is trained in the place of the weights, which are then the sums of those in `source` and what it adds.
    adapter: Option<Adapter>,
    /// The directory that the weights were loaded from.
    source: PathBuf,
    rope: rope::RotaryTable,
    stop: Stop,
}

/// The weights of one layer: matrices `(out, in)`, vectors `(out)`.
struct Layer<'a> {
    input_norm: &'a [f32],
    q: Weight<'a>,
    q_bias: Option<&'a [f32]>,
    k: Weight<'a>,
    k_bias: Option<&'a [f32]>,
    v: Weight<'a>,
    v_bias: Option<&'a [f32]>,
    head_norms: Option<HeadNorms<'a>>,
    o: Weight<'a>,
    post_norm: &'a [f32],
    gate: Weight<'a>,
    up: Weight<'a>,
    down: Weight<'a>,
}

/// The size up to which all weights stay in a core's own cache (bytes); threads then share out sequences instead of each product.
const CACHED_WEIGHTS: usize = 2 << 20;

impl Model {
    /// Maps the weights of a Hugging Face model directory into memory, or converts them from another stored type. To those of an adapter's
    /// base model it adds what the adapter does.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when a file cannot be read, [`crate::Error::Model`] when config and weights do not match.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::load_as(dir, Dtype::F32)
    }

    /// Loads the weights of a Hugging Face model directory in f32 or bf16.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub fn load_as(dir: &Path, dtype: Dtype) -> Result<Self> {
        if let Some(base) = directory::base_of(dir)? {
            let model = Self::load_adapted(dir, &base)?;
            return Ok(if dtype == Dtype::Bf16 { model.to_bf16() } else { model });
        }
        let config = Config::load(dir)?;
        let weights = weights::load(dir, &config, dtype, Vec::new())?;
        let source = dir.canonicalize().map_err(Error::io(dir))?;
        Ok(Self { source, ..Self::new(config, weights) })
    }

    /// Replaces the weights by those in a directory of a model of the same shape. After an error there are none.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub fn replace_weights(&mut self, dir: &Path) -> Result<()> {
        let is_half = self.weights.iter().any(|values| matches!(values, ParameterValues::Bf16(_)));
        let dtype = if is_half { Dtype::Bf16 } else { Dtype::F32 };
        let (old, stop) = (std::mem::take(&mut self.weights), self.stop.clone());
        let new = match directory::base_of(dir)? {
            Some(_) => Self::load_as(dir, dtype)?,
            None => {
                let config = Config::load(dir)?;
                let weights = weights::load(dir, &config, dtype, old)?;
                Self::new(config, weights)
            }
        };
        *self = Self { stop, ..new };
        Ok(())
    }

    /// The same model for products in bf16 alone: it is neither saved nor trained.
    #[must_use]
    pub fn to_bf16(&self) -> Self {
        let one = |(values, (_, shape)): (&ParameterValues, (_, &[usize]))| {
            ParameterValues::of(values.values(), shape, Dtype::Bf16)
        };
        let weights = self.weights.iter().zip(self.stored.iter()).map(one).collect();
        Self { stop: self.stop.clone(), ..Self::new(self.config.clone(), weights) }
    }

    /// Computes products in bf16 from now on, from weights that stay in f32; whoever changes them through [`Model::trainable_parts`] packs
    /// them again.
    #[must_use]
    pub fn with_bf16_products(mut self) -> Self {
        let one = |(values, (_, shape)): (&ParameterValues, (_, &[usize]))| {
            let mut packed = Bf16Weight::default();
            if let (ParameterValues::Matrix(values), &[rows, columns]) = (values, shape) {
                packed.pack(values, (rows, columns));
            }
            packed
        };
        self.packed = self.weights.iter().zip(self.stored.iter()).map(one).collect();
        self
    }

    /// A transformer of this shape in f32 or bf16 with the numbers that `read` returns for each parameter, in the order of
    /// [`Config::stored`]. It gets the parameter's layer, if it is in one, the parameter, and its shape.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn from_parameters(
        config: &Config,
        dtype: Dtype,
        mut read: impl FnMut(Option<usize>, Parameter, &[usize]) -> Result<AlignedVec<f32>>,
    ) -> Result<Self> {
        let list = config.stored();
        let one = |(layer, parameter, shape): (Option<usize>, Parameter, &[usize])| {
            Ok(ParameterValues::of(&read(layer, parameter, shape)?, shape, dtype))
        };
        let weights = list.places().map(one).collect::<Result<Vec<_>>>()?;
        Ok(Self::new(config.clone(), weights))
    }

    fn new(config: Config, weights: Vec<ParameterValues>) -> Self {
        let rope = rope::RotaryTable::new(&config.rope, config.head_dim(), config.positions());
        let (stored, trainable) = (config.stored(), config.trainable());
        let panels = weights.iter().map(|_| OnceLock::new()).collect();
        let (adapter, source, stop) = (None, PathBuf::new(), Stop::default());
        Self { config, stored, trainable, weights, panels, packed: Vec::new(), adapter, source, rope, stop }
    }

    /// Lets a request on `stop` end passes early. Their results are then meaningless, so callers check `stop` afterwards.
    pub fn stop_with(&mut self, stop: &Stop) {
        self.stop = stop.clone();
    }

    /// What requests that passes end early.
    #[must_use]
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// The shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The size of all weights (bytes).
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.weights.iter().map(ParameterValues::bytes).sum()
    }

    fn fits_a_cores_cache(&self) -> bool {
        self.weight_bytes() <= CACHED_WEIGHTS
    }

    /// Cosines, then sines of the rotary angles of the first `positions` positions, `(positions, E / 2)` each.
    #[must_use]
    pub fn rope_table(&self, positions: usize) -> Vec<f32> {
        self.rope.table(positions)
    }

    fn rope(&self) -> &rope::RotaryTable {
        &self.rope
    }

    /// The embedding of a token, `(D)`.
    fn embedding(&self, token: u32, to: &mut [f32]) {
        let (row, d, place) = (token as usize, to.len(), self.stored.of_model(Parameter::EmbedTokens).expect(STORED));
        match self.bf16_at(place) {
            Some(weight) => weight.row(row, to),
            None => to.copy_from_slice(&self.weights[place].values()[row * d..][..d]),
        }
    }

    fn final_norm(&self) -> &[f32] {
        self.vector_at(self.stored.of_model(Parameter::FinalNorm)).expect(STORED)
    }

    /// `(V, D)`.
    fn head(&self) -> Weight<'_> {
        self.weight(self.stored.of_head(), self.config.hidden_size)
    }

    fn vector_at(&self, place: Option<usize>) -> Option<&[f32]> {
        place.map(|place| self.weights[place].values())
    }

    fn weight(&self, place: Option<usize>, depth: usize) -> Weight<'_> {
        let place = place.expect(STORED);
        if let Some(weight) = self.bf16_at(place) {
            return Weight::Bf16(weight);
        }
        let (plain, panels) = (self.weights[place].values(), &self.panels[place]);
        Weight::F32 { plain, panels: panels.get_or_init(|| matmul::panels(plain, depth)).as_deref() }
    }

    /// A matrix for products in bf16, if that is what they are computed in.
    fn bf16_at(&self, place: usize) -> Option<&Bf16Weight> {
        match &self.weights[place] {
            ParameterValues::Bf16(weight) => Some(weight),
            _ => self.packed.get(place),
        }
    }

    fn layer(&self, layer: usize) -> Layer<'_> {
        let (d, f, width) = (self.config.hidden_size, self.config.intermediate_size, self.config.attention_width());
        let place = |parameter| self.stored.of_layer(layer, parameter);
        let (vector, matrix) =
            (|parameter| self.vector_at(place(parameter)), |parameter, depth| self.weight(place(parameter), depth));
        Layer {
            input_norm: vector(Parameter::InputNorm).expect(STORED),
            q: matrix(Parameter::QProj, d),
            q_bias: vector(Parameter::QBias),
            k: matrix(Parameter::KProj, d),
            k_bias: vector(Parameter::KBias),
            v: matrix(Parameter::VProj, d),
            v_bias: vector(Parameter::VBias),
            head_norms: vector(Parameter::QNorm).zip(vector(Parameter::KNorm)).map(|(q, k)| HeadNorms { q, k }),
            o: matrix(Parameter::OProj, width),
            post_norm: vector(Parameter::PostNorm).expect(STORED),
            gate: matrix(Parameter::GateProj, d),
            up: matrix(Parameter::UpProj, d),
            down: matrix(Parameter::DownProj, f),
        }
    }
}

/// Of parameters that every family has.
const STORED: &str = "`Config::stored` lists it";

/// Copies weights that are in memory, and shares those that are mapped from a file. The copy of a model that is trained with products in
/// bf16 has its weights in f32, and not their packed forms: it is there to be saved.
impl Clone for Model {
    fn clone(&self) -> Self {
        let (adapter, trainable, source) = (self.adapter.clone(), self.trainable.clone(), self.source.clone());
        Self { adapter, trainable, source, ..Self::new(self.config.clone(), self.weights.clone()) }
    }
}
