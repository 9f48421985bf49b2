//! Decode steps of one and of sixteen sequences with weights in f32 and in bf16, and the speed of the memory they stream from.
//!
//! `decode F32_DIR BF16_DIR SAMPLES` prints names and numbers in GB/s, the best of all samples, which take turns: `memory`, a plain
//! read of a buffer on all threads; then the weights of a step over its time, the draw of each sequence's token included.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use grpo_pipes::engine::Sampler;
use grpo_pipes::model::{DecodeRow, KvCache, Model, Sampling};
use grpo_pipes::numbers::aligned::AlignedVec;
use grpo_pipes::numbers::dtype::Dtype;
use rayon::prelude::*;

/// Positions of the prompt that all sequences share, and of a completion.
const PROMPT: u32 = 110;
const COMPLETION: usize = 200;

/// Numbers of the buffer that is read: 1 GiB, more than any cache.
const BUFFER: usize = 1 << 28;

/// Sequences of a model that step together.
struct Decoder<'m> {
    model: &'m Model,
    prompt: KvCache,
    own: Vec<KvCache>,
    logits: Vec<f32>,
    samplers: Vec<Sampler>,
    best: f64,
}

impl<'m> Decoder<'m> {
    fn new(model: &'m Model, sequences: usize) -> Self {
        let tokens: Vec<u32> = (0..PROMPT).map(|i| i * 17 % 1000).collect();
        Self {
            model,
            prompt: model.prefill(&[], &[&tokens]).remove(0).0,
            own: (0..sequences).map(|_| KvCache::new(model.config(), COMPLETION)).collect(),
            logits: vec![0.0; sequences * model.config().vocab_size],
            samplers: (0..sequences).map(|_| Sampler::default()).collect(),
            best: f64::INFINITY,
        }
    }

    fn step(&mut self) {
        if self.own[0].len() == COMPLETION {
            self.own.iter_mut().for_each(KvCache::clear);
        }
        let began = Instant::now();
        let row = |(token, own)| DecodeRow { token, prompt: &self.prompt, own };
        let mut rows: Vec<_> = (0..).zip(&mut self.own).map(row).collect();
        self.model.decode(&mut rows, &mut self.logits);
        let rows = self.logits.par_chunks(self.model.config().vocab_size).zip(&mut self.samplers);
        rows.for_each(|(logits, sampler)| {
            black_box(sampler.draw(logits, [&[], &[]], 0.5, &Sampling::default()));
        });
        self.best = self.best.min(began.elapsed().as_secs_f64());
    }

    fn speed(&self) -> f64 {
        self.model.weight_bytes() as f64 / 1e9 / self.best
    }
}

/// Seconds of a read of all numbers, from four places at a time on each thread, so that no single stream of misses is the limit.
fn read(buffer: &[f32]) -> f64 {
    const STREAMS: usize = 4;
    const CHUNK: usize = 32;
    let began = Instant::now();
    buffer.par_chunks(buffer.len() / (4 * rayon::current_num_threads())).for_each(|part| {
        let chunks = part.as_chunks::<CHUNK>().0;
        let mut sums = [0u32; CHUNK];
        for i in 0..chunks.len() / STREAMS {
            for stream in 0..STREAMS {
                let chunk = &chunks[stream * (chunks.len() / STREAMS) + i];
                sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum = sum.wrapping_add(x.to_bits()));
            }
        }
        black_box(sums);
    });
    began.elapsed().as_secs_f64()
}

#[allow(clippy::print_stdout)] // its only output
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, full, half, samples, ..] = &args[..] else { panic!("decode F32_DIR BF16_DIR SAMPLES") };
    let samples: usize = samples.parse().expect("SAMPLES is a number");
    let full = Model::load(Path::new(full)).expect("a model directory");
    let half = Model::load_as(Path::new(half), Dtype::Bf16).expect("a model directory");
    let (mut full_1, mut full_16) = (Decoder::new(&full, 1), Decoder::new(&full, 16));
    let (mut half_1, mut half_16) = (Decoder::new(&half, 1), Decoder::new(&half, 16));
    let mut buffer = AlignedVec::<f32>::zeros(BUFFER);
    buffer.fill(1.0);
    let mut memory = f64::INFINITY;
    // On a thread of the pool, as the engine has it.
    rayon::scope(|_| {
        for _ in 0..samples {
            memory = memory.min(read(&buffer));
            full_1.step();
            full_16.step();
            memory = memory.min(read(&buffer));
            half_1.step();
            half_16.step();
        }
    });
    println!("memory {:.3}", size_of_val(&*buffer) as f64 / 1e9 / memory);
    println!("f32_1 {:.3}\nf32_16 {:.3}", full_1.speed(), full_16.speed());
    println!("bf16_1 {:.3}\nbf16_16 {:.3}", half_1.speed(), half_16.speed());
}
