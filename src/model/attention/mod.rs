//! Causal attention with grouped heads, forward and backward, a few query rows at a time: the full score matrix never exists.
//!
//! Keys are stored transposed, `(K * E, positions)`, so that sixteen positions are scored at once and a score is one chain over E; an
//! output is one chain over the positions. The chains are the same in prefill, decode and training, and so are the bits.

#![allow(unsafe_code)] // loads of sixteen lanes at checked offsets

mod backward;
mod packed;
mod rows;

use super::config::Config;
use super::simd::{self, Kernel, LANES, Simd};
use rows::{ROWS, each, exponentials, score, weigh};

pub use backward::{SavedForward, attend_packed_backward};
pub use packed::{PackedLayout, attend_packed};
pub use rows::exp_and_sum;

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
    /// The heads of a model.
    pub fn of(config: &Config) -> Self {
        Self { queries: config.num_attention_heads, kv: config.num_key_value_heads, dim: config.head_dim() }
    }

    /// Width of a row that holds queries, keys and values.
    pub fn row(&self) -> usize {
        (self.queries + 2 * self.kv) * self.dim
    }

    /// Width of the queries and keys of a row.
    pub fn qk_width(&self) -> usize {
        self.q_width() + self.kv_width()
    }

    fn kv_width(&self) -> usize {
        self.kv * self.dim
    }

    /// Width of the queries of a row.
    pub fn q_width(&self) -> usize {
        self.queries * self.dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// The key and value head of a query head.
    fn of_kv(&self, head: usize) -> usize {
        head / (self.queries / self.kv)
    }

    /// Multiplies the queries of the first `rows` rows of `qkv` by the scale of the scores, into `scaled`, `(rows, H E)`.
    fn scale_queries(&self, qkv: &[f32], rows: usize, scaled: &mut [f32]) {
        let rows = qkv.chunks_exact(self.row()).zip(scaled.chunks_exact_mut(self.q_width())).take(rows);
        rows.for_each(|(row, scaled)| scaled.iter_mut().zip(row).for_each(|(scaled, q)| *scaled = q * self.scale()));
    }
}

/// Keys and values of consecutive positions.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Transposed keys: `keys[(head * E + e) * capacity + position]`.
    pub keys: &'a [f32],
    /// Positions there is room for, a multiple of [`LANES`].
    pub capacity: usize,
    /// Values: `values[position * stride + head * E + e]`.
    pub values: &'a [f32],
    /// Numbers from one position's values to the next one's.
    pub stride: usize,
    /// Positions held.
    pub len: usize,
}

/// A query of one head.
#[derive(Clone, Copy)]
struct Query {
    /// `(E)`, multiplied by the scale of the scores.
    q: *const f32,
    /// `(E)`.
    out: *mut f32,
    /// Receives the log-sum-exp of the scores.
    log_sum: *mut f32,
    /// Positions it sees.
    len: usize,
}

/// Attention of at most `R` rows over the positions of all segments in order, of which the last row sees all. `scores` has room
/// for `R` rows of whole vectors.
///
/// # Safety
/// The processor has S, and the pointers of each query are good for `dim` numbers, `log_sum` for one.
#[inline(always)]
unsafe fn attend_rows<S: Simd, const R: usize>(
    queries: &[Query],
    (kv_head, dim): (usize, usize),
    segments: &[Segment<'_>],
    scores: &mut [f32],
) {
    let rows = queries.len();
    let positions: usize = segments.iter().map(|segment| segment.len).sum();
    let seen = positions.next_multiple_of(LANES);
    let width = seen + LANES; // a segment that ends inside a vector is scored to the end of that vector
    assert!((1..=R).contains(&rows) && scores.len() >= R * width);
    // SAFETY: each of the R rows of `scores` has room for the scores of all segments and the rest of the last vector.
    unsafe {
        let mut from = 0;
        for segment in segments {
            let keys = &segment.keys[kv_head * dim * segment.capacity..];
            let to = each::<_, R>(rows, |r| scores.as_mut_ptr().add(r * width + from));
            score::<S, R>(each(rows, |r| queries[r].q), keys, (dim, segment.capacity, segment.len), to);
            from += segment.len;
        }
        let mut sums = [0.0; R];
        for (r, query) in queries.iter().enumerate() {
            let (max, sum) = exponentials::<S>(&mut scores[r * width..][..seen], query.len);
            *query.log_sum = max + sum.ln();
            sums[r] = sum;
            std::slice::from_raw_parts_mut(query.out, dim).fill(0.0);
        }
        let mut from = 0;
        for segment in segments {
            let weights = each::<_, R>(rows, |r| scores.as_ptr().add(r * width + from));
            let shape = (segment.len, segment.stride, dim);
            weigh::<S, R>(weights, &segment.values[kv_head * dim..], shape, each(rows, |r| queries[r].out));
            from += segment.len;
        }
        for (query, sum) in queries.iter().zip(sums) {
            std::slice::from_raw_parts_mut(query.out, dim).iter_mut().for_each(|out| *out /= sum);
        }
    }
}

/// Attention of one query row over the positions of all segments in order.
///
/// # Shapes
/// - `q`, `out`: `(H, E)`; `log_sum`: `(H)`, receives the log-sum-exp of the scaled scores, for the backward
pub fn attend(heads: Heads, q: &[f32], segments: &[Segment<'_>], out: &mut [f32], log_sum: &mut [f32]) {
    assert!(q.len() == heads.q_width() && out.len() == heads.q_width() && log_sum.len() == heads.queries);
    // SAFETY: the kernel's pointers are to these slices, whose lengths were checked.
    unsafe { simd::run(Attend { heads, q, segments, out, log_sum }) }
}

struct Attend<'a> {
    heads: Heads,
    q: &'a [f32],
    segments: &'a [Segment<'a>],
    out: &'a mut [f32],
    log_sum: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Out = ();

    /// Runs query heads that share keys and values together.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Heads { queries, kv, dim } = self.heads;
        let positions: usize = self.segments.iter().map(|segment| segment.len).sum();
        let scaled: Vec<f32> = self.q.iter().map(|q| q * self.heads.scale()).collect();
        let mut scores = vec![0.0; ROWS * (positions.next_multiple_of(LANES) + LANES)];
        let (out, log_sum) = (self.out.as_mut_ptr(), self.log_sum.as_mut_ptr());
        let row = |head: usize| {
            let q = scaled[head * dim..].as_ptr();
            // SAFETY: `attend` checked that both hold all heads.
            unsafe { Query { q, out: out.add(head * dim), log_sum: log_sum.add(head), len: positions } }
        };
        let rows: Vec<Query> = (0..queries).map(row).collect();
        for (kv_head, group) in rows.chunks_exact(queries / kv).enumerate() {
            for rows in group.chunks(ROWS) {
                // SAFETY: the rows point into `scaled`, `out` and `log_sum`, which hold all heads.
                unsafe {
                    match rows.len() {
                        1 => attend_rows::<S, 1>(rows, (kv_head, dim), self.segments, &mut scores),
                        2 => attend_rows::<S, 2>(rows, (kv_head, dim), self.segments, &mut scores),
                        3..=4 => attend_rows::<S, 4>(rows, (kv_head, dim), self.segments, &mut scores),
                        _ => attend_rows::<S, ROWS>(rows, (kv_head, dim), self.segments, &mut scores),
                    }
                }
            }
        }
    }
}
