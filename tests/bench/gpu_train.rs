//! What training reaches: forward and backward of a GRPO step and of plain next-token training, and the optimizer.

use std::sync::Arc;

use grpo_pipes::gpu::Weights;
use grpo_pipes::gpu::driver::{Driver, Dtype};
use grpo_pipes::gpu::packed::{Gradients, Keep, Learner, Optimizer};
use grpo_pipes::grpo::pack::{self, MicroBatch, Sequence};
use grpo_pipes::model::Model;
use grpo_pipes::optim::{self, Moments, OptimizerConfig, Rule, Schedule, StateType};

use super::{GROUP, HEAD, MATRICES, PROMPT, timed, tokens};

const COMPLETION: usize = 150;
const SEQUENCES: usize = 64;
/// Operations of attention, forward, for a query and a position it sees.
const PAIR: f64 = 86_016.0;
/// Bytes of a parameter that an update with the norm before it reads and writes, 16 of them moments in f32.
const UPDATE: f64 = 34.0;

/// Prints times, and what they would be at the card's bandwidth [bytes/s] and operations [/s].
pub fn run(gpu: &Arc<dyn Driver>, model: &Model, (bandwidth, flops): (f64, f64)) {
    let weights = Weights::of(gpu, model, Dtype::Bf16, 1100).unwrap();
    let gradients = Gradients::zeros(gpu, model.config()).unwrap();
    let mut learner = Learner::new(gpu, &weights, Keep::All, 1 << 30).unwrap();
    for (name, batch) in [("each", grpo(1)), ("once", grpo(GROUP)), ("1024", next_token())] {
        let slope = |_: usize, _: f32| 1e-4;
        let with = (&batch.targets[..], 1.0);
        let seconds = timed(gpu, 5, || {
            learner.accumulate(&weights, &batch.packed, with, (&gradients, &slope)).unwrap();
        });
        let (limit, tokens) = (operations(&batch) / flops, batch.packed.tokens.len());
        println!("train_{name}_ms {:.2}\ntrain_{name}_limit_ms {:.2}", seconds * 1e3, limit * 1e3);
        println!("train_{name}_tokens_s {:.0}", tokens as f64 / seconds);
    }
    for (name, state, bytes) in [("adamw", StateType::F32, UPDATE), ("adamw_bf16", StateType::Bf16, UPDATE - 8.0)] {
        let seconds = update(gpu, model, (&gradients, &weights), state);
        let limit = bytes * gradients.layout.all as f64 / bandwidth;
        println!("{name}_ms {:.3}\n{name}_limit_ms {:.3}", seconds * 1e3, limit * 1e3);
    }
}

/// Seconds of the norm and an update.
fn update(
    gpu: &Arc<dyn Driver>,
    model: &Model,
    (gradients, weights): (&Gradients, &Weights),
    optimizer_state: StateType,
) -> f64 {
    let config = OptimizerConfig {
        learning_rate: 1e-6,
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        optimizer_state,
        schedule: Schedule::Constant,
        warmup_ratio: 0.0,
        total_steps: None,
    };
    let mut optimizer = Optimizer::new(gpu, model).unwrap();
    optimizer.take_moments(&Moments::zeros(&model.config().parameters(), optimizer_state)).unwrap();
    timed(gpu, 11, || {
        let norm = optim::global_norm(&optimizer.norms(gradients).unwrap());
        optimizer.update(&Rule::new(&config, norm, 1, 1), gradients, weights).unwrap();
    })
}

/// 64 completions, each `group` of them of one prompt.
fn grpo(group: usize) -> MicroBatch {
    let prompts: Vec<_> = (0..SEQUENCES).map(|i| tokens(PROMPT, i / group)).collect();
    let completions: Vec<_> = (0..SEQUENCES).map(|i| tokens(COMPLETION, 100 + i)).collect();
    batch(&prompts, &completions)
}

/// 32 texts of 1,024 tokens.
fn next_token() -> MicroBatch {
    let first: Vec<_> = (0..32).map(|i| vec![i]).collect();
    let rest: Vec<_> = (0..32).map(|i| tokens(1023, i)).collect();
    batch(&first, &rest)
}

fn batch(prompts: &[Vec<u32>], completions: &[Vec<u32>]) -> MicroBatch {
    let pairs = prompts.iter().zip(completions);
    let sequences: Vec<_> = pairs.map(|(prompt, completion)| Sequence { prompt, completion }).collect();
    pack::pack(&sequences, &(0..sequences.len()).collect::<Vec<_>>())
}

/// Of forward and backward.
fn operations(batch: &MicroBatch) -> f64 {
    let packed = &batch.packed;
    let len = |i: usize| (packed.starts[i + 1] - packed.starts[i]) as f64;
    let pairs = |(i, prefix): (usize, &Option<usize>)| len(i) * (prefix.map_or(0.0, len) + (len(i) + 1.0) / 2.0);
    let pairs: f64 = packed.prefixes.iter().enumerate().map(pairs).sum();
    let products = (MATRICES - HEAD) * packed.tokens.len() as f64 + HEAD * batch.targets.len() as f64;
    3.0 * (2.0 * products + PAIR * pairs)
}
