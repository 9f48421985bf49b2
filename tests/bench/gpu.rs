//! What sampling and training reach on a GPU, as a share of what the card can do, both measured in this run. Random weights in the shape of
//! Qwen2.5-0.5B, lengths forced. Lines of `name value` on standard output, each as soon as it is known, for pipelines/bench/gpu.sh.
//!
//!     bench-gpu [PART[=CASE,...]]...
//!
//! The parts are those of [`PARTS`], all of them if none is given, and their cases numbers of rows, or batches: `decode=1,64 train=once`.
//! The card's limits come first whatever is asked for. A part that fails ends the process, as an error of the device leaves nothing to go on with; the line
//! `part NAME` before each part tells which one it was.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)]

mod gpu_kernels;
mod gpu_train;

use std::cell::OnceCell;
use std::sync::Arc;

use grpo_pipes::engine::{Decoder, Drawn, GpuDecoder, GpuOptions, Prefill, Settings, Start};
use grpo_pipes::gpu::driver::{Driver, Matrix};
use grpo_pipes::gpu::{Buffer, DeviceWeights, DynBuffer, cuda, kernels};
use grpo_pipes::model::{Config, Family, Model, RopeParameters, Sampling, Scaling};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::rng::Stream;

/// In the order in which they are run, the most wanted numbers first, with the cases each takes where none are given.
const PARTS: [(&str, &str); 11] = [
    ("limits", ""),
    ("decode", "64,1,16,512"),
    ("generate", "64"),
    ("prefill", "4,64"),
    ("kernels", "64,1"),
    ("train", "each,once,1024"),
    ("train-kernels", ""),
    ("adamw", ""),
    ("handover", ""),
    ("invariant", "512"), // up to 128 rows the same launches as `decode`
    ("requests", ""),
];

const PROMPT: usize = 110;
const GROUP: usize = 16;
const NEW: usize = 200;
/// The most rows of a step. One decoder serves all smaller steps, too: what a step launches follows from its rows, the number of slots
/// only says how far apart things lie.
const SLOTS: usize = 512;
/// Parameters that products read, 2 operations each a token, and of those the LM head's.
const MATRICES: f64 = 493_961_216.0;
const HEAD: f64 = 136_134_656.0;
/// Keys and values of a token [bytes].
const KV: f64 = 12_288.0;

/// What the card can do.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes read and written by a copy within the card [/s].
    bandwidth: f64,
    /// Operations of a large product in bf16 [/s].
    flops: f64,
}

impl Limits {
    fn seconds(self, bytes: f64, operations: f64) -> f64 {
        (bytes / self.bandwidth).max(operations / self.flops)
    }
}

/// What parts share, made when the first one asks for it.
struct Bench {
    gpu: Arc<dyn Driver>,
    limits: Limits,
    model: OnceCell<Model>,
    weights: OnceCell<DeviceWeights>,
    decoder: Option<GpuDecoder>,
}

impl Bench {
    fn model(&self) -> &Model {
        self.model.get_or_init(|| Model::random(shape(), 1))
    }

    fn weights(&self) -> &DeviceWeights {
        self.weights.get_or_init(|| DeviceWeights::new(&self.gpu, self.model(), Dtype::Bf16, 1100).unwrap())
    }

    fn decoder(&mut self) -> &mut GpuDecoder {
        if self.decoder.is_none() {
            self.decoder = Some(decoder(&self.gpu, self.model(), [SLOTS, PROMPT, NEW], false));
        }
        self.decoder.as_mut().unwrap()
    }
}

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let parts: Vec<_> = if asked.is_empty() { PARTS.to_vec() } else { asked.iter().map(|part| parse(part)).collect() };
    let gpu = cuda::open(0).unwrap();
    println!("gpu {}", gpu.name().replace(' ', "_"));
    let bandwidth = bandwidth(&gpu);
    println!("bandwidth_tb_s {:.3}", bandwidth / 1e12);
    let flops = flops(&gpu);
    println!("bf16_tflop_s {:.1}", flops / 1e12);
    let limits = Limits { bandwidth, flops };
    let mut bench = Bench { gpu, limits, model: OnceCell::new(), weights: OnceCell::new(), decoder: None };
    for (name, cases) in parts.into_iter().filter(|(name, _)| *name != "limits") {
        println!("part {name}");
        run(&mut bench, name, &cases.split(',').collect::<Vec<_>>());
    }
}

/// `NAME` or `NAME=CASE,...`.
fn parse(part: &str) -> (&str, &str) {
    let (name, cases) = part.split_once('=').map_or((part, None), |(name, cases)| (name, Some(cases)));
    let names = PARTS.map(|(name, _)| name).join(", ");
    let known = PARTS.iter().find(|(known, _)| *known == name);
    let (name, usual) = known.unwrap_or_else(|| panic!("there is no part {name}; there are {names}"));
    (name, cases.unwrap_or(usual))
}

fn run(bench: &mut Bench, part: &str, cases: &[&str]) {
    if !["decode", "generate", "prefill"].contains(&part) {
        bench.decoder = None; // its memory may be wanted
    }
    match part {
        "decode" => rows(cases).for_each(|rows| decode(bench, rows)),
        "invariant" => invariant(bench, rows(cases)),
        "generate" => rows(cases).for_each(|rows| generate(bench.decoder(), rows)),
        "prefill" => rows(cases).for_each(|prompts| prefill(bench, prompts)),
        "kernels" => rows(cases).for_each(|rows| gpu_kernels::decode(bench, rows)),
        "train" => gpu_train::run(bench, cases),
        "train-kernels" => gpu_kernels::train(bench),
        "adamw" => gpu_train::adamw(bench),
        "handover" => handover(bench),
        _ => requests(bench),
    }
}

fn rows(cases: &[&str]) -> impl Iterator<Item = usize> {
    cases.iter().map(|case| {
        let rows = case.parse().ok().filter(|rows| (1..=SLOTS).contains(rows));
        rows.unwrap_or_else(|| panic!("{case}: not 1 to {SLOTS} rows"))
    })
}

/// Of Qwen/Qwen2.5-0.5B.
fn shape() -> Config {
    Config {
        family: Family::Qwen2,
        vocab_size: 151_936,
        hidden_size: 896,
        intermediate_size: 4864,
        num_hidden_layers: 24,
        num_attention_heads: 14,
        num_key_value_heads: 2,
        head_dim: None,
        qkv_bias: true,
        qk_norm: false,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        rope: RopeParameters { rope_theta: 1e6, scaling: Scaling::Default },
        tie_word_embeddings: true,
        initializer_range: 0.02,
        pad_token_id: None,
    }
}

/// Median device time of `work` [s].
fn timed(gpu: &Arc<dyn Driver>, times: usize, mut work: impl FnMut()) -> f64 {
    let mut taken: Vec<f64> = (0..times + 2)
        .map(|_| {
            let from = gpu.mark().unwrap();
            work();
            let to = gpu.mark().unwrap();
            gpu.wait(&to).unwrap();
            gpu.seconds_between(&from, &to).unwrap()
        })
        .skip(2)
        .collect();
    taken.sort_by(f64::total_cmp);
    taken[times / 2]
}

fn bandwidth(gpu: &Arc<dyn Driver>) -> f64 {
    let len = 4usize << 30;
    let (from, to) = (Buffer::<u8>::zeros(gpu, len).unwrap(), Buffer::<u8>::new(gpu, len).unwrap());
    2.0 * len as f64 / timed(gpu, 11, || to.copy_from(0, &from, 0, len).unwrap())
}

fn flops(gpu: &Arc<dyn Driver>) -> f64 {
    let n = 8192;
    let [a, b, out] = [(); 3].map(|()| numbers(gpu, n * n));
    let [a, b, out] = [&a, &b, &out].map(|numbers| -> Matrix { numbers.matrix(0, n) });
    2.0 * (n as f64).powi(3) / timed(gpu, 11, || kernels::linear(&**gpu, a, b, out, [n; 3]).unwrap())
}

/// Between -1 and 1: zeros would take less power, and so be faster. Few of them come from the host, which would take its time.
fn numbers(gpu: &Arc<dyn Driver>, len: usize) -> DynBuffer {
    const PIECE: usize = 1 << 20;
    let random: Vec<f32> = (0..PIECE).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
    let (piece, all) =
        (DynBuffer::from_f32(gpu, Dtype::Bf16, &random).unwrap(), DynBuffer::new(gpu, Dtype::Bf16, len).unwrap());
    for at in (0..len).step_by(PIECE) {
        all.bytes().copy_from(2 * at, piece.bytes(), 0, 2 * PIECE.min(len - at)).unwrap();
    }
    all
}

fn tokens(len: usize, seed: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729) % 151_000) as u32).collect()
}

fn decoder(
    gpu: &Arc<dyn Driver>,
    model: &Model,
    [slots, max_prompt_tokens, new]: [usize; 3],
    batch_invariant: bool,
) -> GpuDecoder {
    let settings = Settings {
        group_size: GROUP,
        max_sequences: slots,
        max_completion_tokens: new,
        sampling: Sampling::default(),
        stop_ids: Vec::new(),
        seed: 1,
        step: 0,
    };
    let on = GpuOptions { dtype: Dtype::Bf16, max_prompt_tokens, batch_invariant };
    GpuDecoder::new(gpu, model, &settings, on).unwrap()
}

fn run_prompts(decoder: &mut GpuDecoder, prompts: &[Vec<u32>]) {
    let prompts = prompts.iter().enumerate();
    let prompts = prompts.map(|(group, tokens)| {
        let (stream, sampling) = (Stream::new(1, 0, ""), Sampling::default());
        Prefill { group, tokens, stream, sampling }
    });
    decoder.prefill(&prompts.collect::<Vec<_>>()).unwrap();
}

/// Groups of a prompt each, one token drawn for every row.
fn begin(decoder: &mut GpuDecoder, rows: usize, drawn: &mut Vec<Drawn>) {
    let prompts: Vec<_> = (0..rows.div_ceil(GROUP)).map(|i| tokens(PROMPT, i)).collect();
    run_prompts(decoder, &prompts);
    let starts = (0..rows).map(|slot| Start { slot, group: slot / GROUP, sample: slot % GROUP });
    decoder.begin(&starts.collect::<Vec<_>>(), drawn).unwrap();
}

fn end(decoder: &mut GpuDecoder, rows: usize) {
    (0..rows).for_each(|slot| decoder.end(slot));
    (0..rows.div_ceil(GROUP)).for_each(|group| decoder.forget(group));
}

/// Wall time of prompts and all their tokens.
fn generate(decoder: &mut GpuDecoder, rows: usize) {
    let mut once = || {
        let (began, mut drawn) = (std::time::Instant::now(), Vec::new());
        begin(decoder, rows, &mut drawn);
        while drawn.len() < rows * NEW {
            decoder.step(&mut drawn).unwrap();
        }
        end(decoder, rows);
        began.elapsed().as_secs_f64()
    };
    let mut taken: Vec<f64> = (0..6).map(|_| once()).skip(1).collect();
    taken.sort_by(f64::total_cmp);
    println!("generate_{rows}_tokens_s {:.0}", (rows * NEW) as f64 / taken[2]);
}

fn decode(bench: &mut Bench, rows: usize) {
    let (gpu, limits) = (Arc::clone(&bench.gpu), bench.limits);
    decode_step(&gpu, bench.decoder(), ("decode", rows), limits);
}

fn invariant(bench: &Bench, rows: impl Iterator<Item = usize>) {
    let mut decoder = decoder(&bench.gpu, bench.model(), [SLOTS, PROMPT, NEW], true);
    rows.for_each(|rows| decode_step(&bench.gpu, &mut decoder, ("invariant", rows), bench.limits));
}

/// A step at a context of 210 tokens, on the device's clock.
fn decode_step(gpu: &Arc<dyn Driver>, decoder: &mut GpuDecoder, (name, rows): (&str, usize), limits: Limits) {
    let mut drawn = Vec::new();
    begin(decoder, rows, &mut drawn);
    let mut marks = Vec::new();
    for _ in 0..120 {
        decoder.step(&mut drawn).unwrap();
        marks.push(gpu.mark().unwrap());
    }
    gpu.wait(marks.last().unwrap()).unwrap();
    end(decoder, rows);
    let between = |i: usize| gpu.seconds_between(&marks[i], &marks[i + 1]).unwrap();
    let mut taken: Vec<f64> = (90..110).map(between).collect();
    taken.sort_by(f64::total_cmp);
    let cache = KV * (rows.div_ceil(GROUP) * PROMPT + 100 * rows) as f64;
    let limit = limits.seconds(2.0 * MATRICES, 2.0 * MATRICES * rows as f64) + limits.seconds(cache, 0.0);
    println!("{name}_{rows}_limit_ms {:.4}\n{name}_{rows}_ms {:.4}", limit * 1e3, taken[10] * 1e3);
}

fn prefill(bench: &mut Bench, prompts: usize) {
    let (gpu, flops) = (Arc::clone(&bench.gpu), bench.limits.flops);
    let decoder = bench.decoder();
    let all: Vec<_> = (0..prompts).map(|i| tokens(PROMPT, i)).collect();
    let seconds = timed(&gpu, 5, || {
        run_prompts(decoder, &all);
        (0..prompts).for_each(|group| decoder.forget(group));
    });
    let limit = 2.0 * ((MATRICES - HEAD) * (prompts * PROMPT) as f64 + HEAD * prompts as f64) / flops;
    println!("prefill_{prompts}_limit_ms {:.4}\nprefill_{prompts}_ms {:.3}", limit * 1e3, seconds * 1e3);
}

/// The weights' bytes from one place to another, as a sampler takes them over from a trainer on the same card.
fn handover(bench: &Bench) {
    let len = 2 * MATRICES as usize;
    let buffer = || Buffer::<u8>::shareable(&bench.gpu, len).unwrap();
    let (from, to) = (buffer(), buffer());
    let seconds = timed(&bench.gpu, 11, || to.copy_from(0, &from, 0, len).unwrap());
    let limit = bench.limits.seconds(2.0 * len as f64, 0.0);
    println!("handover_limit_ms {:.3}\nhandover_ms {:.3}", limit * 1e3, seconds * 1e3);
}

/// Lengths of nano-vllm's benchmark: 256 requests, inputs and outputs of 100 to 1,024 tokens.
fn lengths() -> Vec<[usize; 2]> {
    let mut state = 0u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        100 + (state >> 33) as usize % 925
    };
    (0..256).map(|_| [next(), next()]).collect()
}

/// Tokens drawn for those requests, and the wall time.
fn requests(bench: &Bench) {
    let lengths = lengths();
    println!("requests_limit_s {:.3}", requests_limit(&lengths, bench.limits));
    let mut decoder = decoder(&bench.gpu, bench.model(), [256, 1024, 1025], false);
    let prompts: Vec<_> = lengths.iter().enumerate().map(|(i, [input, _])| tokens(*input, i)).collect();
    let began = std::time::Instant::now();
    run_prompts(&mut decoder, &prompts);
    let starts: Vec<Start> = (0..256).map(|slot| Start { slot, group: slot, sample: 0 }).collect();
    let (mut drawn, mut left, mut total) = (Vec::new(), [0usize; 256], 0);
    lengths.iter().enumerate().for_each(|(slot, [_, output])| left[slot] = *output);
    decoder.begin(&starts, &mut drawn).unwrap();
    while left.iter().any(|&left| left > 0) {
        decoder.step(&mut drawn).unwrap();
        for Drawn { slot, .. } in drawn.drain(..).filter(|drawn| left[drawn.slot] > 0).collect::<Vec<_>>() {
            (left[slot], total) = (left[slot] - 1, total + 1);
            if left[slot] == 0 {
                decoder.end(slot);
            }
        }
    }
    println!("requests_tokens {total}\nrequests_tokens_s {:.0}", f64::from(total) / began.elapsed().as_secs_f64());
}

/// Seconds that the weights' and caches' bytes and the products' operations of those requests take at least.
fn requests_limit(lengths: &[[usize; 2]], limits: Limits) -> f64 {
    let longest = lengths.iter().map(|[_, output]| *output).max().unwrap();
    let input: usize = lengths.iter().map(|[input, _]| input).sum();
    let step = |i: usize| {
        let running = lengths.iter().filter(|[_, output]| *output > i);
        let (rows, cached) =
            running.fold((0.0, 0.0), |(rows, cached), [input, _]| (rows + 1.0, cached + (input + i) as f64));
        limits.seconds(2.0 * MATRICES, 2.0 * MATRICES * rows) + limits.seconds(KV * cached, 0.0)
    };
    limits.seconds(0.0, 2.0 * (MATRICES - HEAD) * input as f64) + (0..longest).map(step).sum::<f64>()
}
