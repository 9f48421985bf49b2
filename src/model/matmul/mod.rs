//! The three products of a linear layer: forward, gradient of its input, gradient of its weight.
//!
//! Every output is one chain of multiply-adds, whose order depends only on its row, its column and the type of the weights. A row's
//! result is therefore bit-identical whatever else is in the batch, on any number of threads, and a sampled log-probability equals
//! the trainer's. BLAS libraries choose the order by the shape of the batch.

#![allow(unsafe_code)] // pointers into disjoint parts of one output; each function checks its bounds first

mod bf16_order;
mod dot;
mod outer;
pub mod tiles;
mod weight_loads;

use crate::numbers::aligned::{AlignedVec, Number};
use dot::DotProduct;
use outer::{Left, OuterProduct, Right};

/// A matrix inside a larger one: row `i` is `data[i * stride..][..width]`.
#[derive(Clone, Copy)]
pub struct MatrixRows<'a> {
    data: &'a [f32],
    stride: usize,
}

/// A mutable [`MatrixRows`].
pub struct MatrixRowsMut<'a> {
    data: &'a mut [f32],
    stride: usize,
}

impl<'a> MatrixRows<'a> {
    /// Columns from `column` on of a matrix whose rows are `stride` long.
    pub fn new(data: &'a [f32], stride: usize, column: usize) -> Self {
        Self { data: &data[column.min(data.len())..], stride }
    }
}

impl<'a> MatrixRowsMut<'a> {
    /// Columns from `column` on of a matrix whose rows are `stride` long.
    pub fn new(data: &'a mut [f32], stride: usize, column: usize) -> Self {
        let column = column.min(data.len());
        Self { data: &mut data[column..], stride }
    }
}

/// The value that the products are added to.
#[derive(Clone, Copy)]
pub enum StartFrom<'a> {
    /// Zero.
    Zero,
    /// The bias, `(N)`.
    Bias(&'a [f32]),
    /// The output's own value: a residual connection.
    Add,
}

/// Multiply-adds below which a product stays on one thread: starting a second thread costs about as much.
const PARALLEL_FROM: usize = 1 << 20;

/// Rows and columns of the register block of dot products: 24 accumulators of the 32 vector registers, and 10 loads for 24
/// multiply-adds. More columns mean fewer loads of x from the second-level cache.
const ROWS: usize = 4;
const COLS: usize = 6;
/// Depth of a block: the rows of the weight, 24 KiB, and of x, 16 KiB, stay in the first-level cache.
const DEPTH: usize = 1024;
/// Rows of x, 1 MiB of a block's depth, that stay in the second-level cache while the weight streams past.
const ROW_PANEL: usize = 256;

/// The weight of a linear layer.
#[derive(Clone, Copy)]
pub struct Weight<'a, W = f32> {
    /// `(N, K)` without gaps.
    pub plain: &'a [W],
    /// The same weight as [`panels`] packs it.
    pub panels: Option<&'a [f32]>,
}

/// Packs a weight `(N, K)` into the layout that [`linear`] reads if K is at most one block deep; `None` for deeper weights, which are
/// read as stored.
///
/// K alone decides, never the batch, so that a sum is always the same chain. Over a short depth, dot products would spend half their
/// time on sums across lanes; over a long one, they can read weights as a file stores them.
pub fn panels<W: Number>(weight: &[W], depth: usize) -> Option<AlignedVec<f32>> {
    (depth <= outer::DEPTH).then(|| outer::panels(weight, depth))
}

/// y = x w^T + start: a linear layer.
///
/// # Shapes
/// - `x`: `(M, K)`, `w`: `(N, K)`, `y`: `(M, N)` inside rows of `y.stride`
pub fn linear<W: Number>(
    x: &[f32],
    w: Weight<'_, W>,
    (m, n, k): (usize, usize, usize),
    start: StartFrom<'_>,
    y: MatrixRowsMut<'_>,
) {
    if m == 0 {
        return;
    }
    assert!(x.len() >= m * k && w.plain.len() >= n * k && y.data.len() >= (m - 1) * y.stride + n);
    if let StartFrom::Bias(bias) = start {
        assert!(bias.len() >= n);
    }
    let (x, y, y_stride) = (x.as_ptr(), y.data.as_mut_ptr(), y.stride);
    if let Some(panels) = w.panels {
        assert!(panels.len() >= n.next_multiple_of(outer::BLOCK_COLS) * k);
        let (a, b) = (Left { data: x, row: k, depth: 1 }, Right::Panels(panels.as_ptr()));
        // SAFETY: bounds asserted above.
        unsafe { OuterProduct { a, b, shape: (m, k, n), start, c: y, c_stride: y_stride }.run() }
    } else {
        // SAFETY: bounds asserted above.
        unsafe { DotProduct { x, w: w.plain.as_ptr(), y, y_stride, start, m, k }.run(n) }
    }
}

/// dx = start + dy w: the gradient of a linear layer's input.
///
/// # Shapes
/// - `dy`: `(M, N)` rows, `w`: `(N, K)`, `dx`: `(M, K)`
pub fn input_gradient(
    dy: MatrixRows<'_>,
    w: &[f32],
    (m, n, k): (usize, usize, usize),
    start: StartFrom<'_>,
    dx: &mut [f32],
) {
    if m == 0 {
        return;
    }
    assert!(dy.data.len() >= (m - 1) * dy.stride + n && w.len() >= n * k && dx.len() >= m * k);
    let a = Left { data: dy.data.as_ptr(), row: dy.stride, depth: 1 };
    let (b, c) = (Right::RowMajor(w.as_ptr()), dx.as_mut_ptr());
    // SAFETY: bounds asserted above.
    unsafe { OuterProduct { a, b, shape: (m, n, k), start, c, c_stride: k }.run() }
}

/// dw += dy^T x: the gradient of a linear layer's weight.
///
/// # Shapes
/// - `dy`: `(M, N)` rows, `x`: `(M, K)`, `dw`: `(N, K)`
pub fn weight_gradient(dy: MatrixRows<'_>, x: &[f32], (m, n, k): (usize, usize, usize), dw: &mut [f32]) {
    if m == 0 {
        return;
    }
    assert!(dy.data.len() >= (m - 1) * dy.stride + n && x.len() >= m * k && dw.len() >= n * k);
    let a = Left { data: dy.data.as_ptr(), row: 1, depth: dy.stride };
    let (b, c) = (Right::RowMajor(x.as_ptr()), dw.as_mut_ptr());
    // SAFETY: bounds asserted above.
    unsafe { OuterProduct { a, b, shape: (n, m, k), start: StartFrom::Add, c, c_stride: k }.run() }
}
