//! What sampling and training reach on a GPU, as a share of what the card can do, both measured in this run. Random weights in the shape of
//! Qwen2.5-0.5B, lengths forced. Lines of `name value` on standard output, for pipelines/bench-gpu.sh.
#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)]

mod gpu_train;

use std::sync::Arc;

use grpo_pipes::engine::{Decoder, Drawn, GpuDecoder, OnGpu, Prompt, Sampling, Settings, Start};
use grpo_pipes::gpu::driver::{Driver, Dtype, Matrix, Product};
use grpo_pipes::gpu::{Buffer, Numbers, cuda};
use grpo_pipes::model::{Config, Model};
use grpo_pipes::rng::Stream;

const PROMPT: usize = 110;
const GROUP: usize = 16;
const NEW: usize = 200;
/// Parameters that products read, 2 operations each a token, and of those the LM head's.
const MATRICES: f64 = 493_961_216.0;
const HEAD: f64 = 136_134_656.0;
/// Keys and values of a token [bytes].
const KV: f64 = 12_288.0;

fn main() {
    let gpu = cuda::open(0).unwrap();
    println!("gpu {}", gpu.name().replace(' ', "_"));
    let bandwidth = bandwidth(&gpu);
    let flops = flops(&gpu);
    println!("bandwidth_tb_s {:.3}\nbf16_tflop_s {:.1}", bandwidth / 1e12, flops / 1e12);
    let model = Model::random(shape(), 1);
    for batch_invariant in [false, true] {
        for rows in [1, 16, 64, 512] {
            let seconds = decode_step(&gpu, &model, rows, batch_invariant);
            let prompts = rows.div_ceil(GROUP) as f64;
            let cache = KV * (prompts * PROMPT as f64 + 100.0 * rows as f64);
            let limit = (2.0 * MATRICES / bandwidth).max(2.0 * MATRICES * rows as f64 / flops) + cache / bandwidth;
            let name = if batch_invariant { "invariant" } else { "decode" };
            println!("{name}_{rows}_ms {:.4}\n{name}_{rows}_limit_ms {:.4}", seconds * 1e3, limit * 1e3);
        }
    }
    println!("generate_64_tokens_s {:.0}", (64 * NEW) as f64 / generate(&gpu, &model, 64));
    for prompts in [4, 64] {
        let seconds = prefill(&gpu, &model, prompts);
        let operations = 2.0 * ((MATRICES - HEAD) * (prompts * PROMPT) as f64 + HEAD * prompts as f64);
        println!(
            "prefill_{prompts}_ms {:.3}\nprefill_{prompts}_mfu {:.3}",
            seconds * 1e3,
            operations / seconds / flops
        );
    }
    let (tokens, seconds) = requests(&gpu, &model);
    println!("requests_tokens {tokens}\nrequests_tokens_s {:.0}", tokens as f64 / seconds);
    gpu_train::run(&gpu, &model, (bandwidth, flops));
    println!("requests_limit_s {:.3}", requests_limit(bandwidth, flops));
}

/// Of Qwen/Qwen2.5-0.5B.
fn shape() -> Config {
    Config {
        model_type: "qwen2".into(),
        vocab_size: 151_936,
        hidden_size: 896,
        intermediate_size: 4864,
        num_hidden_layers: 24,
        num_attention_heads: 14,
        num_key_value_heads: 2,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        use_sliding_window: false,
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

/// Bytes read and written by a copy within the card [/s].
fn bandwidth(gpu: &Arc<dyn Driver>) -> f64 {
    let len = 4usize << 30;
    let (from, to) = (Buffer::<u8>::zeros(gpu, len).unwrap(), Buffer::<u8>::new(gpu, len).unwrap());
    2.0 * len as f64 / timed(gpu, 11, || gpu.copy(to.at(0), from.at(0), len).unwrap())
}

/// Operations of a large product in bf16 [/s].
fn flops(gpu: &Arc<dyn Driver>) -> f64 {
    let n = 8192;
    let random: Vec<f32> = (0..n * n).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
    let numbers = || Numbers::of(gpu, Dtype::Bf16, &random).unwrap();
    let (a, b, out) = (numbers(), numbers(), Numbers::new(gpu, Dtype::Bf16, n * n).unwrap());
    let matrix = |numbers: &Numbers| -> Matrix { numbers.matrix(0, n) };
    let [a, b, out] = [matrix(&a), matrix(&b), matrix(&out)];
    let product = Product { a, a_turned: false, b, b_turned: true, out, shape: [n; 3], beta: 0.0 };
    2.0 * (n as f64).powi(3) / timed(gpu, 11, || gpu.product(&product).unwrap())
}

fn settings(rows: usize, limit: usize) -> Settings {
    Settings {
        group_size: GROUP,
        max_sequences: rows,
        max_completion_tokens: limit,
        sampling: Sampling::default(),
        stop_ids: Vec::new(),
        seed: 1,
        step: 0,
    }
}

fn tokens(len: usize, seed: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729) % 151_000) as u32).collect()
}

fn decoder(gpu: &Arc<dyn Driver>, model: &Model, rows: usize, batch_invariant: bool) -> GpuDecoder {
    let on = OnGpu { dtype: Dtype::Bf16, max_prompt_tokens: PROMPT, batch_invariant };
    GpuDecoder::new(gpu, model, &settings(rows, NEW), on).unwrap()
}

fn run_prompts(decoder: &mut GpuDecoder, first: usize, prompts: &[Vec<u32>]) {
    let of = |(i, tokens): (usize, &Vec<u32>)| (first + i, tokens.clone());
    let owned: Vec<(usize, Vec<u32>)> = prompts.iter().enumerate().map(of).collect();
    let prompts = owned.iter().map(|(group, tokens)| Prompt { group: *group, tokens, stream: Stream::new(1, 0, "") });
    decoder.prefill(&prompts.collect::<Vec<_>>()).unwrap();
}

/// Groups of a prompt each, one token drawn for every row.
fn begin(decoder: &mut GpuDecoder, rows: usize, drawn: &mut Vec<Drawn>) {
    let prompts: Vec<_> = (0..rows.div_ceil(GROUP)).map(|i| tokens(PROMPT, i)).collect();
    run_prompts(decoder, 0, &prompts);
    let starts = (0..rows).map(|slot| Start { slot, group: slot / GROUP, sample: slot % GROUP });
    decoder.begin(&starts.collect::<Vec<_>>(), drawn).unwrap();
}

/// Wall time of prompts and all their tokens [s].
fn generate(gpu: &Arc<dyn Driver>, model: &Model, rows: usize) -> f64 {
    let mut decoder = decoder(gpu, model, rows, false);
    let mut once = || {
        let (began, mut drawn) = (std::time::Instant::now(), Vec::new());
        begin(&mut decoder, rows, &mut drawn);
        while drawn.len() < rows * NEW {
            decoder.step(&mut drawn).unwrap();
        }
        (0..rows).for_each(|slot| decoder.end(slot));
        (0..rows.div_ceil(GROUP)).for_each(|group| decoder.forget(group));
        began.elapsed().as_secs_f64()
    };
    let mut taken: Vec<f64> = (0..6).map(|_| once()).skip(1).collect();
    taken.sort_by(f64::total_cmp);
    taken[2]
}

/// Seconds of a step at a context of 210 tokens, on the device's clock.
fn decode_step(gpu: &Arc<dyn Driver>, model: &Model, rows: usize, batch_invariant: bool) -> f64 {
    let (mut decoder, mut drawn) = (decoder(gpu, model, rows, batch_invariant), Vec::new());
    begin(&mut decoder, rows, &mut drawn);
    let mut marks = Vec::new();
    for _ in 0..120 {
        decoder.step(&mut drawn).unwrap();
        marks.push(gpu.mark().unwrap());
    }
    gpu.wait(marks.last().unwrap()).unwrap();
    let between = |i: usize| gpu.seconds_between(&marks[i], &marks[i + 1]).unwrap();
    let mut taken: Vec<f64> = (90..110).map(between).collect();
    taken.sort_by(f64::total_cmp);
    taken[10]
}

fn prefill(gpu: &Arc<dyn Driver>, model: &Model, prompts: usize) -> f64 {
    let mut decoder = decoder(gpu, model, prompts, false);
    let all: Vec<_> = (0..prompts).map(|i| tokens(PROMPT, i)).collect();
    timed(gpu, 5, || {
        run_prompts(&mut decoder, 0, &all);
        (0..prompts).for_each(|group| decoder.forget(group));
    })
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

/// Tokens drawn for those requests and the wall time [s].
fn requests(gpu: &Arc<dyn Driver>, model: &Model) -> (usize, f64) {
    let lengths = lengths();
    let on = OnGpu { dtype: Dtype::Bf16, max_prompt_tokens: 1024, batch_invariant: false };
    let mut decoder = GpuDecoder::new(gpu, model, &settings(256, 1025), on).unwrap();
    let prompts: Vec<_> = lengths.iter().enumerate().map(|(i, [input, _])| tokens(*input, i)).collect();
    let began = std::time::Instant::now();
    run_prompts(&mut decoder, 0, &prompts);
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
    (total, began.elapsed().as_secs_f64())
}

/// Seconds that the weights' and caches' bytes and the products' operations of those requests take at least.
fn requests_limit(bandwidth: f64, flops: f64) -> f64 {
    let lengths = lengths();
    let longest = lengths.iter().map(|[_, output]| *output).max().unwrap();
    let input: usize = lengths.iter().map(|[input, _]| input).sum();
    let step = |i: usize| {
        let running = lengths.iter().filter(|[_, output]| *output > i);
        let (rows, cached) =
            running.fold((0.0, 0.0), |(rows, cached), [input, _]| (rows + 1.0, cached + (input + i) as f64));
        (2.0 * MATRICES / bandwidth).max(2.0 * MATRICES * rows / flops) + KV * cached / bandwidth
    };
    2.0 * (MATRICES - HEAD) * input as f64 / flops + (0..longest).map(step).sum::<f64>()
}
