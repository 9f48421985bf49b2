//! The RMS norm of each head of queries and keys, as Qwen3 has it, forward and backward.

#![allow(unsafe_code)] // each kernel works on slices; `unsafe` is the dispatch to an instruction set only

use rayon::prelude::*;

use super::attention::Heads;
use super::ops::{ROW_BLOCK, RmsNorm, RmsNormBackward};
use super::simd;

/// The weights, `(E)` each.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Of query heads.
    pub q: &'a [f32],
    /// Of key heads.
    pub k: &'a [f32],
}

/// What the backward needs.
pub struct BeforeNorms<X> {
    /// Queries and keys, `(T, (H + K) E)`.
    pub qk: X,
    /// 1 / rms of each head, `(T, H + K)`.
    pub scale: X,
}

/// Normalises queries and keys in `qkv`, `(T, (H + 2 K) E)`, in place, and writes what they were.
pub fn head_norms(heads: Heads, norms: HeadNorms<'_>, epsilon: f32, qkv: &mut [f32], kept: BeforeNorms<&mut [f32]>) {
    let (row, width, count) = (heads.row(), heads.qk_width(), heads.queries + heads.kv);
    let rows = qkv.par_chunks_exact_mut(row).zip(kept.qk.par_chunks_exact_mut(width));
    rows.zip(kept.scale.par_chunks_exact_mut(count)).with_min_len(ROW_BLOCK).for_each(|((qkv, qk), scale)| {
        qk.copy_from_slice(&qkv[..width]);
        let (q, k) = qk.split_at(heads.q_width());
        let (to_q, to_k) = qkv[..width].split_at_mut(heads.q_width());
        let (q_scale, k_scale) = scale.split_at_mut(heads.queries);
        for (x, w, y, scale) in [(q, norms.q, to_q, q_scale), (k, norms.k, to_k, k_scale)] {
            // SAFETY: no pointers.
            unsafe { simd::run(RmsNorm { x, w, epsilon, y, scale }) };
        }
    });
}

/// Backward of [`head_norms`]: replaces the gradient of queries and keys in `d_qkv`, `(T, (H + 2 K) E)`, and adds to those of the weights,
/// which may be empty.
pub fn head_norms_backward(
    heads: Heads,
    norms: HeadNorms<'_>,
    kept: BeforeNorms<&[f32]>,
    d_qkv: &mut [f32],
    [d_q, d_k]: [&mut [f32]; 2],
) {
    let (row, width, count) = (heads.row(), heads.qk_width(), heads.queries + heads.kv);
    let blocks = (d_qkv.par_chunks_mut(ROW_BLOCK * row))
        .zip(kept.qk.par_chunks(ROW_BLOCK * width).zip(kept.scale.par_chunks(ROW_BLOCK * count)));
    let partial: Vec<[Vec<f32>; 2]> = blocks
        .map(|(d_qkv, (qk, scale))| {
            let mut dw = [vec![0.0; heads.dim], vec![0.0; heads.dim]];
            let mut dy = vec![0.0; width];
            let kept = qk.chunks_exact(width).zip(scale.chunks_exact(count));
            for (d_qkv, (qk, scale)) in d_qkv.chunks_exact_mut(row).zip(kept) {
                dy.copy_from_slice(&d_qkv[..width]);
                d_qkv[..width].fill(0.0); // the kernel adds
                let [dw_q, dw_k] = &mut dw;
                let (q_dx, k_dx) = d_qkv[..width].split_at_mut(heads.q_width());
                let (q_dy, k_dy) = dy.split_at(heads.q_width());
                let (q, k) = qk.split_at(heads.q_width());
                let (q_scale, k_scale) = scale.split_at(heads.queries);
                let of_q = RmsNormBackward { dy: q_dy, x: q, scale: q_scale, w: norms.q, dx: q_dx, dw: dw_q };
                let of_k = RmsNormBackward { dy: k_dy, x: k, scale: k_scale, w: norms.k, dx: k_dx, dw: dw_k };
                for kernel in [of_q, of_k] {
                    // SAFETY: no pointers.
                    unsafe { simd::run(kernel) };
                }
            }
            dw
        })
        .collect();
    for [q, k] in &partial {
        d_q.iter_mut().zip(q).for_each(|(dw, part)| *dw += part);
        d_k.iter_mut().zip(k).for_each(|(dw, part)| *dw += part);
    }
}
