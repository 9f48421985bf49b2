//! The backward of attention, which recomputes probabilities from the log-sum-exp that the forward saved.
//!
//! # Source
//! Dao et al. 2022, <https://arxiv.org/abs/2205.14135>, algorithm 4.

use std::ops::Range;

use rayon::prelude::*;

use super::Heads;
use super::packed::{PackedLayout, Transposed};
use super::rows::{ROWS, ScoreMatrix, each, score, weigh};
use crate::model::ops::dot;
use crate::model::simd::{self, Kernel, LANES, Simd, exp};

/// What the forward saves for the backward.
#[derive(Clone, Copy)]
pub struct SavedForward<'a> {
    /// `(T, (H + 2 K) E)` after rope.
    pub qkv: &'a [f32],
    /// `(T, H E)`.
    pub out: &'a [f32],
    /// `(T, H)`.
    pub log_sum: &'a [f32],
}

/// Backward of [`super::attend_packed`]: overwrites `d_qkv` with the gradient of `qkv`.
///
/// # Shapes
/// - `d_out`, `out`: `(T, H E)`; `qkv`, `d_qkv`: `(T, (H + 2 K) E)`; `log_sum`: `(T, H)`
pub fn attend_packed_backward(
    heads: Heads,
    kept: SavedForward<'_>,
    layout: PackedLayout<'_>,
    d_out: &[f32],
    d_qkv: &mut [f32],
) {
    let rows = layout.starts[layout.sequences()];
    assert!(kept.qkv.len() == rows * heads.row() && d_qkv.len() == kept.qkv.len());
    assert!(kept.out.len() == rows * heads.q_width() && d_out.len() == kept.out.len());
    d_qkv.fill(0.0);
    let keys = Transposed::keys_of(heads, kept.qkv, layout);
    let d_qkv = GradientPtr(d_qkv.as_mut_ptr());
    let bundles: Vec<&[Option<usize>]> = layout.prefixes.chunk_by(|_, next| next.is_some()).collect();
    let first = bundles.iter().scan(0, |at, bundle| Some(std::mem::replace(at, *at + bundle.len())));
    let bundles: Vec<_> = first.zip(&bundles).map(|(first, bundle)| first..first + bundle.len()).collect();
    bundles.into_par_iter().for_each(|bundle| {
        (0..heads.kv).into_par_iter().for_each(|kv_head| {
            for sequence in bundle.clone() {
                let task = AttendBackward { heads, kept, layout, keys: &keys, d_out, d_qkv, sequence, kv_head };
                // SAFETY: a task has columns of its own in the rows of its own bundle.
                unsafe { simd::run(task) }
            }
        });
    });
}

/// `(T, (H + 2 K) E)`.
#[derive(Clone, Copy)]
struct GradientPtr(*mut f32);
// SAFETY: each task writes rows and columns that no other task touches; see `attend_packed_backward`.
unsafe impl Send for GradientPtr {}
// SAFETY: see `Send`.
unsafe impl Sync for GradientPtr {}

/// One sequence, and the query heads of one key and value head.
struct AttendBackward<'a> {
    heads: Heads,
    kept: SavedForward<'a>,
    layout: PackedLayout<'a>,
    keys: &'a [Transposed],
    d_out: &'a [f32],
    d_qkv: GradientPtr,
    sequence: usize,
    kv_head: usize,
}

impl Kernel for AttendBackward<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (heads, own, before) =
            (self.heads, self.layout.rows(self.sequence), self.layout.prefix_rows(self.sequence));
        let (row, dim, q_width) = (heads.row(), heads.dim, heads.q_width());
        let (key, value) = (q_width + self.kv_head * dim, q_width + (heads.kv + self.kv_head) * dim);
        let values =
            |rows: Range<usize>| Transposed::of(&self.kept.qkv[rows.start * row..rows.end * row], row, value, dim);
        let values = [values(before.clone()), values(own.clone())];
        let mut scaled = vec![0.0; own.len() * q_width];
        heads.scale_queries(&self.kept.qkv[own.start * row..], own.len(), &mut scaled);
        // Probabilities and gradients of the scores of one head, in rows of `width`: positions of the prefix, then the own ones,
        // then room for the rest of a vector that starts anywhere.
        let width = (before.len() + own.len() + LANES).next_multiple_of(LANES);
        let (mut p, mut ds) = (vec![0.0f32; own.len() * width], vec![0.0f32; own.len() * width]);
        let group = heads.queries / heads.kv;
        for head in self.kv_head * group..(self.kv_head + 1) * group {
            for first in (0..own.len()).step_by(ROWS) {
                let rows = first..(first + ROWS).min(own.len());
                // SAFETY: rows of this task's sequence, whose columns of this head no other task writes.
                unsafe { self.rows::<S>(head, rows, (&scaled, &values), (&mut p, &mut ds, width)) };
            }
            let shape = (row, dim);
            for (cols, from, lower) in [(before.clone(), 0, false), (own.clone(), before.len(), true)] {
                let ds = ScoreMatrix { data: &ds[from..], width, rows: own.len(), cols: cols.len(), lower };
                let p = ScoreMatrix { data: &p[from..], ..ds };
                let (q, d_out) = (own.start * row + head * dim, own.start * q_width + head * dim);
                // SAFETY: `d_qkv` has the rows `cols` with `row` numbers each, of which `key` and `value` start this head's `dim`.
                unsafe {
                    let d_qkv = self.d_qkv.0.add(cols.start * row);
                    ds.transposed_times::<S>(&self.kept.qkv[q..], row, d_qkv.add(key), shape);
                    p.transposed_times::<S>(&self.d_out[d_out..], q_width, d_qkv.add(value), shape);
                }
            }
        }
    }
}

impl AttendBackward<'_> {
    /// Probabilities and gradients of the scores of some query rows of a head, and from these the gradients of the queries.
    #[inline(always)]
    unsafe fn rows<S: Simd>(
        &self,
        head: usize,
        rows: Range<usize>,
        (scaled, values): (&[f32], &[Transposed; 2]),
        (p, ds, width): (&mut [f32], &mut [f32], usize),
    ) {
        let (own, before) = (self.layout.rows(self.sequence), self.layout.prefix_rows(self.sequence));
        let (row, dim, q_width) = (self.heads.row(), self.heads.dim, self.heads.q_width());
        let key = q_width + self.kv_head * dim;
        let (count, at) = (rows.len(), |r: usize| rows.start + r);
        let q = each::<_, ROWS>(count, |r| scaled[at(r) * q_width + head * dim..][..dim].as_ptr());
        let d_out =
            each::<_, ROWS>(count, |r| self.d_out[(own.start + at(r)) * q_width + head * dim..][..dim].as_ptr());
        let (p_rows, ds_rows) = (p[at(0) * width..].as_mut_ptr(), ds[at(0) * width..].as_mut_ptr());
        let parts = [
            (self.layout.prefixes[self.sequence], &values[0], 0, before.start, before.len()),
            (Some(self.sequence), &values[1], before.len(), own.start, rows.end),
        ];
        let parts = || {
            parts.into_iter().filter_map(|(sequence, values, from, start, len)| {
                sequence.map(|sequence| (&self.keys[sequence], values, from, start, len))
            })
        };
        // SAFETY: p and ds have `count` rows of `width` numbers from row `rows.start` on, the others rows of `dim`.
        unsafe {
            for (keys, values, from, _, len) in parts() {
                let to = |rows: *mut f32| each::<_, ROWS>(count, |r| rows.add(r * width + from));
                let shape = (dim, keys.capacity, len);
                score::<S, ROWS>(q, keys.head(self.kv_head, dim), shape, to(p_rows));
                score::<S, ROWS>(d_out, &values.data, shape, to(ds_rows));
            }
            for r in 0..count {
                let row = |rows: *mut f32| std::slice::from_raw_parts_mut(rows.add(r * width), width);
                self.gradients_of_scores::<S>(head, at(r), row(p_rows), row(ds_rows));
            }
            let d_query = self.d_qkv.0.add(own.start * row + head * dim);
            let d_query = each::<_, ROWS>(count, |r| d_query.add(at(r) * row));
            for (_, _, from, start, len) in parts() {
                let weights = each::<_, ROWS>(count, |r| ds_rows.add(r * width + from).cast_const());
                weigh::<S, ROWS>(weights, &self.kept.qkv[start * row + key..], (len, row, dim), d_query);
            }
        }
    }

    /// Replaces, for the query in row `t` of the sequence, the scores in `p` by probabilities, and the products of values with the
    /// gradient in `ds` by gradients of the scores. Both are zero beyond the query's position.
    #[inline(always)]
    fn gradients_of_scores<S: Simd>(&self, head: usize, t: usize, p: &mut [f32], ds: &mut [f32]) {
        let (dim, scale, row) = (self.heads.dim, self.heads.scale(), self.layout.starts[self.sequence] + t);
        let at = row * self.heads.q_width() + head * dim;
        let log_sum = self.kept.log_sum[row * self.heads.queries + head];
        let along = dot::<S>(&self.d_out[at..at + dim], &self.kept.out[at..at + dim]);
        let seen = self.layout.prefix_rows(self.sequence).len() + t + 1;
        let lanes = seen.next_multiple_of(LANES);
        for (p, ds) in p[..lanes].iter_mut().zip(&mut ds[..lanes]) {
            *p = exp::<S>(*p - log_sum);
            *ds = *p * (*ds - along) * scale;
        }
        p[seen..].fill(0.0);
        ds[seen..].fill(0.0);
    }
}
