//! The state of AdamW in memory and in its file.

use std::ops::Range;
use std::path::Path;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use half::bf16;

use crate::error::{Error, Result};
use crate::numbers::aligned::{AlignedVec, Number};
use crate::numbers::dtype::Dtype;
use crate::numbers::tensors::{self, Tensor, TensorFile};

/// Running means of gradients and of their squares, in the parameters' shapes and order.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Updates made.
    pub steps: u64,
    pub(crate) held: Held,
}

/// The means in the type they are stored in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Held {
    F32(Means<f32>),
    Bf16(Means<bf16>),
}

/// Means of gradients, and of their squares.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Means<T: Number> {
    pub(crate) first: Vec<AlignedVec<T>>,
    pub(crate) second: Vec<AlignedVec<T>>,
}

const NO_F16: &str = "moments are held in f32 or bf16, which --optimizer-state checks";

/// Parses `--optimizer-state`: the types that moments are stored in between updates, which compute in f32.
pub(super) fn state_type() -> impl TypedValueParser<Value = Dtype> {
    let full = PossibleValue::new(Dtype::F32.name()).help("The type that updates compute in");
    let half =
        PossibleValue::new(Dtype::Bf16.name()).help("Half the memory; the second moment is rounded stochastically");
    PossibleValuesParser::new([full, half]).map(|name| if name == "bf16" { Dtype::Bf16 } else { Dtype::F32 })
}

/// Name and shape of each parameter with moments.
type Parameters = [(String, Vec<usize>)];

/// Makes a row of all numbers from one of those that are held here.
pub type Gather<'a> = &'a mut dyn FnMut(&mut dyn Iterator<Item = f32>) -> Vec<f32>;

/// Prefixes that turn a parameter's name into a moment's.
const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";

impl Moments {
    /// The moments before the first update, all zero. `dtype` is f32 or bf16, as in [`Moments::load`].
    #[must_use]
    pub fn zeros(parameters: &Parameters, dtype: Dtype) -> Self {
        let held = match dtype {
            Dtype::F32 => Held::F32(Means::zeros(parameters)),
            Dtype::Bf16 => Held::Bf16(Means::zeros(parameters)),
            Dtype::F16 => unreachable!("{NO_F16}"),
        };
        Self { steps: 0, held }
    }

    /// Reads what [`Moments::save`] wrote, converting from another type by rounding to the nearest.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`] when the file cannot be read or belongs to other parameters.
    pub fn load(path: &Path, parameters: &Parameters, dtype: Dtype) -> Result<Self> {
        let whole: Vec<_> = parameters.iter().map(|(_, shape)| 0..shape.iter().product()).collect();
        Self::load_parts(path, parameters, &whole, dtype)
    }

    /// Reads the moments of these numbers of each parameter, as [`Moments::load`].
    ///
    /// # Errors
    /// As [`Moments::load`].
    pub fn load_parts(path: &Path, parameters: &Parameters, parts: &[Range<usize>], dtype: Dtype) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let steps = file.note("step").and_then(|step| step.parse().ok());
        let steps = steps.ok_or_else(|| Error::model(path, "no step in its metadata"))?;
        for ((name, shape), prefix) in parameters.iter().flat_map(|one| [(one, FIRST), (one, SECOND)]) {
            if file.shape(&format!("{prefix}{name}"))? != shape {
                return Err(Error::model(path, format!("{prefix}{name} is not of the model's shape {shape:?}")));
            }
        }
        let held = match dtype {
            Dtype::F32 => Held::F32(Means::read(&file, parameters, parts)?),
            Dtype::Bf16 => Held::Bf16(Means::read(&file, parameters, parts)?),
            Dtype::F16 => unreachable!("{NO_F16}"),
        };
        Ok(Self { steps, held })
    }

    /// The moments of all of the parameters' numbers, where these are of some. `gather` is given these, in a row, and returns all; twice.
    #[must_use]
    pub fn whole(&self, parameters: &Parameters, gather: Gather<'_>) -> Self {
        let held = match &self.held {
            Held::F32(means) => Held::F32(means.whole(parameters, gather)),
            Held::Bf16(means) => Held::Bf16(means.whole(parameters, gather)),
        };
        Self { steps: self.steps, held }
    }

    /// Writes both moments of each parameter in their own type, and the count of updates to the file's metadata.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn save(&self, path: &Path, parameters: &Parameters) -> Result<()> {
        let steps = self.steps.to_string();
        match &self.held {
            Held::F32(means) => tensors::write(path, ("step", &steps), Dtype::F32, &means.tensors(parameters)),
            Held::Bf16(means) => tensors::write(path, ("step", &steps), Dtype::Bf16, &means.tensors(parameters)),
        }
    }
}

impl<T: Number> Means<T> {
    fn zeros(parameters: &Parameters) -> Self {
        let zeros = || parameters.iter().map(|(_, shape)| AlignedVec::zeros(shape.iter().product())).collect();
        Self { first: zeros(), second: zeros() }
    }

    fn read(file: &TensorFile, parameters: &Parameters, parts: &[Range<usize>]) -> Result<Self> {
        let read = |prefix: &str| -> Result<Vec<AlignedVec<T>>> {
            let parts = parameters.iter().zip(parts);
            parts.map(|((name, _), part)| file.read_part(&format!("{prefix}{name}"), part.clone())).collect()
        };
        Ok(Self { first: read(FIRST)?, second: read(SECOND)? })
    }

    fn whole(&self, parameters: &Parameters, gather: Gather<'_>) -> Self {
        let mut whole = Self::zeros(parameters);
        for (held, whole) in [(&self.first, &mut whole.first), (&self.second, &mut whole.second)] {
            let row = gather(&mut held.iter().flat_map(|tensor| tensor.iter().map(|number| number.widen())));
            let places = whole.iter_mut().flat_map(|tensor| tensor.iter_mut());
            places.zip(row).for_each(|(place, number)| *place = T::of(number));
        }
        whole
    }

    fn tensors(&self, parameters: &Parameters) -> Vec<Tensor<'_, T>> {
        let mut all = Vec::with_capacity(2 * parameters.len());
        for (prefix, means) in [(FIRST, &self.first), (SECOND, &self.second)] {
            all.extend(parameters.iter().zip(means).map(|((name, shape), values)| Tensor {
                name: format!("{prefix}{name}"),
                shape: shape.clone(),
                values,
            }));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Vec<(String, Vec<usize>)> {
        vec![("a.weight".into(), vec![2, 2]), ("a.bias".into(), vec![3])]
    }

    fn some(state: Dtype) -> Moments {
        let mut moments = Moments::zeros(&parameters(), state);
        moments.steps = 7;
        match &mut moments.held {
            Held::F32(means) => means.second[1].copy_from_slice(&[0.1, 3e-30, 1.0]),
            Held::Bf16(means) => means.second[1].copy_from_slice(&[0.1, 3e-30, 1.0].map(bf16::from_f32)),
        }
        moments
    }

    #[test]
    fn moments_come_back_from_their_file_as_they_are_wanted_and_not_into_another_model() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        for (state, bytes) in [(Dtype::F32, 4), (Dtype::Bf16, 2)] {
            some(state).save(&path, &parameters()).unwrap();
            let file = TensorFile::open(&path).unwrap();
            assert_eq!(file.place("exp_avg.a.bias").unwrap().0.bitsize(), 8 * bytes);
            assert_eq!(Moments::load(&path, &parameters(), state).unwrap(), some(state));
            assert_eq!(Moments::load(&path, &parameters(), Dtype::Bf16).unwrap(), some(Dtype::Bf16));
            let other = [("a.weight".into(), vec![4, 1]), ("a.bias".into(), vec![3])];
            assert_eq!(Moments::load(&path, &other, state).unwrap_err().exit_code(), 1);
        }
    }
}
