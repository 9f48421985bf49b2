use std::sync::Arc;

use grpo_pipes::gpu::driver::{Driver, Matrix};
use grpo_pipes::gpu::kernels;
use grpo_pipes::gpu::packed::{ForwardPass, KeptActivations};
use grpo_pipes::gpu::{Buffer, DeviceWeights, DynBuffer};
use grpo_pipes::model::{Model, Packed};
use grpo_pipes::numbers::dtype::Dtype;

use super::super::{DTYPES, gpu, other_families};
use super::{bundle, cosine, model, unshared};
use crate::fixtures::worst;

/// Logits after each row, on the device.
fn logits(gpu: &Arc<dyn Driver>, model: &Model, packed: &Packed, (dtype, keep): (Dtype, KeptActivations)) -> Vec<f32> {
    let weights = DeviceWeights::new(gpu, model, dtype, 100).unwrap();
    let mut forward = ForwardPass::new(gpu, &weights, keep).unwrap();
    let batch = forward.batch(packed).unwrap();
    let mut heard = Vec::new();
    let mut hook = |layer: usize, qkv: &DynBuffer| {
        heard.push((layer, qkv.dtype()));
        Ok(())
    };
    forward.run(&weights, &batch, &mut hook).unwrap();
    assert_eq!(heard, [(0, dtype), (1, dtype)]);
    let (rows, d, v) = (packed.tokens.len(), model.config().hidden_size, model.config().vocab_size);
    let all: Vec<u32> = (0..rows as u32).collect();
    let hidden = DynBuffer::new(gpu, dtype, rows * d).unwrap();
    forward.hidden(&weights, &Buffer::from_slice(gpu, &all).unwrap(), &hidden).unwrap();
    let out = Buffer::<f32>::new(gpu, rows * v).unwrap();
    let head = Matrix { at: weights.head(), stride: d, dtype };
    let to = Matrix { at: out.at(0), stride: v, dtype: Dtype::F32 };
    kernels::linear(&**gpu, hidden.matrix(0, d), head, to, [rows, v, d]).unwrap();
    out.to_vec().unwrap()
}

/// Logits after each row, of the CPU's model.
fn wanted(model: &Model, packed: &Packed) -> Vec<f32> {
    let (plain, rows) = unshared(packed);
    let after = |row: usize| {
        let start = plain.starts.iter().rev().find(|start| **start <= row).unwrap();
        model.prefill(&[], &[&plain.tokens[*start..=row]]).remove(0).1
    };
    rows.into_iter().flat_map(after).collect()
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn logits_of_packed_sequences_equal_the_cpus_on_a_gpu() {
    let gpu = gpu();
    for model in [model([7, 1, 16], false), model([2, 2, 32], true)].into_iter().chain(other_families()) {
        let packed = bundle();
        let want = wanted(&model, &packed);
        for dtype in DTYPES {
            let got = logits(&gpu, &model, &packed, (dtype, KeptActivations::Nothing));
            match dtype {
                Dtype::F32 => assert!(worst(&got, &want) < 1e-5, "{}", worst(&got, &want)),
                _ => assert!(cosine(&got, &want) > 0.9995, "{dtype:?}: {}", cosine(&got, &want)),
            }
        }
    }
}

#[test]
#[ignore = "run by kernels_run_under_sanitizers"]
fn a_prompt_run_once_gives_the_bits_of_one_run_for_each_completion_on_a_gpu() {
    let (gpu, model, packed) = (gpu(), model([2, 2, 32], true), bundle());
    let (plain, rows) = unshared(&packed);
    for dtype in DTYPES {
        let once = logits(&gpu, &model, &packed, (dtype, KeptActivations::Nothing));
        let each = logits(&gpu, &model, &plain, (dtype, KeptActivations::Nothing));
        let each: Vec<f32> = rows.iter().flat_map(|row| each[43 * row..43 * (row + 1)].to_vec()).collect();
        assert_eq!(once, each);
    }
}
