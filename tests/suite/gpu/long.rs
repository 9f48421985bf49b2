//! Long sequences, and many of them.

use std::collections::HashMap;
use std::sync::Arc;

use grpo_pipes::Result;
use grpo_pipes::engine::{Completion, Engine, GpuDecoder, GpuOptions, Request, Settings, Sink, Work};
use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::gpu::kernels::head_rows;
use grpo_pipes::gpu::packed::{ForwardPass, KeptActivations};
use grpo_pipes::gpu::{Buffer, DeviceWeights, DynBuffer};
use grpo_pipes::model::{Config, Model, Packed, Sampling};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::process::read_ahead::ReadAhead;

use super::{DTYPES, SHIM, gpu, numbers};

/// How many of what takes a GPU moments and the shim minutes.
fn many(gpu: &Arc<dyn Driver>, on_a_card: usize, on_the_shim: usize) -> usize {
    if gpu.name() == SHIM { on_the_shim } else { on_a_card }
}

fn model() -> Model {
    let config: Config = serde_json::from_value(serde_json::json!({
        "model_type": "qwen2", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "tie_word_embeddings": true, "initializer_range": 0.1
    }))
    .unwrap();
    Model::random(config, 7)
}

fn tokens(len: usize) -> Vec<u32> {
    numbers(5, len).iter().map(|x| ((x + 1.0) * 160.0) as u32).collect()
}

/// Logits of `tokens` after each of `positions`, `(positions, V)`, on the device.
fn logits(gpu: &Arc<dyn Driver>, model: &Model, dtype: Dtype, tokens: &[u32], positions: &[u32]) -> Vec<f32> {
    let (d, v) = (model.config().hidden_size, model.config().vocab_size);
    let weights = DeviceWeights::new(gpu, model, dtype, tokens.len()).unwrap();
    let mut forward = ForwardPass::new(gpu, &weights, KeptActivations::Nothing).unwrap();
    let packed = Packed { tokens: tokens.to_vec(), starts: vec![0, tokens.len()], prefixes: vec![None] };
    let batch = forward.batch(&packed).unwrap();
    forward.run(&weights, &batch, &mut |_, _| Ok(())).unwrap();
    let hidden = DynBuffer::new(gpu, dtype, positions.len() * d).unwrap();
    forward.hidden(&weights, &Buffer::from_slice(gpu, positions).unwrap(), &hidden).unwrap();
    let logits = Buffer::new(gpu, positions.len() * v).unwrap();
    head_rows(&**gpu, (weights.head(), &hidden), &logits, None, [positions.len(), v, d]).unwrap();
    logits.to_vec().unwrap()
}

/// How far the arithmetic of a type may lead away, as a share of the largest logit.
fn tolerance(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => 1e-5,
        Dtype::Bf16 => 2e-2,
        Dtype::F16 => 3e-3,
    }
}

/// Logits from the first position to the 1,024th are the CPU's in f32.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn logits_are_the_cpus_up_to_a_late_position_on_a_gpu() {
    let (gpu, model) = (gpu(), model());
    let last = many(&gpu, 1024, 200);
    let positions: Vec<u32> = [0, 1, 31, 32, 63, 64, 127, last / 2, last - 1, last].map(|at| at as u32).to_vec();
    let tokens = tokens(last + 1);
    let prompts: Vec<&[u32]> = positions.iter().map(|&at| &tokens[..=at as usize]).collect();
    let want: Vec<f32> = model.prefill(&[], &prompts).into_iter().flat_map(|(_, logits)| logits).collect();
    let largest = want.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    for dtype in DTYPES.into_iter().filter(|&dtype| gpu.supports(dtype)) {
        let got = logits(&gpu, &model, dtype, &tokens, &positions);
        let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
        assert!(off < tolerance(dtype), "{dtype:?}: {off}");
    }
}

/// Keeps completions by prompt; one that comes again must be the same.
#[derive(Default)]
struct Again {
    by_prompt: HashMap<String, (Vec<u32>, Completion)>,
    groups: usize,
}

impl Sink<()> for Again {
    fn group(&mut self, request: Request<()>, mut completions: Vec<Completion>) -> Result<()> {
        self.groups += 1;
        let (name, completion) = (request.prompt_id, completions.remove(0));
        let before = self.by_prompt.entry(name).or_insert((request.tokens, completion.clone()));
        assert_eq!(before.1, completion, "group {}", self.groups);
        Ok(())
    }

    fn progress(&mut self, _: Work) -> Result<()> {
        Ok(())
    }
}

/// Samples in 64 slots.
struct Sampled {
    decoder: GpuDecoder,
    settings: Settings,
    longest: usize,
}

impl Sampled {
    /// From prompts of up to `longest` tokens, completions of up to `limit`.
    fn new(gpu: &Arc<dyn Driver>, dtype: Dtype, [longest, limit]: [usize; 2]) -> Self {
        let settings = Settings {
            group_size: 1,
            max_sequences: 64,
            max_completion_tokens: limit,
            sampling: Sampling::default(),
            stop_ids: (0..40).collect(),
            seed: 1,
            step: 0,
        };
        let on = GpuOptions { dtype, max_prompt_tokens: longest, batch_invariant: true };
        let decoder = GpuDecoder::new(gpu, &model(), &settings, on).unwrap();
        Self { decoder, settings, longest }
    }

    /// From `count` prompts, 50 different ones.
    fn run(&mut self, count: usize, sink: &mut Again) {
        let request = |i: usize| {
            let tokens = tokens(self.longest)[i % self.longest..].to_vec();
            Request { prompt_id: i.to_string(), tokens, payload: (), own: None }
        };
        let requests = ReadAhead::ready((0..count).map(|i| request(i % 50)).collect());
        Engine::new(&mut self.decoder, self.settings.clone()).run(requests, sink).unwrap();
    }
}

/// No slot, place or byte is lost, and the last completions are the first ones.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn ten_thousand_prompts_leave_nothing_behind_on_a_gpu() {
    let gpu = gpu();
    let held = || {
        gpu.wait(&gpu.mark().unwrap()).unwrap();
        gpu.memory().unwrap().held
    };
    let (count, before) = (many(&gpu, 10_000, 400), held());
    let (mut sampled, mut sink) = (Sampled::new(&gpu, Dtype::F16, [6, 3]), Again::default());
    // A number of rows is recorded when it is first met: so all are.
    let each_number_of_rows = [64, 32, 16, 8, 4, 2, 1];
    each_number_of_rows.into_iter().for_each(|rows| sampled.run(rows, &mut sink));
    let at_first = held();
    assert!(at_first > before);
    sampled.run(count, &mut sink);
    assert_eq!(held(), at_first, "bytes held after many prompts and after few");
    drop(sampled);
    assert_eq!(held(), before, "bytes held after all and before");
    assert_eq!((sink.groups, sink.by_prompt.len()), (count + each_number_of_rows.iter().sum::<usize>(), 50));
}

/// What a draw records is what the training step will find for its token, late in a sequence too.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn log_probabilities_recorded_are_those_recomputed_on_a_gpu() {
    let gpu = gpu();
    let (longest, limit) = (many(&gpu, 900, 60), many(&gpu, 124, 6));
    // Random weights find no token likely: a rounding that falls the other way in 16 bits moves all log-probabilities.
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 4e-3), (Dtype::F16, 5e-4)] {
        let mut sink = Again::default();
        Sampled::new(&gpu, dtype, [longest, limit]).run(many(&gpu, 50, 6), &mut sink);
        let (mut sum, mut count) = (0.0, 0);
        for (prompt, Completion { tokens, logprobs, .. }) in sink.by_prompt.values() {
            let whole = [&prompt[..], tokens].concat();
            let before: Vec<u32> = (0..tokens.len()).map(|i| (prompt.len() + i - 1) as u32).collect();
            let logits = logits(&gpu, &model(), dtype, &whole, &before);
            for ((row, token), recorded) in logits.chunks_exact(320).zip(tokens).zip(logprobs) {
                let sum_of_all: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                sum += (f64::from(row[*token as usize]) - sum_of_all.ln() - f64::from(*recorded)).abs();
                count += 1;
            }
        }
        assert!(count > 0 && sum / f64::from(count) < tolerance, "{dtype:?}: {}", sum / f64::from(count));
    }
}
