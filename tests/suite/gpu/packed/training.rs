use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use grpo_pipes::gpu::adamw::AdamW;
use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::gpu::packed::{DeviceGradients, PlanRequest, TrainingPlan};
use grpo_pipes::gpu::{Buffer, DeviceWeights};
use grpo_pipes::grpo::groups::{Group, Groups};
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::model::Model;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::optim::{self, Moments, OptimizerConfig, Rule, Trained};
use grpo_pipes::train::backend::Backend;
use grpo_pipes::train::config::GrpoConfig;
use grpo_pipes::train::gpu::Gpu;
use grpo_pipes::train::grpo_step::GrpoTrainer;
use grpo_pipes::train::trainer::{OpenBackend, Trainer};
use serde_json::{Value, json};

use super::super::{DTYPES, SHIM, gpu, numbers};
use super::model;
use crate::fixtures::{Reference, directory, distance, on_cpu};
use crate::tiny_job::{SEEDS, end_loss, is_within_noise};

#[derive(Parser)]
pub struct Options {
    #[command(flatten)]
    pub grpo: GrpoConfig,
    #[command(flatten)]
    pub optimizer: OptimizerConfig,
}

impl Options {
    pub fn of(options: &str) -> Self {
        Self::parse_from(format!("test {options}").split_whitespace())
    }
}

pub fn tiny() -> PathBuf {
    directory().join("tiny-qwen2")
}

/// Two groups of the reference's sequences, sampled by an older policy, their rewards up to three times `reward`.
pub fn groups(reward: f32) -> Vec<Group> {
    let dir = tempfile::tempdir().unwrap();
    let sequences = Reference::load().json["sequences"].as_array().unwrap()[..8].to_vec();
    let record = |(i, mut record): (usize, Value)| {
        let logprobs = numbers(i as u64, record["completion_token_ids"].as_array().unwrap().len());
        let logprobs: Vec<f32> = logprobs.iter().map(|x| -5.8 + 0.2 * x).collect();
        let more = json!({"group_id": format!("g{}", i / 4), "group_size": 4, "sample_index": i % 4, "logprobs": logprobs,
                          "reward": reward * (i * 5 % 4) as f32, "temperature": 0.9, "policy_id": null});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        record.to_string() + "\n"
    };
    let path = dir.path().join("scored.jsonl");
    std::fs::write(&path, sequences.into_iter().enumerate().map(record).collect::<String>()).unwrap();
    let limits = Model::load(&tiny()).unwrap().config().into();
    Groups::new(Input::open(&path).unwrap(), limits).collect::<grpo_pipes::Result<_>>().unwrap()
}

/// A checkpoint's bytes, the metrics of the steps that led to it, and the weights.
struct Outcome {
    files: Vec<Vec<u8>>,
    lines: Vec<Value>,
    weights: Vec<f32>,
}

fn train(options: &str, micro_batch_tokens: usize, place: OpenBackend<'_>) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let reference = tiny().display().to_string();
    let options = Options::of(&format!("--max-staleness any --beta 0.04 --reference {reference} {options}"));
    let mut trainer = Trainer::open(&tiny(), options.optimizer, None, place).unwrap();
    let mut lines = Vec::new();
    let mut grpo = GrpoTrainer::new(&mut trainer, options.grpo, micro_batch_tokens, false).unwrap();
    grpo.step(&groups(1.0), &mut |line| lines.push(serde_json::from_slice(&line.to_json()).unwrap())).unwrap();
    let out = dir.path().join("next");
    trainer.publish(&out, &[], Vec::new()).unwrap();
    let files = ["model.safetensors", "optimizer.safetensors", "state.json"];
    let files = files.map(|name| std::fs::read(out.join(name)).unwrap()).to_vec();
    Outcome { files, lines, weights: trainer.weights().unwrap().parameters().concat() }
}

pub fn on_gpu(gpu: &Arc<dyn Driver>, dtype: Dtype) -> impl Fn(Model) -> grpo_pipes::Result<Box<dyn Backend>> {
    let gpu = Arc::clone(gpu);
    move |model| {
        let request = PlanRequest {
            config: model.config(),
            adapter: model.adapter(),
            dtype,
            moments: Dtype::F32,
            frozen: 1,
            tokens: None,
            limit: 1 << 30,
        };
        let mut plan = TrainingPlan::choose(request)?;
        plan.logits_bytes = 4 * 320 * 20;
        Ok(Box::new(Gpu::new(Arc::clone(&gpu), model, dtype, &plan)?))
    }
}

fn assert_near(got: &Outcome, want: &Outcome, start: &[f32]) {
    for (got, want) in got.lines.iter().zip(&want.lines) {
        for (name, want) in want.as_object().unwrap() {
            let (got, want) = (got[name].as_f64().unwrap(), want.as_f64().unwrap());
            assert!((got - want).abs() <= 1e-4 * want.abs().max(0.1), "{name}: {got} for {want}");
        }
    }
    let update = |of: &Outcome| -> Vec<f32> { of.weights.iter().zip(start).map(|(w, start)| w - start).collect() };
    let off = distance(&update(got), &update(want));
    assert!(off < 2e-3, "{off}");
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn a_grpo_step_equals_the_cpus_whatever_the_cut_and_has_the_same_bytes_again_on_a_gpu() {
    let gpu = gpu();
    let options = "--learning-rate 1e-3 --num-iterations 2 --weight-decay 0.1";
    let start = Model::load(&tiny()).unwrap().parameters().concat();
    let want = train(options, 1000, &on_cpu);
    let cut = train(options, 25, &on_gpu(&gpu, Dtype::F32));
    assert_eq!(cut.lines.len(), 2);
    assert_near(&cut, &want, &start);
    assert!(train(options, 25, &on_gpu(&gpu, Dtype::F32)).files == cut.files);
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn adamw_has_the_bits_of_the_cpus_on_a_gpu() {
    let gpu = gpu();
    for (dtype, state) in DTYPES.into_iter().flat_map(|dtype| [(dtype, Dtype::F32), (dtype, Dtype::Bf16)]) {
        adamw_has_the_bits_of_the_cpus(&gpu, dtype, state);
    }
}

fn adamw_has_the_bits_of_the_cpus(gpu: &Arc<dyn Driver>, dtype: Dtype, state: Dtype) {
    let config = Options::of("--learning-rate 1e-3 --weight-decay 0.1 --max-grad-norm 0.5").optimizer;
    let mut model = model([2, 1, 16], false);
    let weights = DeviceWeights::new(gpu, &model, dtype, 10).unwrap();
    let parameters = model.config().trainable().named();
    let mut moments = Moments::zeros(&parameters, state);
    let decays: Vec<bool> = parameters.iter().map(|(_, shape)| shape.len() == 2).collect();
    let gradients = DeviceGradients::zeros(gpu, model.config()).unwrap();
    let new = |model: &Model, moments: &Moments| {
        let mut optimizer = AdamW::new(gpu, model, &gradients).unwrap();
        optimizer.take_moments(moments).unwrap();
        optimizer
    };
    let mut optimizer = new(&model, &moments);
    for step in 1..=4 {
        if step == 3 {
            optimizer = new(&model, &optimizer.moments().unwrap().unwrap()); // as from a checkpoint
        }
        let lengths = parameters.iter().map(|(_, shape)| shape.iter().product::<usize>());
        let mut on_cpu: Vec<Vec<f32>> =
            lengths.enumerate().map(|(i, len)| numbers(step * 100 + i as u64, len)).collect();
        for (numbers, range) in on_cpu.iter().zip(&gradients.ranges) {
            gradients.numbers.upload(range.start, numbers).unwrap();
        }
        let (norms, want) = (optimizer.norms(&gradients).unwrap(), optim::norms(&on_cpu));
        assert!(norms.iter().zip(&want).all(|(got, want)| (got / want - 1.0).abs() < 1e-12));
        let rule = Rule::new(&config, optim::global_norm(&want), step, 5);
        optimizer.update(&rule, &gradients, (&weights.matrices, Some(&weights.vectors))).unwrap();
        let trained = model.trained_values_mut().into_iter().zip(&decays);
        let trained = trained.map(|(weights, decays)| Trained::new(weights, *decays)).collect();
        optim::update(&rule, trained, &mut on_cpu, &mut moments);
        assert!(gradients.numbers.to_vec().unwrap().iter().all(|gradient| *gradient == 0.0));
    }
    let mut trained = super::model([2, 1, 16], false);
    optimizer.weights_to(&mut trained).unwrap();
    assert_eq!(trained.parameters().concat(), model.parameters().concat());
    assert!(optimizer.moments().unwrap().unwrap() == moments, "{dtype:?} {state:?}");
    let again = DeviceWeights::new(gpu, &model, dtype, 10).unwrap();
    assert_eq!(weights.matrices.to_vec().unwrap(), again.matrices.to_vec().unwrap());
    assert_eq!(weights.vectors.to_vec().unwrap(), again.vectors.to_vec().unwrap());
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn the_norm_of_large_gradients_is_finite_and_of_broken_ones_not_on_a_gpu() {
    let (gpu, model) = (gpu(), model([2, 1, 16], false));
    let gradients = DeviceGradients::zeros(&gpu, model.config()).unwrap();
    let optimizer = AdamW::new(&gpu, &model, &gradients).unwrap();
    let first: &Buffer<f32> = &gradients.numbers;
    first.upload(0, &[f32::MAX; 8]).unwrap();
    first.upload(gradients.ranges[3].start, &[f32::NAN]).unwrap();
    let norms = optimizer.norms(&gradients).unwrap();
    assert!(norms[0].is_finite() && norms[0] > 1e38 && norms[3].is_nan() && norms[1] == 0.0);
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn two_hundred_steps_in_bf16_end_where_those_in_f32_do_on_a_gpu() {
    let gpu = gpu();
    let on_shim = gpu.name() == SHIM; // too slow for more than a look
    let size = if on_shim { [3, 2] } else { [200, 16] };
    let run = |dtype| SEEDS.map(|seed| end_loss(size, seed, Dtype::F32, &on_gpu(&gpu, dtype)));
    let (got, want) = (run(Dtype::Bf16), run(Dtype::F32));
    assert!(got != want && is_within_noise(&got, &want), "{got:?} {want:?}");
    assert!(on_shim || want.iter().all(|loss| *loss < 1.0), "{want:?}: not learned");
}
