//! What kernels need to know of a model's shape.

use crate::error::{Error, Result};
use crate::gpu::driver::Address;
use crate::gpu::packed::TileRows;
use crate::model::Config;
use crate::numbers::dtype::Dtype;

/// A model's shape, as kernels take it.
#[derive(Debug, Clone, Copy)]
pub struct ModelShape {
    /// D, the width of the residual stream.
    pub width: usize,
    /// F, the width of the MLP.
    pub mlp: usize,
    /// V, the size of the vocabulary.
    pub vocabulary: usize,
    /// H, query heads.
    pub heads: usize,
    /// K, key and value heads.
    pub kv_heads: usize,
    /// E, the width of a head.
    pub dim: usize,
    /// (H + K) E, the width of queries and keys before the norms of their heads; 0 without such norms.
    pub normed_qk: usize,
    /// Epsilon of the norms.
    pub epsilon: f32,
}

/// The rotary tables: cosines, then sines.
#[derive(Debug, Clone, Copy)]
pub struct RopeTable {
    /// `(2, positions, E / 2)`.
    pub table: Address,
    /// How many positions the tables have.
    pub positions: usize,
}

impl ModelShape {
    /// The shape of a model.
    ///
    /// # Errors
    /// [`Error::Device`] when no kernel was compiled for the width of its heads.
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
            normed_qk: if config.qk_norm { config.attention_width() + config.kv_width() } else { 0 },
            epsilon: config.rms_norm_eps,
        })
    }

    /// Width of the attention's output, H E.
    pub fn attention_width(&self) -> usize {
        self.heads * self.dim
    }

    /// (H + 2 K) E, the width of queries, keys and values.
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

    /// The factor of the attention scores.
    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}
