//! The tiny recipe's supervised start from random weights, as long as one wants.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use grpo_pipes::error::Result;
use grpo_pipes::gsm8k::demonstration::{Sloppiness, demonstration};
use grpo_pipes::gsm8k::generate::{Problems, generate};
use grpo_pipes::gsm8k::{Row, Split};
use grpo_pipes::lines::record::Message;
use grpo_pipes::model::Model;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::optim::{OptimizerConfig, Schedule};
use grpo_pipes::tokenizer::{Tokenizer, stop_ids};
use grpo_pipes::train::backend::{Backend, Cpu};
use grpo_pipes::train::config::SupervisedConfig;
use grpo_pipes::train::supervised::{self, Example};
use grpo_pipes::train::trainer::{OpenBackend, Trainer};

use crate::fixtures::on_cpu;

/// Seeds that a comparison takes.
pub const SEEDS: [u64; 3] = [1, 2, 3];

/// Losses that count as the end.
const END: usize = 20;

fn recipe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/recipes/tiny")
}

/// Of the model's vocabulary, as `grpo-step --supervised` encodes them.
fn examples(count: usize, seed: u64) -> Vec<Example> {
    let (dir, sloppy) = (recipe(), Sloppiness { format: 0.8, arithmetic: 0.35 });
    let (tokenizer, end) = (Tokenizer::load(&dir).unwrap(), stop_ids(&dir).unwrap()[0]);
    let system = std::fs::read_to_string(dir.join("system_prompt.txt")).unwrap();
    let encode = |row: &Row| {
        let message = |role: &str, content: &str| Message::new(role, content);
        let chat = tokenizer.chat(&[message("system", &system), message("user", &row.question)]).unwrap();
        let text = demonstration(row, sloppy, seed, 0);
        let completion = tokenizer.encode(&text).unwrap().into_iter().chain([end]).collect();
        Example { prompt: tokenizer.encode(&chat).unwrap(), completion, digest: [0; 32] }
    };
    let problems = Problems { count, max_number: 10, seed };
    generate(problems, Split::Train).unwrap().iter().map(encode).collect()
}

/// The mean loss at the end of `steps` updates on `batch` demonstrations each.
pub fn end_loss([steps, batch]: [usize; 2], seed: u64, optimizer_state: Dtype, open: OpenBackend<'_>) -> f64 {
    let optimizer = OptimizerConfig {
        learning_rate: 3e-3,
        schedule: Schedule::Linear,
        warmup_ratio: 0.02,
        total_steps: Some(steps as u64),
        optimizer_state,
        ..OptimizerConfig::default()
    };
    let mut trainer = Trainer::random(&recipe(), optimizer, seed, open).unwrap();
    let config = SupervisedConfig { loss_on_prompt: true, micro_batch_tokens: 4096 };
    let examples = examples(steps * batch, seed);
    let losses = examples.chunks(batch).map(|batch| {
        let line = supervised::step(&mut trainer, config, batch).unwrap();
        line.get("loss").unwrap()
    });
    let losses: Vec<f64> = losses.collect();
    let end = &losses[losses.len().saturating_sub(END)..];
    end.iter().sum::<f64>() / end.len() as f64
}

/// Whether the means over the seeds differ by less than the seeds do.
pub fn is_within_noise(got: &[f64], want: &[f64]) -> bool {
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let spread = want.iter().fold(f64::MIN, |a, b| a.max(*b)) - want.iter().fold(f64::MAX, |a, b| a.min(*b));
    (mean(got) - mean(want)).abs() < spread
}

/// Trains on the CPU with products in bf16.
fn in_bf16(model: Model) -> Result<Box<dyn Backend>> {
    Ok(Box::new(Cpu::new(model, Dtype::Bf16)))
}

fn two_hundred_steps(state: Dtype, open: OpenBackend<'_>) -> [f64; 3] {
    SEEDS.map(|seed| end_loss([200, 16], seed, state, open))
}

/// All in f32.
static WANT: LazyLock<[f64; 3]> = LazyLock::new(|| two_hundred_steps(Dtype::F32, &on_cpu));

fn check_end(got: [f64; 3]) {
    let want = *WANT;
    assert!(want.iter().all(|loss| *loss < 2.0), "{want:?}: not learned");
    assert!(got != want && is_within_noise(&got, &want), "{got:?} {want:?}");
}

#[test]
fn two_hundred_steps_in_bf16_end_where_those_in_f32_do() {
    check_end(two_hundred_steps(Dtype::F32, &in_bf16));
}

#[test]
fn two_hundred_steps_with_moments_in_bf16_end_where_those_in_f32_do() {
    check_end(two_hundred_steps(Dtype::Bf16, &on_cpu));
}
