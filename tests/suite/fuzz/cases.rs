//! The smallest case of each fault that damaged inputs have shown.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use grpo_pipes::checkpoint;
use grpo_pipes::model::{Config, Model};
use grpo_pipes::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::fixtures::directory;
use crate::process::run;

/// A copy of the tiny model without its weights, with other entries in its config.
fn model(entries: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (from, path) = (directory().join("tiny-qwen2"), dir.path().join("config.json"));
    checkpoint::copy_companions(&from, dir.path(), "float32").unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    entries.iter().for_each(|(name, value)| config[*name] = value.clone());
    fs::write(path, config.to_string()).unwrap();
    dir
}

fn refusal(dir: &Path) -> String {
    Config::load(dir).unwrap_err().to_string().rsplit_once("config.json: ").unwrap().1.to_owned()
}

#[test]
fn sizes_that_no_weights_vouch_for_are_bounded() {
    let cases = [
        ("num_hidden_layers", json!(1025), "num_hidden_layers = 1025 is out of range: 1 to 1024"),
        ("num_hidden_layers", json!(0), "num_hidden_layers = 0 is out of range: 1 to 1024"),
        ("num_attention_heads", json!(0), "num_attention_heads = 0 is out of range: 1 to 16777216"),
        (
            "max_position_embeddings",
            json!(16_777_216),
            "max_position_embeddings = 16777216 is out of range: at most 8388608 with such heads",
        ),
        ("rms_norm_eps", json!(-1e-6), "rms_norm_eps = -0.000001 is out of range: a number from 0 on"),
        ("rope_theta", json!(0), "rope_theta = 0 is out of range: a number from 1 on"),
    ];
    for (name, value, reason) in cases {
        assert_eq!(refusal(model(&[(name, value)]).path()), reason);
    }
    assert!(
        refusal(model(&[("hidden_size", json!(-64))]).path()).starts_with("hidden_size = -64: invalid value: integer")
    );
}

#[test]
fn random_weights_that_no_machine_holds_are_refused_before_their_memory_is_taken() {
    let dir = model(&[
        ("vocab_size", json!(1 << 24)),
        ("hidden_size", json!(1 << 23)),
        ("num_attention_heads", json!(1 << 16)),
    ]);
    let (policy, out) = (dir.path().display().to_string(), dir.path().join("out").display().to_string());
    let began = Instant::now();
    let done = run(
        env!("CARGO_BIN_EXE_grpo-step"),
        &["--init", "--seed", "1", "--policy", &policy, "--out", &out, "--device", "cpu"],
        "",
    );
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert!(
        done.stderr.contains("config.json: a model of these sizes takes ") && done.stderr.contains(" GiB to train"),
        "{}",
        done.stderr
    );
    assert!(began.elapsed() < Duration::from_secs(5) && !Path::new(&out).exists());
}

#[test]
fn a_tokenizer_that_ends_in_the_middle_is_damaged_and_nothing_worse() {
    let dir = model(&[]);
    let path = dir.path().join("tokenizer.json");
    let whole = fs::read(&path).unwrap();
    let decoder = whole.windows(10).position(|bytes| bytes == b"\"decoder\":").unwrap();
    for end in [decoder + 14, decoder + 20, whole.len() - 2] {
        fs::write(&path, &whole[..end]).unwrap();
        let said = Tokenizer::load(dir.path()).err().unwrap().to_string();
        assert!(said.contains("tokenizer.json: EOF while parsing"), "{said}");
    }
}

#[test]
fn an_index_names_files_beside_it() {
    let dir = model(&[]);
    for name in ["..", ".", "/", "/etc/passwd", "../model.safetensors", "a/b", ""] {
        let index = json!({"weight_map": {"model.norm.weight": name}});
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let said = Model::load(dir.path()).err().unwrap().to_string();
        assert!(said.ends_with(&format!("weight file {name:?} is outside the directory")), "{said}");
    }
}
