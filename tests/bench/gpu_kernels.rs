//! Where the time goes: each kind of launch of a decode step and of a training pass, alone and some times in a row in a recording.
//!
//! Lines `PART_NAME_us` with what each takes, its limit before it, and the sum of all launches of a step or pass, to be compared with the
//! time of the whole. Each launch in a row has a layer's own weights and caches, so that the GPU's cache does not flatter them.

#![allow(unsafe_code)] // products and recordings without a wrapper

use std::sync::Arc;

use grpo_pipes::error::Result;
use grpo_pipes::gpu::decode::{DrawLog, SampleStart, SlotCapacity, Slots};
use grpo_pipes::gpu::driver::{Address, Driver, Matrix, MatrixProduct};
use grpo_pipes::gpu::kernels::{
    self, AttentionWarps, DrawOutput, DrawRows, Logits, PartialSums, SoftmaxSums, add_norm, decode_attention, draw,
    embed_slots, head_rows, linear_rows, splits, swiglu_rows,
};
use grpo_pipes::gpu::packed::{DeviceGradients, PackedBatch};
use grpo_pipes::gpu::{Buffer, DeviceWeights, DynBuffer};
use grpo_pipes::model::Sampling;
use grpo_pipes::numbers::dtype::Dtype;

use super::{Bench, GROUP, KV, Limits, NEW, PROMPT, gpu_train, numbers, timed};

const LAYERS: usize = 24;
const D: usize = 896;
const F: usize = 4864;
const QKV: usize = 1152;
const V: usize = 151_936;

/// What was measured of a step or pass.
struct Split<'a> {
    gpu: &'a Arc<dyn Driver>,
    limits: Limits,
    name: String,
    sum: f64,
}

impl Split<'_> {
    /// A kind of launch that there are `count` of, of at least these bytes and operations each. `work` is told which launch in a row.
    fn time(&mut self, name: &str, count: usize, [bytes, operations]: [f64; 2], work: &dyn Fn(usize) -> Result<()>) {
        let launches = count.clamp(4, LAYERS);
        let recording = self.gpu.record(&mut || (0..launches).try_for_each(work)).unwrap();
        // SAFETY: what `work` uses outlives this call.
        let replay = || unsafe { self.gpu.replay(&recording) }.unwrap();
        let seconds = timed(self.gpu, 11, replay) / launches as f64;
        self.sum += seconds * count as f64;
        let (name, limit) = (format!("{}_{name}", self.name), self.limits.seconds(bytes, operations));
        println!("{name}_limit_us {:.2}\n{name}_us {:.2}", limit * 1e6, seconds * 1e6);
    }

    fn end(self) {
        println!("{}_sum_ms {:.4}", self.name, self.sum * 1e3);
    }
}

fn floats(gpu: &Arc<dyn Driver>, len: usize) -> Buffer<f32> {
    Buffer::zeros(gpu, len).unwrap()
}

/// What a decode step of so many rows works on.
struct Step<'a> {
    gpu: &'a dyn Driver,
    weights: &'a DeviceWeights,
    rows: usize,
    slots: Slots,
    slot_of_row: Buffer<u32>,
    x: Buffer<f32>,
    normed: DynBuffer,
    sums: Buffer<f32>,
    attended: DynBuffer,
    act: DynBuffer,
    logits: Buffer<f32>,
    summed: SoftmaxSums,
    ends: DrawOutput,
}

impl<'a> Step<'a> {
    fn new(gpu: &'a Arc<dyn Driver>, weights: &'a DeviceWeights, rows: usize) -> Self {
        let shape = SlotCapacity { slots: rows, max_prompt_tokens: PROMPT, max_completion_tokens: NEW };
        let slots = Slots::new(gpu, &weights.config, shape, Dtype::Bf16, false).unwrap();
        let start = |slot: usize| SampleStart {
            slot,
            prompt: slot / GROUP,
            prompt_len: PROMPT,
            key: [1, 2],
            sample: slot % GROUP,
        };
        slots.begin(&**gpu, &(0..rows).map(start).collect::<Vec<_>>()).unwrap();
        slots.state.upload(rows, &vec![100; rows]).unwrap(); // Slots::DRAWN of kernels/slots.cuh
        let parts = [[QKV, D], [D, D], [D, F]].map(|[width, depth]| splits(width, depth) * width);
        Self {
            gpu: &**gpu,
            weights,
            rows,
            slots,
            slot_of_row: Buffer::from_slice(gpu, &(0..rows as u32).collect::<Vec<_>>()).unwrap(),
            x: floats(gpu, rows * D),
            normed: numbers(gpu, rows * D),
            sums: floats(gpu, rows * parts.into_iter().max().unwrap()),
            attended: numbers(gpu, rows * D),
            act: numbers(gpu, rows * F),
            logits: floats(gpu, rows * V),
            summed: SoftmaxSums::new(gpu, rows, V).unwrap(),
            ends: DrawOutput {
                stops: Buffer::from_slice(gpu, &[]).unwrap(),
                log: DrawLog::new(gpu, rows, NEW).unwrap(),
            },
        }
    }

    fn blocks(&self, split: &mut Split<'_>) {
        let Self { gpu, weights, rows, slots, slot_of_row, x, normed, sums, attended, act, .. } = self;
        let (gpu, rows, layer) = (*gpu, *rows, |i: usize| weights.layer(i));
        let partial = |width, depth| PartialSums { sums, splits: splits(width, depth) };
        let summed = |width, depth| 4.0 * (splits(width, depth) * rows * width) as f64;
        let norm = 10.0 * (rows * D) as f64 + summed(D, F);
        split.time("norm", 2 * LAYERS + 1, [norm, 0.0], &|i| {
            let weight = (layer(i).input_norm, 1e-6);
            add_norm(gpu, x, partial(D, F), weight, normed, [rows, D])
        });
        let product = |[width, depth]: [usize; 2], out: f64| {
            let numbers = (width * depth + rows * depth) as f64;
            [2.0 * numbers + out, 2.0 * (rows * width * depth) as f64]
        };
        let linear =
            |split: &mut Split<'_>, name, weight: &dyn Fn(usize) -> Address, from, [width, depth]: [usize; 2]| {
                let least = product([width, depth], summed(width, depth));
                let work = |i| linear_rows(gpu, (weight(i), from), sums, [rows, width, depth]).map(|_| ());
                split.time(name, LAYERS, least, &work);
            };
        linear(split, "qkv", &|i| layer(i).qkv, normed, [QKV, D]);
        let cached = (rows.div_ceil(GROUP) * PROMPT + 100 * rows) as f64 * KV / LAYERS as f64;
        let attention = cached + summed(QKV, D) + 2.0 * (rows * D) as f64;
        let warps = if rows > 128 { AttentionWarps::Two } else { AttentionWarps::Eight }; // as a step has them
        split.time("attention", LAYERS, [attention, 0.0], &|i| {
            decode_attention(gpu, weights, (slots, i), (slot_of_row, warps), partial(QKV, D), attended)
        });
        linear(split, "o", &|i| layer(i).o, attended, [D, D]);
        split.time("swiglu", LAYERS, product([2 * F, D], 2.0 * (rows * F) as f64), &|i| {
            swiglu_rows(gpu, (layer(i).gate_up, normed), act, [rows, F, D])
        });
        linear(split, "down", &|i| layer(i).down, act, [D, F]);
    }

    /// Draws go on from token 100, so they come last.
    fn rest(&self, split: &mut Split<'_>) {
        let Self { gpu, weights, rows, slots, slot_of_row, x, normed, logits, summed, ends, .. } = self;
        let (gpu, rows) = (*gpu, *rows);
        let (stream, scores) = (6.0 * (rows * D) as f64, 4.0 * (rows * V) as f64);
        split.time("embed", 1, [stream, 0.0], &|_| embed_slots(gpu, weights, slots, slot_of_row, x, None));
        summed.largest.clear().unwrap();
        let head = [2.0 * ((V + rows) * D) as f64 + scores, 2.0 * (rows * V * D) as f64];
        split.time("head", 1, head, &|_| {
            head_rows(gpu, (weights.head(), normed), logits, Some(&summed.largest), [rows, V, D])
        });
        split.time("draw_sums", 1, [scores, 0.0], &|_| summed.sum(gpu, slots, slot_of_row, (logits, V), 1.0));
        let from = Logits { of: logits, vocabulary: V, summed: Some(summed) };
        split.time("draw", 1, [0.0; 2], &|_| {
            draw(gpu, slots, DrawRows::Rows(slot_of_row), from, &Sampling::default(), ends)
        });
    }
}

/// Of a decode step at a context of 210 tokens, all products by our own kernels, whatever the number of rows.
pub fn decode(bench: &Bench, rows: usize) {
    let step = Step::new(&bench.gpu, bench.weights(), rows);
    let mut split = Split { gpu: &bench.gpu, limits: bench.limits, name: format!("kernels_{rows}"), sum: 0.0 };
    step.blocks(&mut split);
    step.rest(&mut split);
    split.end();
}

/// What forward and backward of so many packed rows work on.
struct Pass<'a> {
    gpu: &'a dyn Driver,
    weights: &'a DeviceWeights,
    shape: kernels::ModelShape,
    batch: PackedBatch,
    /// Pairs of a query and a position it sees.
    pairs: f64,
    x: Buffer<f32>,
    dx: Buffer<f32>,
    wide: Buffer<f32>,
    log_sum: Buffer<f32>,
    along: Buffer<f32>,
    keys: Buffer<f32>,
    partial: Buffer<f32>,
    gradients: DeviceGradients,
    normed: DynBuffer,
    attended: DynBuffer,
    d_attended: DynBuffer,
    qkv: DynBuffer,
    d_qkv: DynBuffer,
    gate_up: DynBuffer,
    act: DynBuffer,
}

impl<'a> Pass<'a> {
    fn new(gpu: &'a Arc<dyn Driver>, weights: &'a DeviceWeights) -> Self {
        let (shape, micro) = (kernels::ModelShape::new(&weights.config).unwrap(), gpu_train::grpo(GROUP));
        let batch = PackedBatch::new(gpu, &micro.packed, shape.tile_rows(Dtype::Bf16)).unwrap();
        let rows = batch.rows;
        Self {
            gpu: &**gpu,
            weights,
            shape,
            pairs: gpu_train::pairs(&micro),
            x: floats(gpu, rows * D),
            dx: floats(gpu, rows * D),
            wide: floats(gpu, rows * QKV),
            log_sum: floats(gpu, rows * shape.heads),
            along: floats(gpu, rows * shape.heads),
            keys: floats(gpu, batch.entries * 2 * shape.kv_heads * shape.dim),
            partial: floats(gpu, kernels::BLOCKS * QKV),
            gradients: DeviceGradients::zeros(gpu, &weights.config).unwrap(),
            normed: numbers(gpu, rows * D),
            attended: numbers(gpu, rows * D),
            d_attended: numbers(gpu, rows * D),
            qkv: numbers(gpu, rows * QKV),
            d_qkv: numbers(gpu, rows * QKV),
            gate_up: numbers(gpu, rows * 2 * F),
            act: numbers(gpu, rows * F),
            batch,
        }
    }

    /// The products with a weight: forward, and for the gradients of what it reads and of itself.
    fn products(
        &self,
        split: &mut Split<'_>,
        (name, weight): (&str, Address),
        [x, y, dy, dx]: [Matrix; 4],
        [rows, wide, deep]: [usize; 3],
    ) {
        let weight = Matrix { at: weight, stride: deep, dtype: Dtype::Bf16 };
        let dw = Matrix { at: self.gradients.numbers.at(0), stride: deep, dtype: Dtype::F32 };
        let of = |a, a_transposed, b, b_transposed, out, shape| MatrixProduct {
            a,
            a_transposed,
            b,
            b_transposed,
            out,
            shape,
            beta: 0.0,
        };
        let bytes = |matrix: Matrix, numbers: usize| (matrix.dtype.size() * numbers) as f64;
        let (m, n, k) = (rows * wide, wide * deep, rows * deep);
        let kinds = [
            ("", of(x, false, weight, true, y, [rows, wide, deep]), bytes(x, k + n) + bytes(y, m)),
            ("_dx", of(dy, false, weight, false, dx, [rows, deep, wide]), bytes(dy, m + n) + bytes(dx, k)),
            (
                "_dw",
                MatrixProduct { beta: 1.0, ..of(dy, true, x, false, dw, [wide, deep, rows]) },
                bytes(x, m + k) + 8.0 * n as f64,
            ),
        ];
        let count = if wide == V { 1 } else { LAYERS };
        for (kind, product, bytes) in kinds {
            let least = [bytes, 2.0 * (rows * wide) as f64 * deep as f64];
            // SAFETY: the caller's matrices have these shapes.
            split.time(&format!("{name}{kind}"), count, least, &|_| unsafe { self.gpu.multiply(&product) });
        }
    }

    /// Of one block. The same weights each time: at so many rows they are the least of what is read.
    fn blocks(&self, split: &mut Split<'_>) {
        let (rows, w) = (self.batch.rows, self.weights.layer(0));
        let wide = |stride| Matrix { at: self.wide.at(0), stride, dtype: Dtype::F32 };
        let [normed, attended, d] =
            [&self.normed, &self.attended, &self.d_attended].map(|numbers| numbers.matrix(0, D));
        let [gate_up, act, d_qkv] = [(&self.gate_up, 2 * F), (&self.act, F), (&self.d_qkv, QKV)]
            .map(|(numbers, width)| numbers.matrix(0, width));
        self.products(split, ("qkv", w.qkv), [normed, wide(QKV), d_qkv, wide(D)], [rows, QKV, D]);
        self.products(split, ("o", w.o), [attended, wide(D), normed, d], [rows, D, D]);
        self.products(split, ("gate_up", w.gate_up), [normed, gate_up, gate_up, wide(D)], [rows, 2 * F, D]);
        self.products(split, ("down", w.down), [act, wide(D), d, act], [rows, D, F]);
        self.attention(split);
        self.rows(split);
    }

    fn attention(&self, split: &mut Split<'_>) {
        let Self { gpu, shape, batch, qkv, d_qkv, attended, d_attended, log_sum, along, keys, .. } = self;
        let operations = gpu_train::PAIR / LAYERS as f64 * self.pairs;
        let streams = (batch.rows * 2 * (QKV + D)) as f64;
        split.time("attend", LAYERS, [streams, operations], &|_| {
            kernels::attend(*gpu, batch, qkv, (attended, log_sum), shape)
        });
        let rope = kernels::RopeTable { table: self.weights.rope.at(0), positions: self.weights.positions };
        let kept = kernels::SavedAttention { qkv, out: attended, log_sum, d_out: d_attended };
        let to = kernels::AttentionGradients { d_qkv, along, partial: keys };
        // Five products where the forward has two.
        split.time("attend_backward", LAYERS, [2.0 * streams, 2.5 * operations], &|_| {
            kernels::attend_backward(*gpu, batch, kept, to, (shape, rope))
        });
    }

    /// What goes over all rows once.
    fn rows(&self, split: &mut Split<'_>) {
        let Self { gpu, shape, batch, x, dx, wide, partial, qkv, d_qkv, normed, d_attended, .. } = self;
        let (gpu, rows, w) = (*gpu, batch.rows, self.weights.layer(0));
        let bytes = |a_row: usize| [(rows * a_row) as f64, 0.0];
        split.time("norm", 2 * LAYERS, bytes(14 * D), &|_| {
            kernels::norm_rows(gpu, kernels::NormInput::Sum(x, wide, dx), w.input_norm, (normed, rows), shape)
        });
        split.time("norm_again", 2 * LAYERS, bytes(6 * D), &|_| {
            kernels::norm_rows(gpu, kernels::NormInput::Rows(x), w.input_norm, (normed, rows), shape)
        });
        let rope = kernels::RopeTable { table: self.weights.rope.at(0), positions: self.weights.positions };
        split.time("bias_rope", LAYERS, bytes(6 * QKV), &|_| {
            kernels::bias_rope(gpu, batch, (wide, w.qkv_bias, rope), qkv, shape)
        });
        split.time("swiglu", LAYERS, bytes(6 * F), &|_| kernels::swiglu(gpu, rows, &self.gate_up, &self.act, shape));
        split.time("swiglu_backward", LAYERS, bytes(12 * F), &|_| {
            kernels::swiglu_backward(gpu, rows, &self.gate_up, &self.act, shape)
        });
        let to = |width: usize| kernels::ColumnSum { partial, to: self.gradients.numbers.at(width) };
        split.time("column_sums", LAYERS, bytes(2 * QKV), &|_| kernels::column_sums(gpu, d_qkv, [rows, QKV], to(QKV)));
        split.time("norm_backward", 2 * LAYERS, bytes(18 * D), &|_| {
            let norm = kernels::NormBackward { x, index: None, weight: w.input_norm, d_weight: to(D) };
            let into = kernels::NormGradient::Added(dx, d_attended);
            kernels::norm_backward(gpu, &norm, (wide, rows), into, (shape, Dtype::Bf16))
        });
    }

    /// A chunk of the head as large as grpo-step's, and how many there are.
    fn head(&self, gpu: &Arc<dyn Driver>, split: &mut Split<'_>) {
        let targets = gpu_train::grpo(GROUP).targets.len();
        let most = gpu_train::logits_bytes(gpu) / (4 * V);
        let rows = targets.div_ceil(targets.div_ceil(most));
        let (logits, stats) = (floats(gpu, rows * V), floats(gpu, 4 * rows));
        let (tokens, slopes) = (Buffer::<u32>::zeros(gpu, rows).unwrap(), floats(gpu, 2 * rows));
        println!("{}_rows {rows}\n{}_chunks {}", split.name, split.name, targets.div_ceil(rows));
        let y = Matrix { at: logits.at(0), stride: V, dtype: Dtype::F32 };
        let dy = Matrix { stride: 2 * V, dtype: Dtype::Bf16, ..y }; // each row in the first half of its logits' place
        let dx = Matrix { at: self.wide.at(0), stride: D, dtype: Dtype::F32 };
        self.products(split, ("logits", self.weights.head()), [self.normed.matrix(0, D), y, dy, dx], [rows, V, D]);
        let chunk =
            kernels::LogitChunk { logits: &logits, tokens: tokens.at(0), stats: &stats, rows, temperature: 1.0 };
        let scores = (rows * V) as f64;
        split.time("stats", 1, [4.0 * scores, 0.0], &|_| kernels::head_stats(self.gpu, chunk, &self.shape));
        split.time("backward", 1, [6.0 * scores, 0.0], &|_| {
            kernels::head_backward(self.gpu, chunk, slopes.at(0), (&self.shape, Dtype::Bf16))
        });
    }
}

/// Of a training pass over 64 completions that share the prompt of 16: `sum` is of the blocks, the head's follows for a chunk.
pub fn train(bench: &Bench) {
    let pass = Pass::new(&bench.gpu, bench.weights());
    let split = || Split { gpu: &bench.gpu, limits: bench.limits, name: "pass".into(), sum: 0.0 };
    let mut blocks = split();
    pass.blocks(&mut blocks);
    blocks.end();
    let mut head = Split { name: "pass_head".into(), ..split() };
    pass.head(&bench.gpu, &mut head);
    head.end();
}
