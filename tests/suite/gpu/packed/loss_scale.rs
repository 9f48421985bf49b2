//! Training with gradients in f16.

use std::path::Path;
use std::sync::Arc;

use grpo_pipes::Result;
use grpo_pipes::checkpoint::{self, State};
use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::model::Model;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::tensors::TensorFile;
use grpo_pipes::optim::LossScale;
use grpo_pipes::train::grpo_step::GrpoTrainer;
use grpo_pipes::train::trainer::{Trainer, notice};
use serde_json::Value;

use super::super::gpu;
use super::cosine;
use super::training::{Options, groups, on_gpu, tiny};
use crate::fixtures::on_cpu;

/// The gradients of a step, as the first moments of an update that changes nothing, by name.
const PROBE: &str = "--learning-rate 0 --adam-beta1 0 --max-grad-norm 0";

fn open(gpu: &Arc<dyn Driver>, policy: &Path, options: &str, factor: Option<u32>) -> Trainer {
    let mut trainer = Trainer::open(policy, Options::of(options).optimizer, Some(1), &on_gpu(gpu, Dtype::F16)).unwrap();
    if let Some(factor) = factor {
        *trainer.loss_scale().unwrap() = LossScale { factor, ..LossScale::default() };
    }
    trainer
}

/// One step, its metrics and what the user hears.
fn step(trainer: &mut Trainer, options: &str, reward: f32) -> (Vec<Value>, Vec<String>, Result<()>) {
    let config = Options::of(&format!("--max-staleness any {options}")).grpo;
    let (mut lines, mut heard) = (Vec::new(), Vec::new());
    let done = GrpoTrainer::new(trainer, config, 1000, false).unwrap().step(&groups(reward), &mut |line| {
        lines.push(serde_json::from_slice(&line.to_json()).unwrap());
        heard.extend(notice(line));
    });
    (lines, heard, done)
}

fn first_moments(dir: &Path) -> Vec<Vec<f32>> {
    let file = TensorFile::open(&dir.join(checkpoint::OPTIMIZER)).unwrap();
    let names = file.names().into_iter().filter(|name| name.starts_with("exp_avg."));
    names.map(|name| file.read::<f32>(&name).unwrap().to_vec()).collect()
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn gradients_through_f16_are_those_of_f32_on_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let mut on_f16 = open(&gpu(), &tiny(), PROBE, Some(1024));
    let mut on_f32 = Trainer::open(&tiny(), Options::of(PROBE).optimizer, Some(1), &on_cpu).unwrap();
    let gradients = [&mut on_f16, &mut on_f32].map(|trainer| {
        let (lines, heard, done) = step(trainer, "", 1.0);
        done.unwrap();
        assert!(heard.is_empty());
        let out = dir.path().join(trainer.compute_dtype().unwrap_or("cpu"));
        trainer.publish(&out, &[], Vec::new()).unwrap();
        (lines[0]["grad_norm"].as_f64().unwrap(), first_moments(&out))
    });
    let [(norm, got), (want_norm, want)] = gradients;
    assert!((norm / want_norm - 1.0).abs() < 0.01, "{norm} for {want_norm}");
    for ((name, _), (got, want)) in on_f32.model_config().trainable().named().iter().zip(got.iter().zip(&want)) {
        // What all keys share moves no softmax: of a key's bias most is rounding.
        let near = if name.ends_with("k_proj.bias") { 0.99 } else { 0.999 };
        assert!(cosine(got, want) > near, "{name}: {}", cosine(got, want));
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!((norm(got) / norm(want) - 1.0).abs() < 0.02, "{name}: {} for {}", norm(got), norm(want));
    }
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn an_update_that_overflows_f16_changes_nothing_but_the_scale_on_a_gpu() {
    let (gpu, dir) = (gpu(), tempfile::tempdir().unwrap());
    let mut trainer = open(&gpu, &tiny(), "--learning-rate 1e-3", Some(1 << 24));
    let start = trainer.identity();
    let (lines, heard, done) = step(&mut trainer, "", 1.0);
    done.unwrap();
    let [line] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!((line["loss_scale"].as_u64(), line["skipped_updates"].as_u64()), (Some(1 << 24), Some(1)));
    assert!(line.get("grad_norm").is_none() && line["step"] == 1 && line["policy_step"] == 1, "{line}");
    let words =
        "step 1: at loss scale 16777216 the gradients overflow f16, the update is skipped; the next step tries 8388608";
    assert_eq!(heard, [words]);

    let out = dir.path().join("next");
    trainer.publish(&out, &[], Vec::new()).unwrap();
    let weights = |dir: &Path| Model::load(dir).unwrap().parameters().concat();
    assert!(weights(&out) == weights(&tiny()));
    assert!(first_moments(&out).concat().iter().all(|moment| *moment == 0.0));
    let state = State::load(&out).unwrap().unwrap();
    assert_eq!((state.step, state.optimizer_steps, &state.parent_policy_id), (1, 0, &start.policy_id));
    assert_ne!(state.policy_id, start.policy_id);
    assert_eq!(state.loss_scale, Some(LossScale { factor: 1 << 23, good_updates: 0, skipped_updates: 1 }));
}

/// Steps until the scale fits and some more, with `saves` checkpoints on the way; the last checkpoint's bytes and all metrics.
fn run(gpu: &Arc<dyn Driver>, saves: &[usize]) -> (Vec<Vec<u8>>, Vec<Value>) {
    const STEPS: usize = 14;
    let (dir, options) = (tempfile::tempdir().unwrap(), "--learning-rate 1e-3 --num-iterations 1");
    let mut trainer = open(gpu, &tiny(), options, Some(1 << 24));
    let mut lines = Vec::new();
    for done in 1..=STEPS {
        let (more, _, stepped) = step(&mut trainer, options, 1.0);
        stepped.unwrap();
        lines.extend(more);
        let out = dir.path().join(done.to_string());
        if saves.contains(&done) || done == STEPS {
            trainer.publish(&out, &[], Vec::new()).unwrap();
            trainer = open(gpu, &out, options, None);
        }
    }
    let files = ["model.safetensors", "optimizer.safetensors", "state.json"];
    (files.map(|name| std::fs::read(dir.path().join(STEPS.to_string()).join(name)).unwrap()).to_vec(), lines)
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn a_run_in_f16_finds_its_scale_and_has_the_same_bytes_when_it_was_interrupted_on_a_gpu() {
    let gpu = gpu();
    let (files, lines) = run(&gpu, &[]);
    let skipped = lines.iter().take_while(|line| line.get("grad_norm").is_none()).count();
    assert!(0 < skipped && skipped + 2 < lines.len(), "{skipped}");
    for (i, line) in lines.iter().enumerate() {
        let halvings = i.min(skipped);
        assert_eq!(
            (line["step"].as_u64(), line["loss_scale"].as_u64()),
            (Some(i as u64 + 1), Some((1 << 24) >> halvings))
        );
        assert_eq!(line["skipped_updates"].as_u64(), Some((i + 1).min(skipped) as u64));
    }
    // Once before the first update, once after it.
    let (again, with_saves) = run(&gpu, &[skipped - 1, skipped + 1]);
    assert!(again == files);
    assert_eq!(with_saves, lines);
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn gradients_too_large_for_f16_end_the_training_on_a_gpu() {
    let mut trainer = open(&gpu(), &tiny(), "", Some(4));
    let (lines, heard, done) = step(&mut trainer, "--scale-rewards none --num-iterations 9", 1e9);
    let refused = done.unwrap_err();
    assert_eq!((refused.exit_code(), lines.len(), heard.len()), (4, 2, 2), "{refused}");
    let words = refused.to_string();
    assert!(words.starts_with("the gradient of ") && words.contains("even at loss scale 1; "), "{words}");
}
