//! Low-rank adapters on a GPU against the CPU's.

use std::sync::Arc;

use grpo_pipes::gpu::DeviceWeights;
use grpo_pipes::gpu::adamw::AdamW;
use grpo_pipes::gpu::adapter::DeviceAdapter;
use grpo_pipes::gpu::packed::{DeviceGradients, KeptActivations};
use grpo_pipes::model::{AdapterConfig, Model, Parameter, TARGETS};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::train::grpo_step::GrpoTrainer;
use grpo_pipes::train::trainer::{OpenBackend, Trainer};

use super::super::{DTYPES, gpu, numbers, other_families};
use super::backward::{gradients_on_cpu, gradients_on_gpu};
use super::training::{Options, groups, on_gpu, tiny};
use super::{bundle, cosine, model};
use crate::fixtures::{distance, on_cpu};

/// Of all matrices; and of some that lie between others which one product reads with them, with a rank that is more than a part of a sum and no multiple of any width.
fn configs() -> [AdapterConfig; 2] {
    let all = AdapterConfig { rank: 8, alpha: 12.0, is_rank_stabilized: false, targets: TARGETS.to_vec() };
    let some = vec![Parameter::KProj, Parameter::UpProj];
    [all, AdapterConfig { rank: 131, alpha: 3.0, is_rank_stabilized: true, targets: some }]
}

/// With an adapter that changes the model.
fn adapted(model: Model, config: AdapterConfig) -> Model {
    let mut model = model.with_adapter(config, 5);
    for (i, values) in model.trained_values_mut().into_iter().enumerate() {
        let noise = numbers(i as u64, values.len());
        values.iter_mut().zip(noise).for_each(|(value, noise)| *value += 0.1 * noise);
    }
    model.merge_adapter();
    model
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn gradients_of_an_adapter_equal_the_cpus_on_a_gpu() {
    let gpu = gpu();
    for config in configs() {
        for model in [model([7, 1, 16], false), model([2, 2, 32], true)].into_iter().chain(other_families()) {
            let (model, packed) = (adapted(model, config.clone()), bundle());
            let (want, _) = gradients_on_cpu(&model, &packed);
            for dtype in DTYPES {
                let (got, _) = gradients_on_gpu(&gpu, &model, &packed, (dtype, KeptActivations::Inputs));
                for (((name, _), got), want) in model.trained().iter().zip(&got).zip(&want) {
                    if dtype == Dtype::F32 {
                        assert!(distance(got, want) < 1e-4, "{name}: {}", distance(got, want));
                    } else {
                        assert!(cosine(got, want) > 0.99, "{name} {dtype:?}: {}", cosine(got, want));
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn sums_with_an_adapter_have_the_bits_of_the_cpus_on_a_gpu() {
    let gpu = gpu();
    for (config, dtype) in configs().into_iter().flat_map(|config| DTYPES.map(|dtype| (config.clone(), dtype))) {
        let base = model([2, 1, 16], true);
        let weights = DeviceWeights::new(&gpu, &base, dtype, 10).unwrap();
        let model = adapted(base, config);
        let adapter = Arc::new(DeviceAdapter::new(&gpu, &model, &weights).unwrap().unwrap());
        let gradients = DeviceGradients::of_adapter(&gpu, &adapter, model.config()).unwrap();
        let optimizer = AdamW::new(&gpu, &model, &gradients).unwrap();
        let before = weights.matrices.to_vec().unwrap();
        adapter.merge(&*gpu, optimizer.weights(), &weights).unwrap();
        let (got, want) = (weights.matrices.to_vec().unwrap(), DeviceWeights::new(&gpu, &model, dtype, 10).unwrap());
        assert_ne!(got, before);
        assert_eq!(got, want.matrices.to_vec().unwrap(), "{dtype:?}");
    }
}

/// The adapter after two updates, the weights with it, and their moments.
fn train(dir: &std::path::Path, place: OpenBackend<'_>) -> (Vec<Vec<f32>>, Vec<f32>, Vec<u8>) {
    let options = Options::of("--max-staleness any --learning-rate 1e-3 --num-iterations 2 --weight-decay 0.1");
    let mut trainer = Trainer::open(dir, options.optimizer, None, place).unwrap();
    let mut grpo = GrpoTrainer::new(&mut trainer, options.grpo, 100, false).unwrap();
    grpo.step(&groups(1.0), &mut |_| ()).unwrap();
    let out = tempfile::tempdir().unwrap();
    trainer.publish(&out.path().join("next"), &[], Vec::new()).unwrap();
    let file = std::fs::read(out.path().join("next/optimizer.safetensors")).unwrap();
    assert!(out.path().join("next/adapter_model.safetensors").is_file());
    let model = trainer.weights().unwrap();
    (model.trained_values().iter().map(|values| values.to_vec()).collect(), model.parameters().concat(), file)
}

/// The same bits again, and those of the CPU but for rounding.
#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn an_adapter_after_two_updates_is_the_cpus_on_a_gpu() {
    let gpu = gpu();
    let new = |model: Model| adapted(model, configs()[0].clone());
    let on_gpu = |dtype| {
        let open = on_gpu(&gpu, dtype);
        move |model| open(new(model))
    };
    let want = train(&tiny(), &|model| on_cpu(new(model)));
    let got = train(&tiny(), &on_gpu(Dtype::F32));
    let start = new(Model::load(&tiny()).unwrap());
    for ((got, want), start) in got.0.iter().zip(&want.0).zip(start.trained_values()) {
        let moved = |to: &[f32]| to.iter().zip(start).map(|(to, from)| to - from).collect::<Vec<_>>();
        assert!(distance(&moved(got), &moved(want)) < 3e-2, "{}", distance(&moved(got), &moved(want)));
    }
    assert!(distance(&got.1, &want.1) < 1e-4, "{}", distance(&got.1, &want.1));
    assert!(train(&tiny(), &on_gpu(Dtype::F32)) == got);
    let in_bf16 = train(&tiny(), &on_gpu(Dtype::Bf16));
    assert!(in_bf16.0 != got.0 && distance(&in_bf16.1, &got.1) < 1e-2, "{}", distance(&in_bf16.1, &got.1));
}
