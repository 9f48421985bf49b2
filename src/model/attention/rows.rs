//! The products of attention, a few rows at a time. Each result is a chain of multiply-adds; several chains side by side hide each
//! other's latency. The number of rows that run together does not change the order of a chain.

use crate::model::simd::{self, LANES, Simd, exp, mul_add};

/// The most rows that run together.
pub const ROWS: usize = 8;

/// `[f(0), f(1), ..]`, with the last row's repeated from `rows` on: these compute and write what the last row does.
#[inline(always)]
pub fn each<T, const R: usize>(rows: usize, mut f: impl FnMut(usize) -> T) -> [T; R] {
    std::array::from_fn(|r| f(r.min(rows - 1)))
}

/// `to[r][s]` = sum over e of `x[r][e]` times `columns[e * capacity + s]`, for `s` up to `len` rounded up to whole vectors.
///
/// # Safety
/// The processor has S. Each `x[r]` points at `dim` numbers, each `to[r]` at room for `len` of them rounded up to whole vectors.
#[inline(always)]
pub unsafe fn score<S: Simd, const R: usize>(
    x: [*const f32; R],
    columns: &[f32],
    (dim, capacity, len): (usize, usize, usize),
    to: [*mut f32; R],
) {
    assert!(len <= capacity && capacity.is_multiple_of(LANES) && columns.len() >= dim * capacity);
    for s in (0..len).step_by(LANES) {
        // SAFETY: `s + LANES` is at most `capacity`, which the columns were checked for, and inside the room of each `to[r]`.
        unsafe {
            let mut acc = [S::splat(0.0); R];
            for e in 0..dim {
                let column = S::load(columns.as_ptr().add(e * capacity + s));
                for r in 0..R {
                    acc[r] = S::mul_add(S::splat(*x[r].add(e)), column, acc[r]);
                }
            }
            for r in 0..R {
                S::store(acc[r], to[r].add(s));
            }
        }
    }
}

/// `to[r][e]` += sum over `s` up to `len` of `weights[r][s]` times `x[s * stride + e]`, for `e` up to `dim`.
///
/// # Safety
/// The processor has S. Each `weights[r]` points at `len` numbers, each `to[r]` at `dim`.
#[inline(always)]
pub unsafe fn weigh<S: Simd, const R: usize>(
    weights: [*const f32; R],
    x: &[f32],
    (len, stride, dim): (usize, usize, usize),
    to: [*mut f32; R],
) {
    if len == 0 {
        return;
    }
    assert!(x.len() >= (len - 1) * stride + dim);
    let whole = dim - dim % LANES;
    for e in (0..whole).step_by(LANES) {
        // SAFETY: `e + LANES` is at most `dim`, `s` is below `len`, and x was checked for both.
        unsafe {
            let mut acc: [S::V; R] = std::array::from_fn(|r| S::load(to[r].add(e)));
            for s in 0..len {
                let x = S::load(x.as_ptr().add(s * stride + e));
                for r in 0..R {
                    acc[r] = S::mul_add(S::splat(*weights[r].add(s)), x, acc[r]);
                }
            }
            for r in 0..R {
                S::store(acc[r], to[r].add(e));
            }
        }
    }
    for e in whole..dim {
        // SAFETY: `e` is below `dim`, and `s` below `len`.
        unsafe {
            let mut acc: [f32; R] = std::array::from_fn(|r| *to[r].add(e));
            for s in 0..len {
                for r in 0..R {
                    acc[r] = mul_add::<S>(*weights[r].add(s), x[s * stride + e], acc[r]);
                }
            }
            for r in 0..R {
                *to[r].add(e) = acc[r];
            }
        }
    }
}

/// Probabilities or gradients of scores, `(rows, cols)` in rows of `width`, with at least [`ROWS`] readable numbers after them.
#[derive(Clone, Copy)]
pub struct ScoreMatrix<'a> {
    pub data: &'a [f32],
    pub width: usize,
    pub rows: usize,
    pub cols: usize,
    /// Whether all above the diagonal is zero.
    pub lower: bool,
}

impl ScoreMatrix<'_> {
    /// y[s] += sum over t of self[t][s] x[t], for rows of `dim` numbers.
    ///
    /// # Safety
    /// The processor has S, and y points at `cols` rows of `dim` numbers, `y_stride` apart.
    #[inline(always)]
    pub unsafe fn transposed_times<S: Simd>(
        &self,
        x: &[f32],
        x_stride: usize,
        y: *mut f32,
        (y_stride, dim): (usize, usize),
    ) {
        let Self { data, width, rows, cols, lower } = *self;
        if rows == 0 || cols == 0 {
            return;
        }
        assert!(x.len() >= (rows - 1) * x_stride + dim && data.len() >= (rows - 1) * width + cols + ROWS);
        let whole = dim - dim % LANES;
        for s in (0..cols).step_by(ROWS) {
            let (taken, first) = (ROWS.min(cols - s), if lower { s } else { 0 });
            for e in (0..whole).step_by(LANES) {
                // SAFETY: data and x were checked for `rows`; only rows of y below `cols` are written.
                unsafe {
                    let mut acc = [S::splat(0.0); ROWS];
                    for t in first..rows {
                        let x = S::load(x.as_ptr().add(t * x_stride + e));
                        for (i, acc) in acc.iter_mut().enumerate() {
                            *acc = S::mul_add(S::splat(*data.as_ptr().add(t * width + s + i)), x, *acc);
                        }
                    }
                    for (i, &acc) in acc.iter().enumerate().take(taken) {
                        let y = y.add((s + i) * y_stride + e);
                        S::store(S::mul_add(acc, S::splat(1.0), S::load(y)), y);
                    }
                }
            }
            for (s, e) in (s..s + taken).flat_map(|s| (whole..dim).map(move |e| (s, e))) {
                let sum = |sum, t: usize| mul_add::<S>(data[t * width + s], x[t * x_stride + e], sum);
                // SAFETY: `s` is below `cols`, `e` below `dim`.
                unsafe { *y.add(s * y_stride + e) += (first..rows).fold(0.0, sum) };
            }
        }
    }
}

/// Turns scores, the first `len` of a row of whole vectors, into e^(score - max), the rest into 0; returns max and their sum.
#[inline(always)]
pub fn exponentials<S: Simd>(row: &mut [f32], len: usize) -> (f32, f32) {
    row[len..].fill(f32::NEG_INFINITY);
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in row.as_chunks::<LANES>().0 {
        for (max, x) in lanes.iter_mut().zip(chunk) {
            *max = if *x > *max { *x } else { *max };
        }
    }
    let max = lanes.into_iter().reduce(|max, x| if x > max { x } else { max }).expect("sixteen");
    (max, exp_and_sum::<S>(row, max))
}

/// x becomes e^(x - max); returns the sum in [`LANES`] chains.
#[inline(always)]
pub fn exp_and_sum<S: Simd>(x: &mut [f32], max: f32) -> f32 {
    for x in x.iter_mut() {
        *x = exp::<S>(*x - max);
    }
    let mut lanes = [0.0f32; LANES];
    for chunk in x.chunks(LANES) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    // SAFETY: as many lanes as a load takes.
    unsafe { simd::sum::<S>(S::load(lanes.as_ptr())) }
}
