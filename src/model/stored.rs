//! The parameters of a model as files and optimizers see them: by name, in order, as numbers.

use std::path::Path;
use std::sync::OnceLock;

use super::adapter::Adapter;
use super::matmul::{ROWS_AT_ONCE, WeightPart};
use super::weights::{self, ParameterValues};
use super::{Config, Model};
use crate::directory::WEIGHTS;
use crate::error::Result;
use crate::numbers::dtype::Dtype;
use crate::numbers::tensors::{self, Tensor};

/// The metadata that transformers requires in a weight file.
pub(super) const FORMAT: (&str, &str) = ("format", "pt");

/// A parameter in training, and what is to be packed again when its numbers have changed.
pub struct TrainableParts<'a> {
    /// The numbers.
    pub values: &'a mut [f32],
    /// Numbers that belong to a part; fewer for the last.
    pub numbers_of_a_part: usize,
    /// The parts of its form for products in bf16; none if it has no such form.
    pub parts: Vec<WeightPart<'a>>,
}

impl Model {
    /// Random weights as transformers initialises them: matrices normal with `initializer_range`, biases 0, norms 1.
    #[must_use]
    pub fn random(config: Config, seed: u64) -> Self {
        let weights = weights::random(&config, seed);
        Self::new(config, weights)
    }

    /// Writes `model.safetensors` as transformers reads it, with tied weights once.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn save(&self, path: &Path, storage: Dtype) -> Result<()> {
        tensors::write(path, FORMAT, storage, &self.tensors())
    }

    /// Writes what training changes into a checkpoint's directory: the weights in f32, or the adapter.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn save_trained(&self, dir: &Path) -> Result<()> {
        match &self.adapter {
            Some(adapter) => adapter.save(dir, &self.source),
            None => self.save(&dir.join(WEIGHTS), Dtype::F32),
        }
    }

    /// Writes all weights in f32 for the sampler of a running job, into a new file or over one without readers; not synced to the disk.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn hand_over(&self, path: &Path) -> Result<()> {
        tensors::write_mapped(path, FORMAT, Dtype::F32, &self.tensors())
    }

    pub(super) fn tensors(&self) -> Vec<Tensor<'_>> {
        let named = self.stored.named().into_iter().zip(self.parameters());
        named.map(|((name, shape), values)| Tensor { name, shape, values }).collect()
    }

    /// The parameters, in the order of [`Config::stored`].
    #[must_use]
    pub fn parameters(&self) -> Vec<&[f32]> {
        self.weights.iter().map(ParameterValues::values).collect()
    }

    /// The parameters, mutable, in the order of [`Config::stored`]; copied out of the memory map the first time.
    pub fn parameters_mut(&mut self) -> Vec<&mut [f32]> {
        assert!(self.packed.is_empty(), "their packed forms would stay as they are: see `trainable_parts`");
        self.panels.fill_with(OnceLock::new);
        self.weights.iter_mut().map(ParameterValues::values_mut).collect()
    }

    /// Names and shapes of what is trained: A and B of the adapter's matrices, or without one [`Config::trainable`].
    #[must_use]
    pub fn trained(&self) -> Vec<(String, Vec<usize>)> {
        self.adapter.as_ref().map_or_else(|| self.trainable.named(), Adapter::named)
    }

    /// What is trained, mutable, in the order of [`Model::trained`], with the parts of packed forms. After a change of an adapter,
    /// [`Model::merge_adapter`] brings the weights up to date.
    pub fn trainable_parts(&mut self) -> Vec<TrainableParts<'_>> {
        if let Some(adapter) = &mut self.adapter {
            let part = |values| TrainableParts { values, numbers_of_a_part: 0, parts: Vec::new() };
            return adapter.values_mut().map(part).collect();
        }
        debug_assert_eq!(self.trainable, self.stored, "all that is stored is trained");
        self.panels.fill_with(OnceLock::new);
        let packed = self.packed.iter_mut().map(Some).chain(std::iter::repeat_with(|| None));
        let parameters = self.weights.iter_mut().zip(self.stored.iter()).zip(packed);
        parameters
            .map(|((values, (_, shape)), packed)| TrainableParts {
                values: values.values_mut(),
                numbers_of_a_part: ROWS_AT_ONCE * shape[shape.len() - 1],
                parts: packed.map_or_else(Vec::new, |packed| packed.parts().collect()),
            })
            .collect()
    }

    /// What is trained, in the order of [`Model::trained`].
    #[must_use]
    pub fn trained_values(&self) -> Vec<&[f32]> {
        self.adapter.as_ref().map_or_else(|| self.parameters(), |adapter| adapter.values().collect())
    }

    /// The same, mutable. After a change of an adapter, [`Model::merge_adapter`] brings the weights up to date.
    pub fn trained_values_mut(&mut self) -> Vec<&mut [f32]> {
        if self.adapter.is_none() {
            return self.parameters_mut();
        }
        self.adapter.iter_mut().flat_map(Adapter::values_mut).collect()
    }
}
