//! The types in which weights, caches and optimizer state are stored, and their names in files.

use std::fmt;

use half::{bf16, f16};
use serde::Serialize;

/// The type of stored numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits: what is trained.
    F32,
    /// 16 bits with the range of f32 and 8 bits of precision.
    Bf16,
    /// 16 bits with 11 bits of precision and a largest number of 65504.
    F16,
}

impl Dtype {
    /// Size of one number (bytes).
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name on the command line, in messages and in the names of GPU kernels: `f32`, `bf16` or `f16`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The name in `config.json` and in PyTorch.
    #[must_use]
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The nearest number of this type, ties to even.
    #[must_use]
    pub fn rounded(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }

    /// Whether `value` is still finite once it is rounded to this type.
    #[must_use]
    pub fn holds(self, value: f32) -> bool {
        match self {
            Self::F32 => value.is_finite(),
            Self::Bf16 => bf16::from_f32(value).is_finite(),
            Self::F16 => f16::from_f32(value).is_finite(),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<Dtype> for safetensors::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}

impl TryFrom<safetensors::Dtype> for Dtype {
    /// The type that this program does not read.
    type Error = safetensors::Dtype;

    fn try_from(stored: safetensors::Dtype) -> Result<Self, Self::Error> {
        match stored {
            safetensors::Dtype::F32 => Ok(Self::F32),
            safetensors::Dtype::BF16 => Ok(Self::Bf16),
            safetensors::Dtype::F16 => Ok(Self::F16),
            other => Err(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn a_type_has_one_name_and_one_size_wherever_it_is_written() {
        for dtype in Dtype::value_variants() {
            let stored = safetensors::Dtype::from(*dtype);
            assert_eq!((stored.try_into(), stored.bitsize()), (Ok(*dtype), 8 * dtype.size()));
            assert_eq!(dtype.to_possible_value().unwrap().get_name(), dtype.name());
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
        }
        assert_eq!(Dtype::try_from(safetensors::Dtype::F64), Err(safetensors::Dtype::F64));
    }
}
