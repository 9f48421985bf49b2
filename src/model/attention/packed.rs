//! Attention over packed sequences: training and prefill.

use std::ops::Range;

use rayon::prelude::*;

use super::rows::{ROWS, each};
use super::{Heads, Query, Segment, attend_rows};
use crate::model::simd::{self, Kernel, LANES, Simd};

/// Where each sequence lies among packed rows.
#[derive(Clone, Copy)]
pub struct PackedLayout<'a> {
    /// First row of each sequence, and T.
    pub starts: &'a [usize],
    /// The sequence whose positions come before those of each.
    pub prefixes: &'a [Option<usize>],
}

impl PackedLayout<'_> {
    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.prefixes.len()
    }

    /// A sequence's own rows.
    pub fn rows(&self, sequence: usize) -> Range<usize> {
        self.starts[sequence]..self.starts[sequence + 1]
    }

    /// Rows that come before a sequence's own.
    pub fn prefix_rows(&self, sequence: usize) -> Range<usize> {
        self.prefixes[sequence].map_or(0..0, |prefix| self.rows(prefix))
    }
}

/// Keys, or values, of one packed sequence transposed: `(K * E, capacity)`.
pub struct Transposed {
    /// The numbers.
    pub data: Vec<f32>,
    /// Positions there is room for, a multiple of [`LANES`]; unused ones are zero.
    pub capacity: usize,
}

impl Transposed {
    /// Transposes `width` columns from `column` on, of rows of `stride`.
    pub fn of(rows: &[f32], stride: usize, column: usize, width: usize) -> Self {
        let capacity = (rows.len() / stride).next_multiple_of(LANES);
        let mut data = vec![0.0; width * capacity];
        for (position, row) in rows.chunks_exact(stride).enumerate() {
            for (i, x) in row[column..column + width].iter().enumerate() {
                data[i * capacity + position] = *x;
            }
        }
        Self { data, capacity }
    }

    /// The keys of each sequence.
    pub fn keys_of(heads: Heads, qkv: &[f32], layout: PackedLayout<'_>) -> Vec<Self> {
        let (row, column) = (heads.row(), heads.q_width());
        let of = |i| Self::of(&qkv[layout.starts[i] * row..layout.starts[i + 1] * row], row, column, heads.kv_width());
        (0..layout.sequences()).into_par_iter().map(of).collect()
    }

    /// The numbers of one head, `(E, capacity)`.
    pub fn head(&self, head: usize, dim: usize) -> &[f32] {
        &self.data[head * dim * self.capacity..(head + 1) * dim * self.capacity]
    }
}

/// Query rows per task.
const TASK_ROWS: usize = 16 * ROWS;

/// Causal attention within each packed sequence and over all of its prefix.
///
/// # Shapes
/// - `qkv`: `(T, (H + 2 K) E)` after rope
/// - `out`: `(T, H E)`; `log_sum`: `(T, H)`
pub fn attend_packed(heads: Heads, qkv: &[f32], layout: PackedLayout<'_>, out: &mut [f32], log_sum: &mut [f32]) {
    let keys = Transposed::keys_of(heads, qkv, layout);
    let tasks = (0..layout.sequences()).flat_map(|i| layout.rows(i).step_by(TASK_ROWS).map(move |from| (i, from)));
    let (mut out, mut log_sum, mut work) = (out, log_sum, Vec::new());
    for (sequence, from) in tasks {
        let rows = (layout.rows(sequence).end - from).min(TASK_ROWS);
        let (own_out, own_sum);
        (own_out, out) = out.split_at_mut(rows * heads.q_width());
        (own_sum, log_sum) = log_sum.split_at_mut(rows * heads.queries);
        work.push(AttendPacked { heads, qkv, layout, keys: &keys, sequence, from, out: own_out, log_sum: own_sum });
    }
    // SAFETY: each task has its own part of both outputs.
    work.into_par_iter().for_each(|task| unsafe { simd::run(task) });
}

/// Consecutive query rows of one sequence, from row `from` of all on.
struct AttendPacked<'a> {
    heads: Heads,
    qkv: &'a [f32],
    layout: PackedLayout<'a>,
    keys: &'a [Transposed],
    sequence: usize,
    from: usize,
    out: &'a mut [f32],
    log_sum: &'a mut [f32],
}

impl AttendPacked<'_> {
    /// The first `len` positions of a sequence.
    fn segment(&self, sequence: usize, len: usize) -> Segment<'_> {
        let (keys, row) = (&self.keys[sequence], self.heads.row());
        let values = &self.qkv[self.layout.starts[sequence] * row + self.heads.q_width() + self.heads.kv_width()..];
        Segment { keys: &keys.data, capacity: keys.capacity, values, stride: row, len }
    }
}

impl Kernel for AttendPacked<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Heads { queries, dim, .. } = self.heads;
        let (width, count) = (self.heads.q_width(), self.log_sum.len() / queries);
        let (start, prefix) = (self.layout.starts[self.sequence], self.layout.prefix_rows(self.sequence).len());
        let most = prefix + self.from - start + count;
        let mut scores = vec![0.0; ROWS * (most.next_multiple_of(LANES) + LANES)];
        let mut scaled = vec![0.0; ROWS * width];
        let (out, log_sum) = (self.out.as_mut_ptr(), self.log_sum.as_mut_ptr());
        for from in (0..count).step_by(ROWS) {
            let (rows, seen) = (ROWS.min(count - from), self.from - start + from);
            self.heads.scale_queries(&self.qkv[(self.from + from) * self.heads.row()..], rows, &mut scaled);
            let own = self.segment(self.sequence, seen + rows);
            let before =
                self.layout.prefixes[self.sequence].map_or(Segment { len: 0, ..own }, |i| self.segment(i, prefix));
            for head in 0..queries {
                // SAFETY: `from + r` is below the number of rows of both outputs.
                let rows_of_head: [Query; ROWS] = each(rows, |r| unsafe {
                    let (out, log_sum) = (out.add((from + r) * width), log_sum.add((from + r) * queries));
                    let q = scaled[r * width + head * dim..].as_ptr();
                    Query { q, out: out.add(head * dim), log_sum: log_sum.add(head), len: prefix + seen + r + 1 }
                });
                let at = (self.heads.of_kv(head), dim);
                // SAFETY: the queries point at `dim` numbers of `scaled` and of this task's outputs.
                unsafe { attend_rows::<S, ROWS>(&rows_of_head[..rows], at, &[before, own], &mut scores) };
            }
        }
    }
}
