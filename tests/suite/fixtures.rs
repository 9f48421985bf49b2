//! The numbers of transformers and TRL that `tests/fixtures/make_reference.py` wrote.

use std::path::{Path, PathBuf};

use grpo_pipes::error::Result;
use grpo_pipes::model::Model;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::train::backend::{Backend, Cpu};
use safetensors::SafeTensors;
use serde_json::Value;

/// Trains a model on the CPU in f32.
pub fn on_cpu(model: Model) -> Result<Box<dyn Backend>> {
    Ok(Box::new(Cpu::new(model, Dtype::F32)))
}

pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub struct Reference {
    pub json: Value,
    bytes: Vec<u8>,
}

impl Reference {
    pub fn load() -> Self {
        Self::named("reference")
    }

    /// What `tests/fixtures/make_rope_reference.py` wrote.
    pub fn of_ropes() -> Self {
        Self::named("rope_reference")
    }

    /// What `tests/fixtures/make_family_reference.py` wrote.
    pub fn of_families() -> Self {
        Self::named("family_reference")
    }

    /// What `tests/fixtures/make_adapter_reference.py` wrote.
    pub fn of_adapters() -> Self {
        Self::named("adapter_reference")
    }

    /// What `tests/fixtures/make_loss_reference.py` wrote.
    pub fn of_losses() -> Self {
        Self::named("loss_reference")
    }

    fn named(name: &str) -> Self {
        let text = std::fs::read_to_string(directory().join(format!("{name}.json"))).unwrap();
        let bytes = std::fs::read(directory().join(format!("{name}.safetensors"))).unwrap();
        Self { json: serde_json::from_str(&text).unwrap(), bytes }
    }

    pub fn tensor(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// Prompt and completion of each sequence.
    pub fn sequences(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        let list = self.json["sequences"].as_array().unwrap();
        list.iter().map(|s| (ids(&s["prompt_token_ids"]), ids(&s["completion_token_ids"]))).collect()
    }
}

pub fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The largest difference, in units of the larger of 1 and the wanted number.
pub fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, |a, b| if b <= a { a } else { b })
}

/// ||got - want|| / ||want||.
pub fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (off / want.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}
