//! Weights from a trainer to a sampler on the same card.

use std::process::Command;
use std::sync::Arc;

use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::gpu::{DeviceWeights, WeightsOffer};
use grpo_pipes::model::{Config, Model};
use grpo_pipes::numbers::dtype::Dtype;

use super::{SHIM, gpu};
use crate::fixtures::directory;

/// What a process offers another one, as JSON.
const OFFER: &str = "GRPO_PIPES_OFFER";

fn weights(gpu: &Arc<dyn Driver>, dtype: Dtype, seed: u64) -> DeviceWeights {
    let config = Config::load(&directory().join("tiny-qwen2")).unwrap();
    DeviceWeights::new(gpu, &Model::random(config, seed), dtype, 32).unwrap()
}

/// Copies what is offered over other weights; it must be the model of seed 1.
fn take(gpu: &Arc<dyn Driver>, offer: &str) {
    let offer: WeightsOffer = serde_json::from_str(offer).unwrap();
    let (own, want) = (weights(gpu, Dtype::F16, 2), weights(gpu, Dtype::F16, 1));
    let read = |of: &DeviceWeights| (of.matrices.to_vec().unwrap(), of.vectors.to_vec().unwrap());
    assert_ne!(read(&own), read(&want));
    own.copy_from(&own.open(&**gpu, &offer).unwrap()).unwrap();
    assert_eq!(read(&own), read(&want));
    let refused = weights(gpu, Dtype::F32, 2).open(&**gpu, &offer).err().unwrap().to_string();
    assert_eq!(refused, "the trainer's weights are f16, the sampler's f32");
}

/// In a process of its own where there is a card: there none may open what is its own.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn weights_are_copied_from_another_process_on_a_gpu() {
    let gpu = gpu();
    let offered = weights(&gpu, Dtype::F16, 1);
    gpu.wait(&gpu.mark().unwrap()).unwrap();
    let offer = serde_json::to_string(&offered.offer().unwrap()).unwrap();
    if gpu.name() == SHIM {
        return take(&gpu, &offer);
    }
    let mut other = Command::new(std::env::current_exe().unwrap());
    other.args(["--exact", "gpu::handover::another_process_takes_an_offer", "--ignored"]).env(OFFER, offer);
    let done = other.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
}

#[test]
#[ignore = "run by the test above, and does nothing without it"]
fn another_process_takes_an_offer() {
    if let Ok(offer) = std::env::var(OFFER) {
        take(&gpu(), &offer);
    }
}

/// The whole loop on a card: weights go within it, and the bytes are those of steps by files, whose weights go through the disk.
#[cfg(feature = "cuda")]
#[test]
fn a_run_on_a_real_gpu_copies_weights_within_it() {
    if let Err(why) = grpo_pipes::gpu::cuda::open(0) {
        return super::skipped(&why.to_string());
    }
    let resident = crate::runs::Root::new(&[("STEPS", "8"), ("SAVE_EVERY", "3")]);
    resident.train_whole();
    let log = std::fs::read_to_string(resident.run("rollout.log")).unwrap();
    assert!(log.contains("the weights of each step are copied within the GPU"), "{log}");
    let by_files = resident.back_to_the_start();
    for _ in 0..8 {
        assert!(by_files.script("step.sh", &[]).status().unwrap().success());
    }
    by_files.train_whole();
    by_files.assert_same_files(&resident);
}
