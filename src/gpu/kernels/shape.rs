//! What kernels need to know of a model's shape.

use crate::error::{Error, Result};
use crate::gpu::driver::Address;
use crate::gpu::packed::TileRows;
use crate::model::Config;
use crate::numbers::dtype::Dtype;

/// What kernels know of a model's shape.
#[derive(Debug, Clone, Copy)]
pub struct ModelShape {
    /// D.
    pub width: usize,
    /// F.
    pub mlp: usize,
    /// V.
    pub vocabulary: usize,
    /// H.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// E.
    pub dim: usize,
    /// Of the norms.
    pub epsilon: f32,
}

/// Rotary tables: cosines, then sines, and how many positions each holds.
#[derive(Debug, Clone, Copy)]
pub struct RopeTable {
    /// `(positions, E / 2)` twice.
    pub table: Address,
    /// Positions.
    pub positions: usize,
}

impl ModelShape {
    /// Of a model.
    ///
    /// # Errors
    /// [`Error::Device`] when its heads are of a width for which no kernel was compiled.
    pub fn new(config: &Config) -> Result<Self> {
        let dim = config.head_dim();
        if ![16, 32, 64, 128].contains(&dim) {
            return Err(Error::Device(format!("heads are {dim} wide; the GPU's kernels are for 16, 32, 64 or 128")));
        }
        Ok(Self {
            width: config.hidden_size,
            mlp: config.intermediate_size,
            vocabulary: config.vocab_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            dim,
            epsilon: config.rms_norm_eps,
        })
    }

    /// (H + 2 K) E.
    pub fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// `Tiling::WARPS` of `attend.cuh`.
    pub(super) fn attention_warps(&self, dtype: Dtype) -> usize {
        let wide = self.dim > 64;
        match (dtype.size(), wide) {
            (2, true) | (4, false) => 2,
            (2, false) => 4,
            _ => 1,
        }
    }

    /// `Tiling::OWN` of `attend.cuh`.
    #[must_use]
    pub fn tile_rows(&self, dtype: Dtype) -> TileRows {
        TileRows(16 * self.attention_warps(dtype))
    }

    /// Factor of the attention scores.
    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}
