//! Rotary scaling against transformers' numbers, and what is refused.

use grpo_pipes::model::{Config, Model};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::fixtures::{Reference, directory, worst};

/// The tiny model with other entries about its rope.
fn tiny(entries: &Value) -> TempDir {
    let (dir, from) = (tempfile::tempdir().unwrap(), directory().join("tiny-qwen2"));
    let mut config: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    config.remove("rope_theta");
    config.extend(entries.as_object().unwrap().clone());
    std::fs::write(dir.path().join("config.json"), Value::Object(config).to_string()).unwrap();
    std::os::unix::fs::symlink(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
}

fn numbers(value: &Value) -> Vec<usize> {
    serde_json::from_value(value.clone()).unwrap()
}

fn tokens(length: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * i * 7 + i * 13) % 300) as u32).collect()
}

/// Cosines, then sines of some positions.
fn table(model: &Model, positions: &[usize]) -> Vec<f32> {
    let half = model.config().head_dim() / 2;
    let whole = model.rope_table(model.config().positions());
    let (cos, sin) = whole.split_at(whole.len() / 2);
    [cos, sin].iter().flat_map(|part| positions.iter().flat_map(|at| part[at * half..][..half].to_vec())).collect()
}

#[test]
fn logits_with_a_scaled_rope_equal_transformers() {
    let (reference, tokens) = (Reference::of_ropes(), tokens(500));
    let plain = Model::load(&directory().join("tiny-qwen2")).unwrap();
    for (name, entries) in reference.json["tiny"].as_object().unwrap() {
        let model = Model::load(tiny(entries).path()).unwrap();
        let off =
            worst(&table(&model, &numbers(&reference.json["positions"])), &reference.tensor(&format!("table.{name}")));
        assert!(off < 1e-5, "{name}: {off:e}");
        let rows = numbers(&reference.json["rows"]);
        let prompts: Vec<&[u32]> = rows.iter().map(|row| &tokens[..=*row]).collect();
        let logits =
            |model: &Model| model.prefill(&[], &prompts).into_iter().flat_map(|(_, row)| row).collect::<Vec<_>>();
        let want = reference.tensor(&format!("logits.{name}"));
        let off = worst(&logits(&model), &want);
        assert!(off < 2e-4, "{name}: {off:e}");
        assert_eq!(
            worst(&logits(&plain), &want) < 0.1,
            name == "dynamic",
            "{name} is another model than without scaling"
        );
    }
}

#[test]
fn angles_of_far_positions_equal_transformers() {
    let reference = Reference::of_ropes();
    for (name, entries) in reference.json["wide"].as_object().unwrap() {
        let sizes = json!({"model_type": "qwen2", "vocab_size": 1, "intermediate_size": 1, "num_hidden_layers": 1,
            "num_key_value_heads": 1});
        let mut config = sizes.as_object().unwrap().clone();
        config.extend(entries.as_object().unwrap().clone());
        let config: Config = serde_json::from_value(Value::Object(config)).unwrap();
        let model = Model::random(config, 1);
        let off = worst(&table(&model, &numbers(&reference.json["far"])), &reference.tensor(&format!("table.{name}")));
        assert!(off < 1e-5, "{name}: {off:e}");
    }
}
