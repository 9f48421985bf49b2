use std::sync::Arc;

use grpo_pipes::gpu::adapter::DeviceAdapter;
use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::gpu::kernels::{
    AttentionGradients, LogitChunk, ModelShape, RopeTable, SavedAttention, attend, attend_backward, head_backward,
    head_stats, stride,
};
use grpo_pipes::gpu::packed::{DeviceGradients, KeptActivations, PackedBatch, PackedModel};
use grpo_pipes::gpu::{Buffer, DeviceWeights, DynBuffer};
use grpo_pipes::model::{self, Model, Packed, Target, TokenSlope, TokenStats};
use grpo_pipes::numbers::dtype::Dtype;

use super::super::{DTYPES, gpu, numbers, other_families};
use super::attention::{SHAPES, seen, shape};
use super::{bundle, cosine, model, packed, unshared};
use crate::fixtures::{distance, worst};

/// Attention backward as its formulas say it, in f64, and the turn back by the angles of rope.
fn plain(shape: &ModelShape, packed: &Packed, (qkv, d_out, rope): (&[f32], &[f32], &[f32])) -> Vec<f32> {
    let (width, dim, scale) = (shape.qkv(), shape.dim, 1.0 / (shape.dim as f64).sqrt());
    let mut d = vec![0.0f64; qkv.len()];
    let of = |row: usize, head: usize| qkv[row * width + head * dim..][..dim].iter().map(|x| f64::from(*x));
    for (row, head) in (0..packed.tokens.len()).flat_map(|row| (0..shape.heads).map(move |head| (row, head))) {
        let key = shape.heads + head / (shape.heads / shape.kv_heads);
        let (value, seen) = (key + shape.kv_heads, seen(packed, row));
        let d_out: Vec<f64> = d_out[(row * shape.heads + head) * dim..][..dim].iter().map(|x| f64::from(*x)).collect();
        let score = |at: &usize| (scale * of(row, head).zip(of(*at, key)).map(|(q, k)| q * k).sum::<f64>()).exp();
        let mut p: Vec<f64> = seen.iter().map(score).collect();
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        let dp: Vec<f64> = seen.iter().map(|at| of(*at, value).zip(&d_out).map(|(v, d)| v * d).sum()).collect();
        let along: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        for ((at, p), dp) in seen.iter().zip(&p).zip(&dp) {
            let ds = p * (dp - along) * scale;
            for e in 0..dim {
                d[row * width + head * dim + e] += ds * f64::from(qkv[at * width + key * dim + e]);
                d[at * width + key * dim + e] += ds * f64::from(qkv[row * width + head * dim + e]);
                d[at * width + value * dim + e] += p * d_out[e];
            }
        }
    }
    turn_back(shape, packed, &mut d, rope);
    d.iter().map(|d| *d as f32).collect()
}

fn turn_back(shape: &ModelShape, packed: &Packed, d: &mut [f64], rope: &[f32]) {
    let half = shape.dim / 2;
    for (row, d) in d.chunks_exact_mut(shape.qkv()).enumerate() {
        let position = seen(packed, row).len() - 1;
        for head in d.chunks_exact_mut(shape.dim).take(shape.heads + shape.kv_heads) {
            for e in 0..half {
                let cosine = f64::from(rope[position * half + e]);
                let sine = f64::from(rope[rope.len() / 2 + position * half + e]);
                (head[e], head[e + half]) =
                    (head[e] * cosine + head[e + half] * sine, head[e + half] * cosine - head[e] * sine);
            }
        }
    }
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn attention_backward_on_a_gpu() {
    let gpu = gpu();
    for (case, heads) in SHAPES.into_iter().enumerate() {
        let shape = shape(heads);
        let packed = if case % 2 == 0 { bundle() } else { packed(&[(65, false), (2, true), (1, false), (33, true)]) };
        let (rows, half) = (packed.tokens.len(), shape.dim / 2);
        let angles = (0..100 * half).map(|i| (i / half) as f32 * 0.9f32.powi((i % half) as i32));
        let rope: Vec<f32> = angles.clone().map(f32::cos).chain(angles.map(f32::sin)).collect();
        for dtype in DTYPES {
            let batch = PackedBatch::new(&gpu, &packed, shape.tile_rows(dtype)).unwrap();
            let random = |seed: u64, width: usize| {
                let numbers: Vec<f32> = numbers(seed, rows * width).iter().map(|x| 1.5 * x).collect();
                DynBuffer::from_f32(&gpu, dtype, &numbers).unwrap()
            };
            let (qkv, d_out) = (random(case as u64, shape.qkv()), random(50, shape.width));
            let out = DynBuffer::new(&gpu, dtype, rows * shape.width).unwrap();
            let log_sum = Buffer::new(&gpu, rows * shape.heads).unwrap();
            attend(&*gpu, &batch, &qkv, (&out, &log_sum), &shape).unwrap();
            let d_qkv = DynBuffer::new(&gpu, dtype, rows * shape.qkv()).unwrap();
            let along = Buffer::new(&gpu, rows * shape.heads).unwrap();
            let partial = Buffer::new(&gpu, batch.entries * 2 * shape.kv_heads * shape.dim).unwrap();
            let kept = SavedAttention { qkv: &qkv, out: &out, log_sum: &log_sum, d_out: &d_out };
            let to = AttentionGradients { d_qkv: &d_qkv, along: &along, partial: &partial };
            let table = Buffer::from_slice(&gpu, &rope).unwrap();
            attend_backward(&*gpu, &batch, kept, to, (&shape, RopeTable { table: table.at(0), positions: 100 }))
                .unwrap();
            let want = plain(&shape, &packed, (&qkv.to_vec().unwrap(), &d_out.to_vec().unwrap(), &rope));
            let off = distance(&d_qkv.to_vec().unwrap(), &want);
            let allowed = if dtype == Dtype::F32 { 2e-6 } else { 2.0 * super::super::rounding(dtype) };
            assert!(off < allowed, "{heads:?} {dtype:?}: {off}");
        }
    }
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn logits_become_their_gradient_where_they_are_on_a_gpu() {
    let gpu = gpu();
    // As many as a turn of the kernel's, and so few more that a pack has only some of them; several turns and a part of one.
    for (rows, vocabulary) in [(2, 4096), (1, 4098), (3, 13003)] {
        let shape = ModelShape { vocabulary, ..shape([1, 1, 16]) };
        let (stride, temperature) = (stride(&shape), 0.9);
        let given: Vec<f32> = numbers(5, rows * stride).iter().map(|x| 6.0 * x).collect();
        let tokens: Vec<u32> = (0..rows as u32).map(|row| (vocabulary as u32 - 1).saturating_sub(row * 4100)).collect();
        let slopes = numbers(6, 2 * rows);
        let mut want = Vec::new();
        for ((row, token), slopes) in given.chunks_exact(stride).zip(&tokens).zip(slopes.chunks_exact(2)) {
            let e = |x: &f32| (f64::from(*x) / 0.9).exp();
            let sum: f64 = row[..vocabulary].iter().map(e).sum();
            let p: Vec<f64> = row[..vocabulary].iter().map(|x| e(x) / sum).collect();
            let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
            let [slope, of_entropy] = [slopes[0], slopes[1]].map(|slope| f64::from(slope) / 0.9);
            let of = |i: usize| slope * (f64::from(u8::from(i == *token as usize)) - p[i]);
            want.extend((0..vocabulary).map(|i| (of(i) - of_entropy * p[i] * (p[i].ln() + entropy)) as f32));
        }
        for dtype in DTYPES {
            let (logits, stats) = (Buffer::from_slice(&gpu, &given).unwrap(), Buffer::new(&gpu, 4 * rows).unwrap());
            let (tokens, slopes) =
                (Buffer::from_slice(&gpu, &tokens).unwrap(), Buffer::from_slice(&gpu, &slopes).unwrap());
            let chunk = LogitChunk { logits: &logits, tokens: tokens.at(0), stats: &stats, rows, temperature };
            head_stats(&*gpu, chunk, &shape).unwrap();
            head_backward(&*gpu, chunk, slopes.at(0), (&shape, dtype)).unwrap();
            let bytes = logits.to_vec().unwrap();
            let numbers = DynBuffer::new(&gpu, dtype, rows * stride * 4 / dtype.size()).unwrap();
            numbers.upload_bytes(0, bytemuck::cast_slice(&bytes)).unwrap();
            let got = numbers.to_vec().unwrap();
            let got: Vec<f32> =
                got.chunks_exact(stride * 4 / dtype.size()).flat_map(|row| row[..vocabulary].to_vec()).collect();
            let off = distance(&got, &want);
            assert!(off < 3.0 * super::super::rounding(dtype), "{vocabulary} {dtype:?}: {off}");
        }
    }
}

/// Two targets after the last row of each prompt, one after each other row.
fn targets(packed: &Packed) -> Vec<Target> {
    let twice = |row: usize| if packed.starts.contains(&(row + 1)) { 2 } else { 1 };
    let of = |row: usize| (0..twice(row)).map(move |k| Target { row, token: ((row * 11 + k * 5 + 3) % 43) as u32 });
    (0..packed.tokens.len()).filter(|row| row % 5 != 1).flat_map(of).collect()
}

fn slope(i: usize, logprob: f32) -> TokenSlope {
    TokenSlope { logprob: (i as f32 * 0.7).cos() * (1.0 + 0.1 * logprob), entropy: 0.3 * (i as f32 * 0.4).sin() }
}

/// Gradients and stats of one batch on the device.
pub fn gradients_on_gpu(
    gpu: &Arc<dyn Driver>,
    model: &Model,
    packed: &Packed,
    (dtype, keep): (Dtype, KeptActivations),
) -> (Vec<Vec<f32>>, Vec<TokenStats>) {
    let weights = DeviceWeights::new(gpu, model, dtype, 100).unwrap();
    let adapter = DeviceAdapter::new(gpu, model, &weights).unwrap().map(Arc::new);
    let gradients = match &adapter {
        Some(adapter) => DeviceGradients::of_adapter(gpu, adapter, model.config()).unwrap(),
        None => DeviceGradients::zeros(gpu, model.config()).unwrap(),
    };
    let mut learner = PackedModel::new(gpu, &weights, keep, 4 * 48 * 9).unwrap();
    let with = (&targets(packed)[..], 0.9);
    let stats = learner.accumulate(&weights, packed, with, (&gradients, &slope)).unwrap();
    let factor = adapter.map_or(1.0, |adapter| adapter.factor());
    let scaled = |of: Vec<f32>| of.into_iter().map(|gradient| factor * gradient).collect();
    (gradients.to_vecs().unwrap().into_iter().map(scaled).collect(), stats)
}

pub fn gradients_on_cpu(model: &Model, packed: &Packed) -> (Vec<Vec<f32>>, Vec<TokenStats>) {
    let mut gradients = model::Gradients::zeros(model);
    let stats = model.accumulate_gradients(packed, &targets(packed), 0.9, &mut gradients, &slope);
    (gradients.0.iter().map(|gradient| gradient.to_vec()).collect(), stats)
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn gradients_of_each_tensor_equal_the_cpus_on_a_gpu() {
    let gpu = gpu();
    for model in [model([7, 1, 16], false), model([2, 2, 32], true)].into_iter().chain(other_families()) {
        let packed = bundle();
        let (want, want_stats) = gradients_on_cpu(&model, &packed);
        for dtype in DTYPES {
            let (got, stats) = gradients_on_gpu(&gpu, &model, &packed, (dtype, KeptActivations::All));
            let logprobs = |stats: &[TokenStats]| stats.iter().map(|one| one.logprob).collect::<Vec<_>>();
            let entropies = |stats: &[TokenStats]| stats.iter().map(|one| one.entropy).collect::<Vec<_>>();
            let near = if dtype == Dtype::F32 { 1e-5 } else { 0.1 };
            assert!(worst(&logprobs(&stats), &logprobs(&want_stats)) < near, "{dtype:?}");
            assert!(worst(&entropies(&stats), &entropies(&want_stats)) < near, "{dtype:?}");
            for (((name, _), got), want) in model.config().trainable().named().iter().zip(&got).zip(&want) {
                if dtype == Dtype::F32 {
                    assert!(distance(got, want) < 1e-4, "{name}: {}", distance(got, want));
                } else {
                    let (alike, near) = if dtype == Dtype::F16 { (0.999, 0.02) } else { (0.99, 0.05) };
                    let ratio = norm(got) / norm(want);
                    assert!(cosine(got, want) > alike, "{name} {dtype:?}: {}", cosine(got, want));
                    assert!((ratio - 1.0).abs() < near, "{name} {dtype:?}: {ratio}");
                }
            }
        }
    }
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn gradients_have_the_same_bits_again_and_whatever_is_kept_on_a_gpu() {
    let (gpu, model, packed) = (gpu(), model([2, 2, 16], true), bundle());
    let (want, _) = gradients_on_gpu(&gpu, &model, &packed, (Dtype::Bf16, KeptActivations::All));
    for keep in [KeptActivations::NoMlp, KeptActivations::Inputs] {
        assert!(gradients_on_gpu(&gpu, &model, &packed, (Dtype::Bf16, keep)).0 == want, "{keep:?}");
    }
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn a_prompt_run_once_gives_the_gradient_of_one_run_for_each_completion_on_a_gpu() {
    let (gpu, model, packed) = (gpu(), model([2, 1, 16], true), bundle());
    let (plain, rows) = unshared(&packed);
    let weights = DeviceWeights::new(&gpu, &model, Dtype::F32, 100).unwrap();
    let mut learner = PackedModel::new(&gpu, &weights, KeptActivations::All, 1 << 20).unwrap();
    let mut of = |packed: &Packed, targets: &[Target]| {
        let gradients = DeviceGradients::zeros(&gpu, model.config()).unwrap();
        learner.accumulate(&weights, packed, (targets, 1.0), (&gradients, &|_, _| 0.1.into())).unwrap();
        gradients.to_vecs().unwrap().concat()
    };
    let once = targets(&packed);
    let each: Vec<Target> = once.iter().map(|target| Target { row: rows[target.row], ..*target }).collect();
    let off = distance(&of(&packed, &once), &of(&plain, &each));
    assert!(off < 1e-6, "{off}");
}
