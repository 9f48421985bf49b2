//! `rollout` from records to records, on a GPU as on the CPU.

use std::path::Path;
use std::sync::Arc;

use grpo_pipes::gpu::device::{ComputeDevice, DtypeChoice};
use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::lines::jsonl::{Input, Output};
use grpo_pipes::model::Sampling;
use grpo_pipes::process::cancel::Stop;
use grpo_pipes::rollout::{
    BackendOptions, LineFormat, LongPrompt, PromptOptions, RequestedSizes, RolloutJob, Source, sample,
};
use grpo_pipes::tokenizer::TemplateArgs;
use grpo_pipes::{Error, Result};
use serde_json::{Value, json};

use super::gpu;
use crate::fixtures::directory;
use crate::process::lines;

fn sampled(
    dir: &Path,
    gpu: Option<Arc<dyn Driver>>,
    dtype: DtypeChoice,
    gpu_memory_fraction: f64,
) -> Result<Vec<Value>> {
    let prompt =
        |i: u32| json!({"prompt_id": format!("p/{i}"), "prompt": [{"role": "user", "content": format!("{i} + {i}")}]});
    let (prompts, rollouts) = (dir.join("prompts.jsonl"), dir.join("rollouts.jsonl"));
    std::fs::write(&prompts, lines(&(0..2).map(prompt).collect::<Vec<_>>())).unwrap();
    let job = RolloutJob {
        backend: BackendOptions {
            device: ComputeDevice { gpu, ordinal: 0, is_named: true, why_not: None },
            dtype,
            batch_invariant: false,
            gpu_memory_fraction,
        },
        prompts: PromptOptions { format: LineFormat::Records, raw: false, on_long: LongPrompt::Refuse },
        template: TemplateArgs::default(),
        shard: None,
        group_size: 2,
        sampling: Sampling::default(),
        seed: 3,
        sizes: RequestedSizes { prompt_tokens: Some(90), completion_tokens: Some(3), sequences: Some(3) },
        jsonl: None,
        stop: Stop::default(),
    };
    let mut out = Output::create(Some(&rollouts))?;
    let source = Source::open(&directory().join("tiny-qwen2"), &job.backend.device)?;
    sample(job, &source, (Input::open(&prompts)?, 0..u64::MAX), &mut out)?;
    out.finish()?;
    let text = std::fs::read_to_string(&rollouts).unwrap();
    Ok(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn records_are_the_cpus_on_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let without_logprobs = |mut records: Vec<Value>| {
        records.iter_mut().for_each(|record| drop(record.as_object_mut().unwrap().remove("logprobs").unwrap()));
        records
    };
    let on_cpu = without_logprobs(sampled(dir.path(), None, DtypeChoice::Auto, 0.9).unwrap());
    assert_eq!(on_cpu.len(), 4);
    assert_eq!(without_logprobs(sampled(dir.path(), Some(gpu()), DtypeChoice::F32, 0.9).unwrap()), on_cpu);
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn what_does_not_fit_is_refused_with_the_numbers_on_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let refused = sampled(dir.path(), Some(gpu()), DtypeChoice::Auto, 1e-9).unwrap_err();
    assert!(matches!(refused, Error::Device(_)), "{refused}");
    assert!(refused.to_string().contains("do not fit into 0.00 GiB: lower --max-sequences"), "{refused}");
}

#[cfg(all(feature = "candle", not(feature = "candle-cuda")))]
#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn a_gpu_that_was_named_is_refused_for_a_teacher_that_needs_a_feature_on_a_gpu() {
    let on = |is_named| ComputeDevice { gpu: Some(gpu()), ordinal: 0, is_named, why_not: None };
    let teacher = directory().join("teachers/phi3");
    let refused = Source::open(&teacher, &on(true)).err().unwrap();
    assert!(matches!(&refused, Error::Usage(what) if what.contains("--features candle-cuda")), "{refused}");
    assert!(Source::open(&teacher, &on(false)).unwrap().teacher.is_some_and(|teacher| !teacher.is_on_gpu()));
}

#[test]
fn the_cpu_refuses_types_and_fractions_that_it_cannot_keep() {
    let dir = tempfile::tempdir().unwrap();
    let halves = sampled(dir.path(), None, DtypeChoice::F16, 0.9).unwrap_err();
    let nothing = sampled(dir.path(), None, DtypeChoice::Auto, 0.0).unwrap_err();
    assert_eq!((halves.exit_code(), nothing.exit_code()), (2, 2), "{halves}, {nothing}");
}
