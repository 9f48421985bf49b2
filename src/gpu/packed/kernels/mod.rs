//! The kernels of packed rows as functions: what each reads and writes is checked here before it is launched.

mod backward;
mod head;

pub use backward::*;
pub use head::*;

use super::batch::{PackedBatch, TileRows};
use crate::error::{Error, Result};
use crate::gpu::driver::{Address, Argument, Driver, Grid, Matrix, MatrixProduct};
use crate::gpu::{Buffer, DynBuffer};
use crate::model::Config;
use crate::numbers::dtype::Dtype;

/// No array.
const NONE: Address = Address(0);

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

    /// H E.
    pub fn attention_width(&self) -> usize {
        self.heads * self.dim
    }

    /// (H + 2 K) E.
    pub fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// `Tiling::WARPS` of `kernels/attend.cuh`.
    fn warps(&self, dtype: Dtype) -> usize {
        let wide = self.dim > 64;
        match (dtype.size(), wide) {
            (2, true) | (4, false) => 2,
            (2, false) => 4,
            _ => 1,
        }
    }

    /// `Tiling::OWN` of `kernels/attend.cuh`.
    pub fn tile_rows(&self, dtype: Dtype) -> TileRows {
        TileRows(16 * self.warps(dtype))
    }

    /// Launches one block of an attention kernel for each tile and head.
    pub(super) fn attention(
        &self,
        driver: &dyn Driver,
        (name, dtype): (&str, Dtype),
        [tiles, heads]: [usize; 2],
        arguments: &[Argument],
    ) -> Result<()> {
        let threads = 32 * self.warps(dtype) as u32;
        let blocks = [count(tiles), count(heads), 1];
        driver.launch(
            &format!("{name}_{}_{}", dtype.name(), self.dim),
            Grid { blocks, threads, shared: 0, early: false },
            arguments,
        )
    }

    /// Factor of the scores.
    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

pub(super) fn count(number: usize) -> u32 {
    u32::try_from(number).expect("sizes on the device are below 2^32")
}

/// One block of `threads` for each of `blocks`; none, no launch.
pub(super) fn rows(
    driver: &dyn Driver,
    name: (&str, Dtype),
    [blocks, threads]: [usize; 2],
    arguments: &[Argument],
) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    let grid = Grid { blocks: [count(blocks), 1, 1], threads: count(threads), shared: 0, early: false };
    driver.launch(&format!("{}_{}", name.0, name.1.name()), grid, arguments)
}

/// `x (T, D)` = rows of the embedding `table`.
pub fn embed(
    driver: &dyn Driver,
    batch: &PackedBatch,
    (table, dtype): (Address, Dtype),
    x: &Buffer<f32>,
    shape: &ModelShape,
) -> Result<()> {
    assert!(x.len() >= batch.rows * shape.width);
    let arguments = [batch.tokens().into(), table.into(), x.at(0).into(), shape.width.into()];
    rows(driver, ("embed", dtype), [batch.rows, 128], &arguments)
}

/// What a norm reads.
#[derive(Clone, Copy)]
pub enum NormInput<'a> {
    /// Row by row.
    Rows(&'a Buffer<f32>),
    /// The rows of the first that the second names.
    Picked(&'a Buffer<f32>, &'a Buffer<u32>),
    /// The sum of the first two, which goes to the third; that may be the first.
    Sum(&'a Buffer<f32>, &'a Buffer<f32>, &'a Buffer<f32>),
}

/// `normed (count, D)` = norm of `from` with `weight (D)`.
pub fn norm_rows(
    driver: &dyn Driver,
    from: NormInput<'_>,
    weight: Address,
    (normed, count): (&DynBuffer, usize),
    shape: &ModelShape,
) -> Result<()> {
    let numbers = count * shape.width;
    let (x, index, added, sums) = match from {
        NormInput::Rows(x) => (x, NONE, NONE, NONE),
        NormInput::Picked(x, index) => {
            assert!(index.len() >= count);
            (x, index.at(0), NONE, NONE)
        }
        NormInput::Sum(x, added, sums) => {
            assert!(x.len().min(added.len()).min(sums.len()) >= numbers);
            (x, NONE, added.at(0), sums.at(0))
        }
    };
    assert!(normed.len() >= numbers && (index != NONE || x.len() >= numbers));
    let arguments = [
        x.at(0).into(),
        index.into(),
        added.into(),
        sums.into(),
        weight.into(),
        normed.at(0).into(),
        count.into(),
        shape.width.into(),
        shape.epsilon.into(),
    ];
    rows(driver, ("norm_rows", normed.dtype()), [count.div_ceil(4), 128], &arguments)
}

/// `qkv` = `raw` + `bias`, if there is one, queries and keys turned by the angles of their positions.
pub fn bias_rope(
    driver: &dyn Driver,
    batch: &PackedBatch,
    (raw, bias, rope): (&Buffer<f32>, Option<Address>, RopeTable),
    qkv: &DynBuffer,
    shape: &ModelShape,
) -> Result<()> {
    assert!(raw.len().min(qkv.len()) >= batch.rows * shape.qkv());
    let arguments = [
        raw.at(0).into(),
        bias.unwrap_or(NONE).into(),
        rope.table.into(),
        batch.positions().into(),
        qkv.at(0).into(),
        rope.positions.into(),
        (shape.heads + shape.kv_heads).into(),
        (shape.heads + 2 * shape.kv_heads).into(),
        shape.dim.into(),
    ];
    rows(driver, ("bias_rope", qkv.dtype()), [batch.rows, 128], &arguments)
}

/// `act (T, F)` = silu(gate) * up, of `gate_up (T, 2 F)`.
pub fn swiglu(
    driver: &dyn Driver,
    count: usize,
    gate_up: &DynBuffer,
    act: &DynBuffer,
    shape: &ModelShape,
) -> Result<()> {
    assert!(gate_up.len() >= 2 * count * shape.mlp && act.len() >= count * shape.mlp && act.dtype() == gate_up.dtype());
    let arguments = [gate_up.at(0).into(), act.at(0).into(), shape.mlp.into()];
    rows(driver, ("swiglu", act.dtype()), [count, 256], &arguments)
}

/// `out (T, H E)` and `log_sum (T, H)` of causal attention inside each sequence and over its prefix.
pub fn attend(
    driver: &dyn Driver,
    batch: &PackedBatch,
    qkv: &DynBuffer,
    (out, log_sum): (&DynBuffer, &Buffer<f32>),
    shape: &ModelShape,
) -> Result<()> {
    assert!(qkv.len() >= batch.rows * shape.qkv() && out.len() >= batch.rows * shape.heads * shape.dim);
    assert!(log_sum.len() >= batch.rows * shape.heads && out.dtype() == qkv.dtype());
    let arguments = [
        qkv.at(0).into(),
        batch.sequences().into(),
        batch.query_tile().into(),
        out.at(0).into(),
        log_sum.at(0).into(),
        shape.kv_heads.into(),
        shape.scale().into(),
    ];
    shape.attention(driver, ("attend", qkv.dtype()), [batch.query_tiles, shape.heads], &arguments)
}

/// `out (m, n) = x (m, k)` times the transpose of `weight (n, k)`.
pub fn linear(driver: &dyn Driver, x: Matrix, weight: Matrix, out: Matrix, shape: [usize; 3]) -> Result<()> {
    driver.product(&MatrixProduct { a: x, a_transposed: false, b: weight, b_transposed: true, out, shape, beta: 0.0 })
}
