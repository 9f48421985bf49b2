//! The three products of a linear layer: forward, gradient of its input, gradient of its weight.
//!
//! In f32 every output is one chain of multiply-adds, in bf16 the order of [`tiles`]; either depends only on its row and its column. A row's
//! result is therefore bit-identical whatever else is in the batch, on any number of threads, and a sampled log-probability equals
//! the trainer's. BLAS libraries choose the order by the shape of the batch.

#![allow(unsafe_code)] // pointers into disjoint parts of one output; each function checks its bounds first

mod dot;
mod outer;
pub mod tiles;

use crate::numbers::aligned::{AlignedVec, Number};
use dot::DotProduct;
use outer::{Left, OuterProduct, Right};
use tiles::{Part, STEP, Side, Source, Tiles};

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

/// The weight `(N, K)` of a linear layer, and with it the type that the layer's products are computed in.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Products in f32.
    F32 {
        /// `(N, K)` without gaps.
        plain: &'a [f32],
        /// The same weight as [`panels`] packs it.
        panels: Option<&'a [f32]>,
    },
    /// Products in bf16.
    Bf16(&'a Bf16Weight),
}

/// A weight in bf16, packed for its products.
#[derive(Default, Clone)]
pub struct Bf16Weight {
    /// For y = x w^T.
    forward: Tiles,
    /// For dx = dy w; empty for a model that is not trained.
    backward: Tiles,
}

impl Bf16Weight {
    /// Packs a weight `(N, K)` for the forward product alone, in the memory of another.
    pub fn pack_forward<W: Number>(&mut self, weight: &[W], shape: (usize, usize)) {
        self.forward.pack(Side::Right, Source::Along { data: weight, stride: shape.1, shape });
    }

    /// Packs a weight `(N, K)` for both products, in the memory of another.
    pub fn pack(&mut self, weight: &[f32], (n, k): (usize, usize)) {
        self.pack_forward(weight, (n, k));
        self.backward.pack(Side::Right, Source::Across { data: weight, stride: k, shape: (k, n) });
    }

    /// Cuts it into [`ROWS_AT_ONCE`] rows each, to be packed again on their own.
    pub fn parts(&mut self) -> impl Iterator<Item = WeightPart<'_>> {
        let (k, forward) = (self.backward.outer(), self.forward.parts_by_block(ROWS_AT_ONCE / tiles::BLOCK));
        let both = forward.into_iter().zip(self.backward.parts_by_step());
        both.map(move |(forward, backward)| WeightPart { k, forward, backward })
    }

    /// What it takes (bytes).
    pub fn bytes(&self) -> usize {
        self.forward.bytes() + self.backward.bytes()
    }

    /// Row `row` of the weight, `(K)`.
    pub fn row(&self, row: usize, to: &mut [f32]) {
        self.forward.column(row, to);
    }
}

/// Rows of a weight that are a step of its backward product.
pub const ROWS_AT_ONCE: usize = STEP;

/// Some rows of a bf16 weight.
pub struct WeightPart<'a> {
    k: usize,
    forward: Part<'a>,
    backward: Part<'a>,
}

impl WeightPart<'_> {
    /// Packs the rows, `(rows, K)`.
    pub fn pack(self, rows: &[f32]) {
        let (n, k) = (rows.len() / self.k, self.k);
        self.forward.pack(Side::Right, Source::Along { data: rows, stride: k, shape: (n, k) });
        self.backward.pack(Side::Right, Source::Across { data: rows, stride: k, shape: (k, n) });
    }
}

/// The operands of one product at a time, kept for their memory.
#[derive(Default)]
pub struct Operands {
    left: Tiles,
    right: Tiles,
    /// What passes through an adapter, `(M, r)`.
    pub narrow: AlignedVec<f32>,
}

/// The input of linear layers, `(M, K)`, as the layers' weights need it.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// For weights in f32.
    F32(&'a [f32]),
    /// For weights in bf16.
    Bf16(&'a Tiles),
}

impl Weight<'_> {
    /// The input of this layer, and of others with weights of the same type. `operands` holds it, if need be.
    pub fn input<'a>(&self, x: &'a [f32], shape: (usize, usize), operands: &'a mut Operands) -> Input<'a> {
        match self {
            Self::F32 { .. } => Input::F32(x),
            Self::Bf16(_) => {
                operands.left.pack(Side::Left, Source::Along { data: x, stride: shape.1, shape });
                Input::Bf16(&operands.left)
            }
        }
    }

    /// N, given K.
    pub fn outputs(&self, k: usize) -> usize {
        match self {
            Self::F32 { plain, .. } => plain.len() / k,
            Self::Bf16(packed) => packed.forward.outer(),
        }
    }
}

/// Packs a weight `(N, K)` into the layout that [`linear`] reads if K is at most one block deep; `None` for deeper weights, which are
/// read as stored.
///
/// K alone decides, never the batch, so that a sum is always the same chain. Over a short depth, dot products would spend half their
/// time on sums across lanes; over a long one, they can read weights as a file stores them.
pub fn panels(weight: &[f32], depth: usize) -> Option<AlignedVec<f32>> {
    (depth <= outer::DEPTH).then(|| outer::panels(weight, depth))
}

/// y = x w^T + start: a linear layer.
///
/// # Shapes
/// - `x`: `(M, K)`, `w`: `(N, K)`, `y`: `(M, N)` inside rows of `y.stride`
pub fn linear(
    x: Input<'_>,
    w: Weight<'_>,
    (m, n, k): (usize, usize, usize),
    start: StartFrom<'_>,
    y: MatrixRowsMut<'_>,
) {
    if m == 0 {
        return;
    }
    let (x, plain, panels) = match (x, w) {
        (Input::F32(x), Weight::F32 { plain, panels }) => (x, plain, panels),
        (Input::Bf16(x), Weight::Bf16(packed)) => return tiles::multiply(x, &packed.forward, start, y),
        _ => unreachable!("the input was made by a weight of this type"),
    };
    assert!(x.len() >= m * k && plain.len() >= n * k && y.data.len() >= (m - 1) * y.stride + n);
    if let StartFrom::Bias(bias) = start {
        assert!(bias.len() >= n);
    }
    let (x, y, y_stride) = (x.as_ptr(), y.data.as_mut_ptr(), y.stride);
    if let Some(panels) = panels {
        assert!(panels.len() >= n.next_multiple_of(outer::BLOCK_COLS) * k);
        let (a, b) = (Left { data: x, row: k, depth: 1 }, Right::Panels(panels.as_ptr()));
        // SAFETY: bounds asserted above.
        unsafe { OuterProduct { a, b, shape: (m, k, n), start, c: y, c_stride: y_stride }.run() }
    } else {
        // SAFETY: bounds asserted above.
        unsafe { DotProduct { x, w: plain.as_ptr(), y, y_stride, start, m, k }.run(n) }
    }
}

/// dx = start + dy w: the gradient of a linear layer's input.
///
/// # Shapes
/// - `dy`: `(M, N)` rows, `w`: `(N, K)`, `dx`: `(M, K)`
pub fn input_gradient(
    dy: MatrixRows<'_>,
    w: Weight<'_>,
    (m, n, k): (usize, usize, usize),
    start: StartFrom<'_>,
    dx: &mut [f32],
    operands: &mut Operands,
) {
    if m == 0 {
        return;
    }
    let plain = match w {
        Weight::F32 { plain, .. } => plain,
        Weight::Bf16(packed) => {
            operands.left.pack(Side::Left, Source::Along { data: dy.data, stride: dy.stride, shape: (m, n) });
            return tiles::multiply(&operands.left, &packed.backward, start, MatrixRowsMut::new(dx, k, 0));
        }
    };
    assert!(dy.data.len() >= (m - 1) * dy.stride + n && plain.len() >= n * k && dx.len() >= m * k);
    let a = Left { data: dy.data.as_ptr(), row: dy.stride, depth: 1 };
    let (b, c) = (Right::RowMajor(plain.as_ptr()), dx.as_mut_ptr());
    // SAFETY: bounds asserted above.
    unsafe { OuterProduct { a, b, shape: (m, n, k), start, c, c_stride: k }.run() }
}

/// dw += dy^T x: the gradient of a linear layer's weight `w`.
///
/// # Shapes
/// - `dy`: `(M, N)` rows, `x`: `(M, K)`, `dw`: `(N, K)`
pub fn weight_gradient(
    dy: MatrixRows<'_>,
    x: &[f32],
    w: Weight<'_>,
    (m, n, k): (usize, usize, usize),
    dw: &mut [f32],
    operands: &mut Operands,
) {
    if m == 0 {
        return;
    }
    if let Weight::Bf16(_) = w {
        operands.left.pack(Side::Left, Source::Across { data: dy.data, stride: dy.stride, shape: (n, m) });
        operands.right.pack(Side::Right, Source::Across { data: x, stride: k, shape: (k, m) });
        return tiles::multiply(&operands.left, &operands.right, StartFrom::Add, MatrixRowsMut::new(dw, k, 0));
    }
    assert!(dy.data.len() >= (m - 1) * dy.stride + n && x.len() >= m * k && dw.len() >= n * k);
    let a = Left { data: dy.data.as_ptr(), row: 1, depth: dy.stride };
    let (b, c) = (Right::RowMajor(x.as_ptr()), dw.as_mut_ptr());
    // SAFETY: bounds asserted above.
    unsafe { OuterProduct { a, b, shape: (n, m, k), start: StartFrom::Add, c, c_stride: k }.run() }
}
