use std::ops::Range;

use grpo_pipes::gpu::kernels::{ModelShape, attend};
use grpo_pipes::gpu::packed::PackedBatch;
use grpo_pipes::gpu::{Buffer, DynBuffer};
use grpo_pipes::model::Packed;
use grpo_pipes::numbers::dtype::Dtype;

use super::super::{DTYPES, gpu, numbers, rounding};
use super::{bundle, packed};
use crate::fixtures::distance;

pub fn shape([heads, kv_heads, dim]: [usize; 3]) -> ModelShape {
    ModelShape { width: heads * dim, mlp: 8, vocabulary: 8, heads, kv_heads, dim, normed_qk: 0, epsilon: 1e-6 }
}

/// Attention as its formula says it, in f64: `(T, H E)` and `(T, H)`.
pub fn plain(shape: &ModelShape, packed: &Packed, qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut log_sums) = (Vec::new(), Vec::new());
    let of = |row: usize, head: usize| &qkv[row * shape.qkv() + head * shape.dim..][..shape.dim];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    for row in 0..packed.tokens.len() {
        for head in 0..shape.heads {
            let (key, seen) = (shape.heads + head / (shape.heads / shape.kv_heads), seen(packed, row));
            let scores: Vec<f64> =
                seen.iter().map(|&at| dot(of(row, head), of(at, key)) / (shape.dim as f64).sqrt()).collect();
            let sum: f64 = scores.iter().map(|score| score.exp()).sum();
            log_sums.push(sum.ln() as f32);
            out.extend((0..shape.dim).map(|e| {
                let part =
                    |(score, at): (&f64, &usize)| score.exp() / sum * f64::from(of(*at, key + shape.kv_heads)[e]);
                scores.iter().zip(&seen).map(part).sum::<f64>() as f32
            }));
        }
    }
    (out, log_sums)
}

/// Rows that a row attends to.
pub fn seen(packed: &Packed, row: usize) -> Vec<usize> {
    let of = |sequence: usize| -> Range<usize> { packed.starts[sequence]..packed.starts[sequence + 1] };
    let sequence = (0..packed.prefixes.len()).find(|&i| of(i).contains(&row)).unwrap();
    packed.prefixes[sequence].map_or(0..0, of).chain(of(sequence).start..row + 1).collect()
}

pub const SHAPES: [[usize; 3]; 5] = [[7, 1, 16], [4, 2, 32], [2, 1, 64], [1, 1, 128], [2, 2, 16]];

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn attention_on_a_gpu() {
    let gpu = gpu();
    for (case, heads) in SHAPES.into_iter().enumerate() {
        let shape = shape(heads);
        // The last two: the first row of a tile sees all of a tile of keys but its last position.
        let lens = [(65, false), (2, true), (1, false), (33, true), (30, false), (3, true)];
        let packed = if case % 2 == 0 { bundle() } else { packed(&lens) };
        let rows = packed.tokens.len();
        for dtype in DTYPES {
            let scale = if dtype == Dtype::F32 { 3.0 } else { 1.5 };
            let qkv: Vec<f32> = numbers(case as u64, rows * shape.qkv()).iter().map(|x| scale * x).collect();
            let batch = PackedBatch::new(&gpu, &packed, shape.tile_rows(dtype)).unwrap();
            let qkv = DynBuffer::from_f32(&gpu, dtype, &qkv).unwrap();
            let out = DynBuffer::new(&gpu, dtype, rows * shape.width).unwrap();
            let log_sum = Buffer::new(&gpu, rows * shape.heads).unwrap();
            attend(&*gpu, &batch, &qkv, (&out, &log_sum), &shape).unwrap();
            let (want, want_log_sum) = plain(&shape, &packed, &qkv.to_vec().unwrap());
            let off = distance(&out.to_vec().unwrap(), &want);
            assert!(off < rounding(dtype), "{heads:?} {dtype:?}: {off}");
            assert!(distance(&log_sum.to_vec().unwrap(), &want_log_sum) < 1e-5);
        }
    }
}
