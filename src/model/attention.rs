//! Causal attention over grouped heads without a score matrix: one query row at a time, forward and backward.
//!
//! Keys are held transposed, `(K * E, positions)`, so that sixteen positions are scored at once and a score is one chain over E,
//! the same bits in prefill, decode and training. Values are `(positions, K * E)`.
//!
//! # Source
//! Dao et al. 2022, <https://arxiv.org/abs/2205.14135>, algorithm 4 for the backward from the saved log-sum-exp.

#![allow(unsafe_code)] // loads of sixteen lanes at checked offsets

use rayon::prelude::*;

use super::config::Config;
use super::ops::{dot, weighted_rows};
use super::simd::{self, Kernel, LANES, Simd, exp, mul_add};

/// The head layout.
#[derive(Clone, Copy)]
pub struct Heads {
    /// H.
    pub queries: usize,
    /// K.
    pub kv: usize,
    /// E.
    pub dim: usize,
}

impl Heads {
    /// Of a model's shape.
    pub fn of(config: &Config) -> Self {
        Self { queries: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim() }
    }

    /// Width of a row that holds queries, keys and values.
    pub fn row(&self) -> usize {
        (self.queries + 2 * self.kv) * self.dim
    }

    fn kv_width(&self) -> usize {
        self.kv * self.dim
    }

    fn q_width(&self) -> usize {
        self.queries * self.dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// Keys and values of consecutive positions.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Transposed keys: `keys[(head * E + e) * capacity + position]`.
    pub keys: &'a [f32],
    /// Values: `values[position * K * E + head * E + e]`.
    pub values: &'a [f32],
    /// Positions there is room for, a multiple of [`LANES`].
    pub capacity: usize,
    /// Positions held.
    pub len: usize,
}

/// Attention of one query row over the positions of all segments in order.
///
/// # Shapes
/// - `q`, `out`: `(H, E)`; `log_sum`: `(H)`, gets the log-sum-exp of the scaled scores for the backward
/// - `scores`: scratch of at least the positions plus [`LANES`]
pub fn attend(
    heads: Heads,
    q: &[f32],
    segments: &[Segment<'_>],
    scores: &mut [f32],
    out: &mut [f32],
    log_sum: &mut [f32],
) {
    let positions: usize = segments.iter().map(|segment| segment.len).sum();
    assert!(scores.len() >= positions + LANES && log_sum.len() == heads.queries);
    for segment in segments {
        assert!(segment.len <= segment.capacity && segment.capacity.is_multiple_of(LANES));
        assert!(segment.keys.len() >= heads.kv_width() * segment.capacity);
    }
    // SAFETY: the kernel loads keys below `capacity` and scores below `positions + LANES` only.
    unsafe { simd::run(Attend { heads, q, segments, scores, out, log_sum }) }
}

struct Attend<'a> {
    heads: Heads,
    q: &'a [f32],
    segments: &'a [Segment<'a>],
    scores: &'a mut [f32],
    out: &'a mut [f32],
    log_sum: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Heads { queries, kv, dim } = self.heads;
        let positions: usize = self.segments.iter().map(|segment| segment.len).sum();
        for head in 0..queries {
            let kv_head = head / (queries / kv);
            let q = &self.q[head * dim..][..dim];
            let mut from = 0;
            for segment in self.segments {
                // SAFETY: as asserted in `attend`.
                unsafe { score::<S>(q, segment, kv_head, self.heads.scale(), &mut self.scores[from..]) };
                from += segment.len;
            }
            let p = &mut self.scores[..positions];
            let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum = exp_and_sum::<S>(p, max);
            self.log_sum[head] = max + sum.ln();
            let out = &mut self.out[head * dim..][..dim];
            out.fill(0.0);
            let mut p = &*p;
            for segment in self.segments {
                let (here, later) = p.split_at(segment.len);
                weighted_rows::<S>(here, &segment.values[kv_head * dim..], self.heads.kv_width(), out);
                p = later;
            }
            out.iter_mut().for_each(|out| *out /= sum);
        }
    }
}

/// Scores of one query against a segment, sixteen positions at a time; up to fifteen lanes past its end are scratch.
#[inline(always)]
unsafe fn score<S: Simd>(q: &[f32], segment: &Segment<'_>, kv_head: usize, scale: f32, scores: &mut [f32]) {
    let keys = &segment.keys[kv_head * q.len() * segment.capacity..];
    for from in (0..segment.len).step_by(LANES) {
        unsafe {
            let mut acc = S::splat(0.0);
            for (e, &q) in q.iter().enumerate() {
                acc = S::mul_add(S::splat(q * scale), S::load(keys.as_ptr().add(e * segment.capacity + from)), acc);
            }
            S::store(acc, scores.as_mut_ptr().add(from));
        }
    }
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

/// Transposed keys and transposed values of one packed sequence, each `(K * E, capacity)`.
struct Transposed {
    keys: Vec<f32>,
    values: Vec<f32>,
    capacity: usize,
}

impl Transposed {
    fn of(heads: Heads, qkv: &[f32]) -> Self {
        let (row, width) = (heads.row(), heads.kv_width());
        let capacity = (qkv.len() / row).next_multiple_of(LANES);
        let mut both = Self { keys: vec![0.0; width * capacity], values: vec![0.0; width * capacity], capacity };
        for (position, row) in qkv.chunks_exact(row).enumerate() {
            let (keys, values) = row[heads.q_width()..].split_at(width);
            for i in 0..width {
                both.keys[i * capacity + position] = keys[i];
                both.values[i * capacity + position] = values[i];
            }
        }
        both
    }
}

/// Causal attention inside each packed sequence.
///
/// # Shapes
/// - `qkv`: `(T, (H + 2 K) E)` after rope; `starts`: first row of each sequence and T
/// - `out`: `(T, H E)`; `log_sum`: `(T, H)`
pub fn attend_packed(heads: Heads, qkv: &[f32], starts: &[usize], out: &mut [f32], log_sum: &mut [f32]) {
    let sequences = split_mut(out, starts, heads.q_width()).into_iter().zip(split_mut(log_sum, starts, heads.queries));
    let work: Vec<_> = sequences.zip(starts.windows(2)).collect();
    work.into_par_iter().for_each(|((out, log_sum), span)| {
        let qkv = &qkv[span[0] * heads.row()..span[1] * heads.row()];
        let transposed = Transposed::of(heads, qkv);
        let len = span[1] - span[0];
        let values: Vec<f32> =
            qkv.chunks_exact(heads.row()).flat_map(|row| &row[heads.q_width() + heads.kv_width()..]).copied().collect();
        let mut scores = vec![0.0; len + LANES];
        for (t, row) in qkv.chunks_exact(heads.row()).enumerate() {
            let segment =
                Segment { keys: &transposed.keys, values: &values, capacity: transposed.capacity, len: t + 1 };
            let out = &mut out[t * heads.q_width()..][..heads.q_width()];
            let log_sum = &mut log_sum[t * heads.queries..][..heads.queries];
            attend(heads, &row[..heads.q_width()], &[segment], &mut scores, out, log_sum);
        }
    });
}

/// Backward of [`attend_packed`]: writes the gradient of `qkv` into `d_qkv` (which it overwrites).
///
/// # Shapes
/// - `d_out`, `out`: `(T, H E)`; `qkv`, `d_qkv`: `(T, (H + 2 K) E)`; `log_sum`: `(T, H)`
pub fn attend_packed_backward(heads: Heads, kept: Kept<'_>, starts: &[usize], d_out: &[f32], d_qkv: &mut [f32]) {
    let work: Vec<_> = split_mut(d_qkv, starts, heads.row()).into_iter().zip(starts.windows(2)).collect();
    work.into_par_iter().for_each(|(d_qkv, span)| {
        d_qkv.fill(0.0);
        let rows = |x: &'_ [f32], width: usize| -> std::ops::Range<usize> {
            debug_assert!(x.len() >= span[1] * width);
            span[0] * width..span[1] * width
        };
        let task = AttendBackward {
            heads,
            qkv: &kept.qkv[rows(kept.qkv, heads.row())],
            out: &kept.out[rows(kept.out, heads.q_width())],
            log_sum: &kept.log_sum[rows(kept.log_sum, heads.queries)],
            d_out: &d_out[rows(d_out, heads.q_width())],
            d_qkv,
        };
        // SAFETY: the kernel loads lanes below the transposed capacity only.
        unsafe { simd::run(task) }
    });
}

/// What the forward left for the backward.
#[derive(Clone, Copy)]
pub struct Kept<'a> {
    /// `(T, (H + 2 K) E)` after rope.
    pub qkv: &'a [f32],
    /// `(T, H E)`.
    pub out: &'a [f32],
    /// `(T, H)`.
    pub log_sum: &'a [f32],
}

struct AttendBackward<'a> {
    heads: Heads,
    qkv: &'a [f32],
    out: &'a [f32],
    log_sum: &'a [f32],
    d_out: &'a [f32],
    d_qkv: &'a mut [f32],
}

impl Kernel for AttendBackward<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (heads, row, dim) = (self.heads, self.heads.row(), self.heads.dim);
        let len = self.qkv.len() / row;
        let transposed = Transposed::of(heads, self.qkv);
        // Probabilities and gradients of the scores of one head, `(len, len)` in rows of `width`.
        let width = len.next_multiple_of(LANES);
        let (mut p, mut ds) = (vec![0.0f32; len * width], vec![0.0f32; len * width]);
        for head in 0..heads.queries {
            let kv_head = head / (heads.queries / heads.kv);
            let (query, key) = (head * dim, heads.q_width() + kv_head * dim);
            let value = key + heads.kv_width();
            for t in 0..len {
                let (p, ds) = (&mut p[t * width..][..width], &mut ds[t * width..][..width]);
                self.scores::<S>(&transposed, (t, head, kv_head), p, ds);
                let d_query = &mut self.d_qkv[t * row + query..][..dim];
                weighted_rows::<S>(&ds[..=t], &self.qkv[key..], row, d_query);
            }
            let weights = |data| Lower { data, width, len };
            weights(&ds).transposed_times::<S>(&self.qkv[query..], row, &mut self.d_qkv[key..], row, dim);
            let out = heads.q_width();
            weights(&p).transposed_times::<S>(&self.d_out[head * dim..], out, &mut self.d_qkv[value..], row, dim);
        }
    }
}

impl AttendBackward<'_> {
    /// Probabilities and score gradients of query `t` of a head; zero from position `t + 1` on.
    #[inline(always)]
    fn scores<S: Simd>(
        &self,
        transposed: &Transposed,
        (t, head, kv_head): (usize, usize, usize),
        p: &mut [f32],
        ds: &mut [f32],
    ) {
        let (heads, dim) = (self.heads, self.heads.dim);
        let q = &self.qkv[t * heads.row() + head * dim..][..dim];
        let at = t * heads.q_width() + head * dim;
        let d_out = &self.d_out[at..at + dim];
        let keys = Segment { keys: &transposed.keys, values: &[], capacity: transposed.capacity, len: t + 1 };
        let values = Segment { keys: &transposed.values, ..keys };
        // SAFETY: p and ds have room for a whole last chunk.
        unsafe {
            score::<S>(q, &keys, kv_head, heads.scale(), p);
            score::<S>(d_out, &values, kv_head, 1.0, ds);
        }
        let log_sum = self.log_sum[t * heads.queries + head];
        let along = dot::<S>(d_out, &self.out[at..at + dim]);
        for (p, ds) in p[..=t].iter_mut().zip(&mut ds[..=t]) {
            *p = exp::<S>(*p - log_sum);
            *ds = *p * (*ds - along) * heads.scale();
        }
        p[t + 1..].fill(0.0);
        ds[t + 1..].fill(0.0);
    }
}

/// A lower triangular matrix `(len, len)` in rows of `width`, a multiple of [`LANES`].
struct Lower<'a> {
    data: &'a [f32],
    width: usize,
    len: usize,
}

impl Lower<'_> {
    /// y[s] += sum over t >= s of self[t][s] x[t], for rows of `dim` numbers: four rows of y at a time, in registers.
    #[inline(always)]
    fn transposed_times<S: Simd>(&self, x: &[f32], x_stride: usize, y: &mut [f32], y_stride: usize, dim: usize) {
        const ROWS: usize = 4;
        assert!(x.len() >= (self.len - 1) * x_stride + dim && self.data.len() >= self.len * self.width);
        let whole = dim - dim % LANES;
        for s in (0..self.len).step_by(ROWS) {
            for e in (0..whole).step_by(LANES) {
                // SAFETY: t < len, s + ROWS <= width, e + LANES <= dim.
                unsafe {
                    let mut acc = [S::splat(0.0); ROWS];
                    for t in s..self.len {
                        let x = S::load(x.as_ptr().add(t * x_stride + e));
                        for (i, acc) in acc.iter_mut().enumerate() {
                            *acc = S::mul_add(S::splat(*self.data.as_ptr().add(t * self.width + s + i)), x, *acc);
                        }
                    }
                    for (i, &acc) in acc.iter().enumerate().take(self.len - s) {
                        let y = y[(s + i) * y_stride + e..][..LANES].as_mut_ptr();
                        S::store(S::mul_add(acc, S::splat(1.0), S::load(y)), y);
                    }
                }
            }
            for s in s..(s + ROWS).min(self.len) {
                for e in whole..dim {
                    for t in s..self.len {
                        let y = &mut y[s * y_stride + e];
                        *y = mul_add::<S>(self.data[t * self.width + s], x[t * x_stride + e], *y);
                    }
                }
            }
        }
    }
}

/// Cuts `(T, width)` into one slice a sequence.
fn split_mut<'a>(mut data: &'a mut [f32], starts: &[usize], width: usize) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(starts.len() - 1);
    for span in starts.windows(2) {
        let (part, rest) = data.split_at_mut((span[1] - span[0]) * width);
        parts.push(part);
        data = rest;
    }
    parts
}
