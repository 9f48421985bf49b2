//! RMS norm, SwiGLU and biases, forward and backward, row by row.
//!
//! Rows are independent, so blocks of rows run in parallel and the batch never changes a bit of a row. Sums over rows (gradients of norm
//! weights and biases) add blocks in a fixed order, whatever the number of threads.

#![allow(unsafe_code)] // each kernel works on slices; `unsafe` is the dispatch to an instruction set only

use rayon::prelude::*;

use super::simd::{self, Kernel, LANES, Simd, mul_add};

/// Rows per task.
pub const ROW_BLOCK: usize = 32;

/// Sum of `a[i] * b[i]` in [`LANES`] chains.
#[inline(always)]
pub fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_whole, b_whole) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_whole.remainder(), b_whole.remainder());
    // SAFETY: the chunks hold LANES numbers; the caller runs under S.
    unsafe {
        let mut acc = S::splat(0.0);
        for (a, b) in a_whole.zip(b_whole) {
            acc = S::mul_add(S::load(a.as_ptr()), S::load(b.as_ptr()), acc);
        }
        S::store(acc, lanes.as_mut_ptr());
        for (lane, (&a, &b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
            *lane = mul_add::<S>(a, b, *lane);
        }
        simd::sum::<S>(S::load(lanes.as_ptr()))
    }
}

/// Root-mean-square norm of each row: y = x / rms(x) * w.
///
/// # Shapes
/// - `x`, `y`: `(T, D)`; `w`: `(D)`; `scale`: `(T)`, gets 1 / rms for the backward
///
/// # Source
/// Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>, eq. 4, with epsilon inside the root as Qwen2 has it.
pub fn rms_norm(x: &[f32], w: &[f32], epsilon: f32, y: &mut [f32], scale: &mut [f32]) {
    let block = ROW_BLOCK * w.len();
    let blocks = x.par_chunks(block).zip(y.par_chunks_mut(block)).zip(scale.par_chunks_mut(ROW_BLOCK));
    // SAFETY: no pointers.
    blocks.for_each(|((x, y), scale)| unsafe { simd::run(RmsNorm { x, w, epsilon, y, scale }) });
}

/// [`rms_norm`] of some rows.
pub struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub w: &'a [f32],
    pub epsilon: f32,
    pub y: &'a mut [f32],
    pub scale: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let d = self.w.len();
        for ((x, y), scale) in self.x.chunks_exact(d).zip(self.y.chunks_exact_mut(d)).zip(self.scale) {
            *scale = 1.0 / (dot::<S>(x, x) / d as f32 + self.epsilon).sqrt();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(self.w) {
                *y = x * *scale * w;
            }
        }
    }
}

/// Repeats the forward of [`rms_norm`] from the saved scale, bit for bit.
pub fn rms_norm_again(x: &[f32], scale: &[f32], w: &[f32], y: &mut [f32]) {
    let d = w.len();
    y.par_chunks_mut(d).zip(x.par_chunks(d)).zip(scale).with_min_len(ROW_BLOCK).for_each(|((y, x), scale)| {
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * scale * w;
        }
    });
}

/// Backward of [`rms_norm`]: adds to `dx` and `dw`.
///
/// # Shapes
/// - `dy`, `x`, `dx`: `(T, D)`; `scale`: `(T)` of the forward; `w`, `dw`: `(D)`, but `dw` may be empty
pub fn rms_norm_backward(dy: &[f32], x: &[f32], scale: &[f32], w: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let block = ROW_BLOCK * w.len();
    let partial: Vec<Vec<f32>> = (dy.par_chunks(block).zip(x.par_chunks(block)))
        .zip(scale.par_chunks(ROW_BLOCK).zip(dx.par_chunks_mut(block)))
        .map(|((dy, x), (scale, dx))| {
            let mut dw = vec![0.0; w.len()];
            // SAFETY: no pointers.
            unsafe { simd::run(RmsNormBackward { dy, x, scale, w, dx, dw: &mut dw }) };
            dw
        })
        .collect();
    for part in &partial {
        dw.iter_mut().zip(part).for_each(|(dw, part)| *dw += part);
    }
}

/// [`rms_norm_backward`] of some rows.
pub struct RmsNormBackward<'a> {
    pub dy: &'a [f32],
    pub x: &'a [f32],
    pub scale: &'a [f32],
    pub w: &'a [f32],
    pub dx: &'a mut [f32],
    pub dw: &'a mut [f32],
}

impl Kernel for RmsNormBackward<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let d = self.w.len();
        let mut dy_w = vec![0.0f32; d];
        let rows = self.dy.chunks_exact(d).zip(self.x.chunks_exact(d)).zip(self.dx.chunks_exact_mut(d));
        for (((dy, x), dx), &scale) in rows.zip(self.scale) {
            for i in 0..d {
                dy_w[i] = dy[i] * self.w[i];
                self.dw[i] = mul_add::<S>(dy[i] * scale, x[i], self.dw[i]);
            }
            let along = dot::<S>(&dy_w, x) * scale * scale * scale / d as f32;
            for i in 0..d {
                dx[i] += mul_add::<S>(dy_w[i], scale, -along * x[i]);
            }
        }
    }
}

/// act = silu(gate) * up, element by element.
pub fn swiglu(gate: &[f32], up: &[f32], act: &mut [f32]) {
    let block = 1 << 14;
    let blocks = gate.par_chunks(block).zip(up.par_chunks(block)).zip(act.par_chunks_mut(block));
    // SAFETY: no pointers.
    blocks.for_each(|((gate, up), act)| unsafe { simd::run(SwiGlu { gate, up, act }) });
}

struct SwiGlu<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    act: &'a mut [f32],
}

impl Kernel for SwiGlu<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for ((act, &gate), &up) in self.act.iter_mut().zip(self.gate).zip(self.up) {
            *act = gate / (1.0 + simd::exp::<S>(-gate)) * up;
        }
    }
}

/// Backward of [`swiglu`]: replaces `gate` and `up` by their gradients, and `act`, which holds its gradient, by the activation.
pub fn swiglu_backward(gate: &mut [f32], up: &mut [f32], act: &mut [f32]) {
    let block = 1 << 14;
    let blocks = gate.par_chunks_mut(block).zip(up.par_chunks_mut(block)).zip(act.par_chunks_mut(block));
    // SAFETY: no pointers.
    blocks.for_each(|((gate, up), act)| unsafe { simd::run(SwiGluBackward { gate, up, act }) });
}

struct SwiGluBackward<'a> {
    gate: &'a mut [f32],
    up: &'a mut [f32],
    act: &'a mut [f32],
}

impl Kernel for SwiGluBackward<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for ((gate, up), act) in self.gate.iter_mut().zip(self.up).zip(self.act) {
            let (g, u, d) = (*gate, *up, *act);
            let sigmoid = 1.0 / (1.0 + simd::exp::<S>(-g));
            let silu = g * sigmoid;
            *act = silu * u;
            *up = d * silu;
            *gate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        }
    }
}

/// Adds the column sums of `dy`, `(T, N)` rows of `stride` from `column` on, to a bias gradient `(N)`, or to nothing if it is empty.
pub fn bias_gradient(dy: &[f32], stride: usize, column: usize, db: &mut [f32]) {
    for row in dy.chunks_exact(stride) {
        db.iter_mut().zip(&row[column..]).for_each(|(db, dy)| *db += dy);
    }
}
