//! The whole engine on the shim, against the engine on the CPU.

use grpo_pipes::engine::{Completion, CpuDecoder, Decoder, GpuDecoder, GpuOptions, Settings};
use grpo_pipes::gpu::DeviceWeights;
use grpo_pipes::model::{Model, Parameter, Sampling};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::{Error, Result};

use super::{SHIM, gpu, other_families};
use crate::fixtures::directory;
use crate::sampled::{completions, own_completions, own_requests};

const MAX_PROMPT: usize = 16;

fn tiny() -> Model {
    Model::load(&directory().join("tiny-qwen2")).unwrap()
}

fn settings(sampling: Sampling) -> Settings {
    Settings {
        group_size: 3,
        max_sequences: 5,
        max_completion_tokens: 7,
        sampling,
        stop_ids: (300..320).collect(),
        seed: 1,
        step: 0,
    }
}

/// Groups of prompts of several lengths, one of them a single token.
fn sampled(decoder: &mut dyn Decoder, settings: Settings, prompts: usize) -> Result<Vec<Vec<Completion>>> {
    let prompt = |i: u32| (0..1 + 4 * i % 15).map(|j| (j * 37 + i * 11) % 317).collect();
    completions(decoder, settings, (0..prompts as u32).map(prompt))
}

fn on_gpu(model: &Model, dtype: Dtype, settings: &Settings, prompts: usize) -> Result<Vec<Vec<Completion>>> {
    let on = GpuOptions { dtype, max_prompt_tokens: MAX_PROMPT, batch_invariant: true };
    let mut decoder = GpuDecoder::new(&gpu(), model, settings, on)?;
    sampled(&mut decoder, settings.clone(), prompts)
}

fn largest_difference(got: &[Vec<Completion>], want: &[Vec<Completion>]) -> f32 {
    let pairs = got.iter().flatten().zip(want.iter().flatten());
    let off = |(got, want): (&Completion, &Completion)| -> f32 {
        got.logprobs.iter().zip(&want.logprobs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    pairs.map(off).fold(0.0, f32::max)
}

/// Slots refilled as sequences end, prompts shared by groups, tokens taken a step late: the same completions as on the CPU.
#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn completions_in_f32_are_the_cpus_on_a_gpu() {
    let penalised = Sampling { temperature: 0.0, repetition_penalty: 1.5, ..Sampling::default() };
    let others = other_families().into_iter().map(|model| (model, Sampling::default()));
    for (model, sampling) in [(tiny(), Sampling::default()), (tiny(), penalised)].into_iter().chain(others) {
        let settings = settings(sampling);
        let want = sampled(&mut CpuDecoder::new(&model, &settings), settings.clone(), 6).unwrap();
        let got = on_gpu(&model, Dtype::F32, &settings, 6).unwrap();
        let tokens = |groups: &[Vec<Completion>]| -> Vec<(Vec<u32>, bool)> {
            groups.iter().flatten().map(|one| (one.tokens.clone(), one.stopped)).collect()
        };
        assert_eq!(tokens(&got), tokens(&want));
        assert!(largest_difference(&got, &want) < 1e-4);
    }
}

/// A step is recorded with the numbers of one distribution, and runs ahead of what is taken from it: requests with other numbers, and
/// samples that end where they could go on, must not be seen by others.
#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn requests_with_settings_of_their_own_are_the_cpus_on_a_gpu() {
    let (model, own) = (tiny(), own_requests());
    let settings = settings(Sampling::default());
    let prompts = || (0..9u32).map(|i| (0..1 + 4 * i % 15).map(|j| (j * 37 + i * 11) % 317).collect());
    let want = own_completions(&mut CpuDecoder::new(&model, &settings), settings.clone(), &own, prompts()).unwrap();
    let on = GpuOptions { dtype: Dtype::F32, max_prompt_tokens: MAX_PROMPT, batch_invariant: true };
    let mut decoder = GpuDecoder::new(&gpu(), &model, &settings, on).unwrap();
    let got = own_completions(&mut decoder, settings, &own, prompts()).unwrap();
    let tokens = |groups: &[Vec<Completion>]| -> Vec<Vec<u32>> {
        groups.iter().flatten().map(|one| one.tokens.clone()).collect()
    };
    assert_eq!(tokens(&got), tokens(&want));
    assert!(largest_difference(&got, &want) < 1e-4);
}

/// What else is in the batch changes nothing, in the arithmetic of the tensor cores too.
#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn completions_do_not_depend_on_the_batch_on_a_gpu() {
    let model = tiny();
    let settings = settings(Sampling::default());
    let whole = on_gpu(&model, Dtype::Bf16, &settings, 3).unwrap();
    let narrow = Settings { max_sequences: 2, ..settings };
    assert_eq!(on_gpu(&model, Dtype::Bf16, &narrow, 3).unwrap(), whole);
}

/// Beyond 128 rows the products are the library's.
#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn many_rows_give_the_cpus_completions_on_a_gpu() {
    let model = tiny();
    let settings =
        Settings { group_size: 129, max_sequences: 129, max_completion_tokens: 2, ..settings(Sampling::default()) };
    let want = sampled(&mut CpuDecoder::new(&model, &settings), settings.clone(), 1).unwrap();
    let on = GpuOptions { dtype: Dtype::F32, max_prompt_tokens: MAX_PROMPT, batch_invariant: false };
    let mut decoder = GpuDecoder::new(&gpu(), &model, &settings, on).unwrap();
    let got = sampled(&mut decoder, settings, 1).unwrap();
    assert!(got[0].iter().zip(&want[0]).all(|(got, want)| got.tokens == want.tokens));
    assert!(largest_difference(&got, &want) < 1e-4);
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn logits_that_are_not_finite_end_the_run_on_a_gpu() {
    let mut model = tiny();
    let norm = model.config().stored().of_layer(1, Parameter::InputNorm).unwrap();
    model.parameters_mut()[norm][0] = f32::NAN;
    let settings = settings(Sampling::default());
    let err = on_gpu(&model, Dtype::F32, &settings, 1).unwrap_err();
    assert_eq!(err.to_string(), "step 0, prompt p/0, sample 0, position 0: logits are not finite, first in layer 1");
    assert!(matches!(err, Error::Numerics(_)));
}

/// A sampler that goes on with weights of the same card is one that has them from the start.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn offered_weights_are_sampled_from_as_they_are_when_they_are_taken_on_a_gpu() {
    let (gpu, mut trained, settings) = (gpu(), tiny(), settings(Sampling::default()));
    if gpu.name() != SHIM {
        return; // no process may open its own memory there; see handover.rs
    }
    let on = GpuOptions { dtype: Dtype::F32, max_prompt_tokens: MAX_PROMPT, batch_invariant: true };
    let mut decoder = GpuDecoder::new(&gpu, &trained, &settings, on).unwrap();
    assert!(decoder.take_offered_weights().is_err(), "nothing was offered");
    let weights = DeviceWeights::new(&gpu, &trained, Dtype::F32, 32).unwrap();
    decoder.accept(&weights.offer().unwrap()).unwrap();
    for parameter in trained.parameters_mut() {
        parameter.iter_mut().for_each(|x| *x *= 1.5);
    }
    weights.upload(&trained).unwrap();
    decoder.take_offered_weights().unwrap();
    let want = sampled(&mut GpuDecoder::new(&gpu, &trained, &settings, on).unwrap(), settings.clone(), 2).unwrap();
    assert_eq!(sampled(&mut decoder, settings.clone(), 2).unwrap(), want);
    assert_ne!(on_gpu(&tiny(), Dtype::F32, &settings, 2).unwrap(), want);
}
