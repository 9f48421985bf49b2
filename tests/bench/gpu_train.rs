//! What training reaches: forward and backward of a GRPO step and of plain next-token training, and the optimizer.

use std::sync::Arc;

use grpo_pipes::gpu::adamw::AdamW;
use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::gpu::packed::{DeviceGradients, KeptActivations, PackedModel, PlanRequest, TrainingPlan};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::optim::{self, Moments, OptimizerConfig, Rule};
use grpo_pipes::train::microbatch::{self, MicroBatch, Sequence};

use super::{Bench, GROUP, HEAD, MATRICES, PROMPT, shape, timed, tokens};

const COMPLETION: usize = 150;
const SEQUENCES: usize = 64;
/// Operations of attention, forward, for a query and a position it sees.
pub const PAIR: f64 = 86_016.0;
/// Bytes of a parameter that an update with the norm before it reads and writes, 16 of them moments in f32.
const UPDATE: f64 = 34.0;

/// Forward and backward of some batches: times, and what they would be at the card's rate of operations.
pub fn run(bench: &Bench, names: &[&str]) {
    let (gpu, weights) = (&bench.gpu, bench.weights());
    let gradients = DeviceGradients::zeros(gpu, &weights.config).unwrap();
    let mut learner = PackedModel::new(gpu, weights, KeptActivations::All, logits_bytes(gpu)).unwrap();
    for name in names {
        let batch = match *name {
            "each" => grpo(1),
            "once" => grpo(GROUP),
            "1024" => next_token(),
            _ => panic!("{name}: not each, once or 1024"),
        };
        let slope = |_: usize, _: f32| 1e-4.into();
        let with = (&batch.targets[..], 1.0);
        let seconds = timed(gpu, 5, || {
            learner.accumulate(weights, &batch.packed, with, (&gradients, &slope)).unwrap();
        });
        let (limit, tokens) = (operations(&batch) / bench.limits.flops, batch.packed.tokens.len());
        println!("train_{name}_tokens_s {:.0}", tokens as f64 / seconds);
        println!("train_{name}_limit_ms {:.2}\ntrain_{name}_ms {:.2}", limit * 1e3, seconds * 1e3);
    }
}

/// An update and the norm before it.
pub fn adamw(bench: &Bench) {
    let gradients = DeviceGradients::zeros(&bench.gpu, &shape()).unwrap();
    let mut optimizer = AdamW::new(&bench.gpu, bench.model(), &gradients).unwrap();
    for (name, state, bytes) in [("adamw", Dtype::F32, UPDATE), ("adamw_bf16", Dtype::Bf16, UPDATE - 8.0)] {
        let seconds = update(bench, &mut optimizer, &gradients, state);
        let limit = bytes * gradients.numbers.len() as f64 / bench.limits.bandwidth;
        println!("{name}_limit_ms {:.3}\n{name}_ms {:.3}", limit * 1e3, seconds * 1e3);
    }
}

/// What grpo-step would hold of logits on this card.
pub fn logits_bytes(gpu: &Arc<dyn Driver>) -> usize {
    let (config, limit) = (shape(), gpu.memory().unwrap().all);
    let request = PlanRequest {
        config: &config,
        adapter: None,
        dtype: Dtype::Bf16,
        moments: Dtype::F32,
        frozen: 0,
        tokens: None,
        limit,
    };
    TrainingPlan::choose(request).unwrap().logits_bytes
}

fn update(bench: &Bench, optimizer: &mut AdamW, gradients: &DeviceGradients, optimizer_state: Dtype) -> f64 {
    let config = OptimizerConfig { optimizer_state, ..OptimizerConfig::default() };
    optimizer.take_moments(&Moments::zeros(&shape().trainable().named(), optimizer_state)).unwrap();
    let copies = (&bench.weights().matrices, Some(&bench.weights().vectors));
    timed(&bench.gpu, 11, || {
        let norm = optim::global_norm(&optimizer.norms(gradients).unwrap());
        optimizer.update(&Rule::new(&config, norm, 1, 1), gradients, copies).unwrap();
    })
}

/// 64 completions, each `group` of them of one prompt.
pub fn grpo(group: usize) -> MicroBatch {
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
    microbatch::pack(&sequences, &(0..sequences.len()).collect::<Vec<_>>())
}

/// Of forward and backward.
fn operations(batch: &MicroBatch) -> f64 {
    let products = (MATRICES - HEAD) * batch.packed.tokens.len() as f64 + HEAD * batch.targets.len() as f64;
    3.0 * (2.0 * products + PAIR * pairs(batch))
}

/// Queries, each as often as it sees a position.
pub fn pairs(batch: &MicroBatch) -> f64 {
    let packed = &batch.packed;
    let len = |i: usize| (packed.starts[i + 1] - packed.starts[i]) as f64;
    let pairs = |(i, prefix): (usize, &Option<usize>)| len(i) * (prefix.map_or(0.0, len) + (len(i) + 1.0) / 2.0);
    packed.prefixes.iter().enumerate().map(pairs).sum()
}
