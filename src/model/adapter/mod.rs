//! Low-rank adapters (LoRA): a matrix W of the base model becomes W + factor B A, and only A and B are trained.
//!
//! The model holds the sum, so that everything else computes as if there were no adapter, and what a sampler and a trainer compute are the
//! same bits. The gradients of A and B come from the layer's input and the gradient of its output: that of W is never computed.
//!
//! # Source
//! Hu et al. 2021, <https://arxiv.org/abs/2106.09685>; files and names as in PEFT.

mod config;

use std::path::Path;
use std::sync::OnceLock;

use super::matmul::{
    Input, MatrixRows, MatrixRowsMut, Operands, StartFrom, Weight, input_gradient, linear, weight_gradient,
};
use super::stored::FORMAT;
use super::weights::{ParameterValues, StoredArray, uniform};
use super::{Config, Model, Parameter, ParameterList};
use crate::directory::ADAPTER_WEIGHTS;
use crate::error::{Error, Result};
use crate::numbers::aligned::AlignedVec;
use crate::numbers::dtype::Dtype;
use crate::numbers::tensors::{self, Tensor, TensorFile};

use config::module_name;
pub use config::{AdapterConfig, TARGETS, target_name};

/// The adapter of a model.
#[derive(Clone)]
pub(super) struct Adapter {
    config: AdapterConfig,
    /// Those of all layers, in the order of [`TARGETS`] within each.
    pairs: Vec<Pair>,
}

/// The adapter of one matrix.
#[derive(Clone)]
struct Pair {
    layer: usize,
    target: Parameter,
    /// `(out, in)` of the matrix.
    shape: (usize, usize),
    /// `(r, in)`.
    a: AlignedVec<f32>,
    /// `(out, r)`.
    b: AlignedVec<f32>,
    /// W of the base model, `(out, in)`; `None` until the sum first differs from it.
    base: Option<StoredArray<f32>>,
}

/// What PEFT puts before a layer's number.
const PREFIX: &str = "base_model.model.model.layers.";

impl Pair {
    /// Names and shapes of A and B.
    fn named(&self, rank: usize) -> [(String, Vec<usize>); 2] {
        let (out, width) = self.shape;
        let name = |part| format!("{PREFIX}{}.{}.lora_{part}.weight", self.layer, module_name(self.target));
        [(name("A"), vec![rank, width]), (name("B"), vec![out, rank])]
    }
}

/// Pairs without numbers.
fn pairs(shape: &Config, config: &AdapterConfig) -> Vec<Pair> {
    let list = shape.stored();
    let adapted = list.places().filter_map(|(layer, target, shape)| match *shape {
        [out, width] if config.targets.contains(&target) => Some((layer?, target, (out, width))),
        _ => None,
    });
    let pair = |(layer, target, shape)| {
        let (a, b) = (AlignedVec::default(), AlignedVec::default());
        Pair { layer, target, shape, a, b, base: None }
    };
    adapted.map(pair).collect()
}

impl Adapter {
    /// A new adapter, which changes nothing yet: B is zero, and A uniform as PEFT draws it, up to 1 / sqrt(in).
    fn new(shape: &Config, config: AdapterConfig, seed: u64) -> Self {
        let mut pairs = pairs(shape, &config);
        for (i, pair) in pairs.iter_mut().enumerate() {
            let (out, width) = pair.shape;
            (pair.a, pair.b) = (AlignedVec::zeros(config.rank * width), AlignedVec::zeros(out * config.rank));
            let limit = 1.0 / (width as f32).sqrt();
            pair.a.iter_mut().enumerate().for_each(|(j, a)| *a = limit * (2.0 * uniform(seed, i, j) - 1.0));
        }
        Self { config, pairs }
    }

    /// Reads the adapter in `dir` of a model of this shape.
    fn load(dir: &Path, shape: &Config) -> Result<Self> {
        let path = dir.join(ADAPTER_WEIGHTS);
        let file = TensorFile::open(&path)?;
        let mut left = file.names();
        let part = |target| format!(".{}.lora_A.", module_name(target));
        let config = AdapterConfig::load(dir, |target| left.iter().any(|name| name.contains(&part(target))))?;
        let mut pairs = pairs(shape, &config);
        for pair in &mut pairs {
            let named = pair.named(config.rank);
            for ((name, shape), to) in named.into_iter().zip([&mut pair.a, &mut pair.b]) {
                if file.shape(&name)? != shape {
                    let found = file.shape(&name)?;
                    return Err(Error::model(&path, format!("{name} has shape {found:?}, and {shape:?} is expected")));
                }
                *to = file.read(&name)?;
                left.retain(|other| *other != name);
            }
        }
        match left.first() {
            Some(name) => Err(Error::model(&path, format!("{name} belongs to no matrix of a layer of the base model"))),
            None if pairs.is_empty() => Err(Error::model(&path, "it has no adapter of any matrix")),
            None => Ok(Self { config, pairs }),
        }
    }

    /// Names and shapes of what is trained: A and B of each matrix.
    pub fn named(&self) -> Vec<(String, Vec<usize>)> {
        self.pairs.iter().flat_map(|pair| pair.named(self.config.rank)).collect()
    }

    /// The place of a matrix's A among what is trained; that of its B is the next.
    fn place(&self, layer: usize, target: Parameter) -> Option<usize> {
        Some(2 * self.pairs.iter().position(|pair| (pair.layer, pair.target) == (layer, target))?)
    }

    /// Writes the adapter of the model in `base` as PEFT does. A base beside `dir` is named relative to it, so that both can be moved.
    pub fn save(&self, dir: &Path, base: &Path) -> Result<()> {
        let tensors =
            self.named().into_iter().zip(self.values()).map(|((name, shape), values)| Tensor { name, shape, values });
        tensors::write(&dir.join(ADAPTER_WEIGHTS), FORMAT, Dtype::F32, &tensors.collect::<Vec<_>>())?;
        let dir = dir.canonicalize().map_err(Error::io(dir))?;
        let beside = base.file_name().filter(|_| base.parent() == dir.parent());
        let name = beside.map_or_else(|| base.to_owned(), |name| Path::new("..").join(name));
        self.config.save(&dir, &name.to_string_lossy())
    }

    /// A and B of each matrix.
    pub fn values(&self) -> impl Iterator<Item = &[f32]> {
        self.pairs.iter().flat_map(|pair| [&*pair.a, &*pair.b])
    }

    /// A and B of each matrix, to change.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.pairs.iter_mut().flat_map(|pair| [&mut *pair.a, &mut *pair.b])
    }
}

/// The adapter of one matrix of a layer.
#[derive(Debug, Clone, Copy)]
pub struct AdaptedMatrix<'a> {
    /// The layer.
    pub layer: usize,
    /// The matrix.
    pub target: Parameter,
    /// `(out, in)`.
    pub shape: (usize, usize),
    /// The matrix of the base model, `(out, in)`.
    pub base: &'a [f32],
}

/// Where the gradient of a matrix goes.
pub(super) enum MatrixGradient<'a> {
    /// To that of all its numbers, `(out, in)`.
    Whole(&'a mut [f32]),
    /// To those of its adapter.
    LowRank {
        /// `(r, in)`.
        a: &'a [f32],
        /// `(out, r)`.
        b: &'a [f32],
        /// What B A is multiplied by.
        factor: f32,
        /// The gradients of A and B.
        gradients: [&'a mut [f32]; 2],
    },
    /// Nowhere: the matrix stays as it is.
    Frozen,
}

impl MatrixGradient<'_> {
    /// Adds the gradient of a linear layer with weight `w` `(N, K)`, given its input `x` `(M, K)` and that of its output, `dy` `(M, N)`.
    ///
    /// With an adapter: dB += factor dy^T (x A^T), dA += factor (dy B)^T x. These products are in f32.
    pub fn add(
        &mut self,
        dy: MatrixRows<'_>,
        x: &[f32],
        w: Weight<'_>,
        (m, n, k): (usize, usize, usize),
        operands: &mut Operands,
    ) {
        let (a, b, factor, [d_a, d_b]) = match self {
            Self::Whole(gradient) => return weight_gradient(dy, x, w, (m, n, k), gradient, operands),
            Self::LowRank { a, b, factor, gradients } => (*a, *b, *factor, gradients),
            Self::Frozen => return,
        };
        let rank = a.len() / k;
        let [a, b] = [a, b].map(|plain| Weight::F32 { plain, panels: None });
        let mut narrow = std::mem::take(&mut operands.narrow);
        narrow.reuse(m * rank);
        linear(Input::F32(&x[..m * k]), a, (m, rank, k), StartFrom::Zero, MatrixRowsMut::new(&mut narrow, rank, 0));
        narrow.iter_mut().for_each(|u| *u *= factor);
        weight_gradient(dy, &narrow, b, (m, n, rank), d_b, operands);
        input_gradient(dy, b, (m, n, rank), StartFrom::Zero, &mut narrow, operands);
        narrow.iter_mut().for_each(|v| *v *= factor);
        weight_gradient(MatrixRows::new(&narrow, rank, 0), x, a, (m, rank, k), d_a, operands);
        operands.narrow = narrow;
    }
}

impl Model {
    /// The model in `base` with the adapter in `dir`.
    pub(super) fn load_adapted(dir: &Path, base: &Path) -> Result<Self> {
        let mut model = Self::load(base)?;
        let adapter = Adapter::load(dir, model.config())?;
        model = model.adapted(adapter);
        model.merge_adapter();
        Ok(model)
    }

    /// Trains a new adapter in the place of the weights, which were loaded from a directory. A depends on the seed.
    #[must_use]
    pub fn with_adapter(self, config: AdapterConfig, seed: u64) -> Self {
        let adapter = Adapter::new(&self.config, config, seed);
        self.adapted(adapter)
    }

    fn adapted(self, adapter: Adapter) -> Self {
        Self { adapter: Some(adapter), trainable: ParameterList::default(), ..self }
    }

    /// The numbers of its adapter, if it has one.
    #[must_use]
    pub fn adapter(&self) -> Option<&AdapterConfig> {
        self.adapter.as_ref().map(|adapter| &adapter.config)
    }

    /// The matrices that have an adapter, in the order of [`Model::trained`], which has A and B of each.
    #[must_use]
    pub fn adapted_matrices(&self) -> Vec<AdaptedMatrix<'_>> {
        let of = |pair| {
            let &Pair { layer, target, shape, ref base, .. } = pair;
            let place = self.stored.of_layer(layer, target).expect("`pairs` found it there");
            let base = base.as_deref().unwrap_or_else(|| self.weights[place].values());
            AdaptedMatrix { layer, target, shape, base }
        };
        self.adapter.iter().flat_map(|adapter| &adapter.pairs).map(of).collect()
    }

    /// Sets the matrices to the sums of those of the base model and what the adapter adds.
    pub fn merge_adapter(&mut self) {
        let Some(adapter) = &mut self.adapter else { return };
        let (factor, rank) = (adapter.config.factor(), adapter.config.rank);
        let mut operands = Operands::default();
        for pair in &mut adapter.pairs {
            let place = self.stored.of_layer(pair.layer, pair.target).expect("`pairs` found it there");
            let ParameterValues::Matrix(values) = &mut self.weights[place] else {
                unreachable!("a model with an adapter is in f32")
            };
            let base = pair.base.get_or_insert_with(|| values.clone());
            let (sum, (out, width)) = (values.to_mut(), pair.shape);
            sum.copy_from_slice(base);
            let scaled: AlignedVec<f32> = AlignedVec::from(&pair.b.iter().map(|b| factor * b).collect::<Vec<_>>()[..]);
            let a = Weight::F32 { plain: &pair.a, panels: None };
            input_gradient(
                MatrixRows::new(&scaled, rank, 0),
                a,
                (out, rank, width),
                StartFrom::Add,
                sum,
                &mut operands,
            );
            self.panels[place] = OnceLock::new();
            if let Some(packed) = self.packed.get_mut(place) {
                packed.pack(sum, pair.shape);
            }
        }
    }

    /// Where the gradient of the LM head goes, among `all` of what is trained.
    pub(super) fn head_gradient<'a>(&self, all: &'a mut [AlignedVec<f32>]) -> MatrixGradient<'a> {
        match self.trainable.of_head() {
            Some(place) => MatrixGradient::Whole(&mut all[place]),
            None => MatrixGradient::Frozen,
        }
    }

    /// Where the gradient of a matrix of a layer goes, among `all` of what is trained.
    pub(super) fn matrix_gradient<'a>(
        &'a self,
        (layer, target): (usize, Parameter),
        all: &'a mut [AlignedVec<f32>],
    ) -> MatrixGradient<'a> {
        if let Some(place) = self.trainable.of_layer(layer, target) {
            return MatrixGradient::Whole(&mut all[place]);
        }
        let Some(adapter) = &self.adapter else { return MatrixGradient::Frozen };
        let Some(place) = adapter.place(layer, target) else { return MatrixGradient::Frozen };
        let Pair { a, b, .. } = &adapter.pairs[place / 2];
        let [d_a, d_b] = all.get_disjoint_mut([place, place + 1]).expect("they are two");
        MatrixGradient::LowRank { a, b, factor: adapter.config.factor(), gradients: [d_a, d_b] }
    }
}
