//! Directories that are said to be models: every way weights are stored that is read gives the same model, and each command says of what
//! is not read what it is and what to do.

use std::fs;
use std::path::{Path, PathBuf};

use grpo_pipes::checkpoint;
use grpo_pipes::model::Model;
use grpo_pipes::numbers::dtype::Dtype as Compute;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures::directory;
use crate::process::run;

const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");
const GRPO_STEP: &str = env!("CARGO_BIN_EXE_grpo-step");
const EXPORT_HF: &str = env!("CARGO_BIN_EXE_export-hf");

/// A tensor on its way into a file: name, type, shape, bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn tiny() -> PathBuf {
    directory().join("tiny-qwen2")
}

/// The tiny model without weights, but with entries in its config.
fn config_and_tokenizer(entries: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    checkpoint::copy_companions(&tiny(), dir.path(), "float32").unwrap();
    let path = dir.path().join("config.json");
    let text = fs::read(tiny().join("config.json")).unwrap();
    let mut config: serde_json::Map<String, Value> = serde_json::from_slice(&text).unwrap();
    config.extend(entries.as_object().unwrap().clone());
    fs::write(path, Value::Object(config).to_string()).unwrap();
    dir
}

fn stored(name: &str, shape: &[usize], values: &[f32], dtype: Dtype) -> Stored {
    let bytes = |x: &f32| match dtype {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
        Dtype::F64 => f64::from(*x).to_le_bytes().to_vec(),
        _ => vec![0],
    };
    (name.into(), dtype, shape.to_vec(), values.iter().flat_map(bytes).collect())
}

/// The tiny model's tensors.
fn tensors(dtype: Dtype) -> Vec<Stored> {
    let model = Model::load(&tiny()).unwrap();
    let named = model.config().stored().named().into_iter().zip(model.parameters());
    named.map(|((name, shape), values)| stored(&name, &shape, values, dtype)).collect()
}

fn write(path: &Path, tensors: &[Stored]) {
    let mut views = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        views.push((name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    }
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// A directory with these weights in one file.
fn with(tensors: &[Stored], entries: &Value) -> TempDir {
    let dir = config_and_tokenizer(entries);
    write(&dir.path().join("model.safetensors"), tensors);
    dir
}

fn numbers(dir: &Path) -> Vec<f32> {
    logits(dir, Compute::F32)
}

fn logits(dir: &Path, dtype: Compute) -> Vec<f32> {
    let (_, logits) = Model::load_as(dir, dtype).unwrap().prefill(&[], &[&[1, 5, 9]]).remove(0);
    logits
}

fn refusal(dir: &TempDir) -> String {
    Model::load(dir.path()).err().unwrap().to_string()
}

#[test]
fn one_file_or_several_named_with_or_without_the_head_are_the_same_model() {
    let want = numbers(&tiny());
    let all = tensors(Dtype::F32);
    for metadata in [json!({}), json!({"metadata": {"total_size": 1}})] {
        let dir = config_and_tokenizer(&json!({}));
        let mut index = json!({"weight_map": {}});
        index.as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
        for (i, part) in all.chunks(all.len() / 2).enumerate() {
            let name = format!("model-0000{i}-of-00003.safetensors");
            write(&dir.path().join(&name), part);
            part.iter().for_each(|(tensor, ..)| index["weight_map"][tensor] = name.clone().into());
        }
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        assert_eq!(numbers(dir.path()), want);
        let identity = checkpoint::identity(dir.path()).unwrap();
        assert_eq!((identity.policy_id.len(), identity.step), (32, 0));
        let path = dir.path().to_str().unwrap();
        let done =
            run(ROLLOUT, &["--text", "--model", path, "--max-completion-tokens", "3", "--device", "cpu"], "1 + 1?\n");
        assert_eq!((done.code, done.stdout.lines().count()), (Some(0), 1), "{}", done.stderr);
        let before = identity.policy_id;
        write(&dir.path().join("model-00001-of-00003.safetensors"), &all[all.len() / 2..][..all.len() / 2 - 1]);
        assert_ne!(checkpoint::identity(dir.path()).unwrap().policy_id, before, "each shard counts");
    }
    let base: Vec<Stored> = all.iter().cloned().map(|(name, d, s, b)| (name.replace("model.", ""), d, s, b)).collect();
    assert_eq!(numbers(with(&base, &json!({})).path()), want);
}

#[test]
fn a_tied_head_and_computed_frequencies_may_be_stored_too() {
    let want = numbers(&tiny());
    let mut all = tensors(Dtype::F32);
    all.push(stored("model.layers.1.self_attn.rotary_emb.inv_freq", &[8], &[1.0; 8], Dtype::F32));
    let embedding = all[0].clone();
    let head = |from: &Stored| ("lm_head.weight".to_owned(), from.1, from.2.clone(), from.3.clone());
    let both = [&all[..], &[head(&embedding)]].concat();
    assert_eq!(numbers(with(&both, &json!({})).path()), want);
    let instead = [&all[1..], &[head(&embedding)]].concat();
    assert_eq!(numbers(with(&instead, &json!({})).path()), want);

    let halves = tensors(Dtype::BF16)[0].clone();
    let rounded = [&[halves], &all[1..], &[head(&embedding)]].concat();
    let said = refusal(&with(&rounded, &json!({})));
    assert!(
        said.contains("tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight"),
        "{said}"
    );
    let untied = with(&rounded, &json!({"tie_word_embeddings": false}));
    assert!(numbers(untied.path()) != want);
    let lacking = with(&all, &json!({"tie_word_embeddings": false}));
    assert!(refusal(&lacking).ends_with("the weights have no tensor lm_head.weight"));
}

#[test]
fn numbers_of_each_type_are_read_as_they_are_rounded() {
    for (dtype, round) in [
        (Dtype::F32, (|x| x) as fn(f32) -> f32),
        (Dtype::BF16, |x| bf16::from_f32(x).to_f32()),
        (Dtype::F16, |x| f16::from_f32(x).to_f32()),
    ] {
        let dir = with(&tensors(dtype), &json!({"torch_dtype": "float64"}));
        let (got, want) = (Model::load(dir.path()).unwrap(), Model::load(&tiny()).unwrap());
        for (got, want) in got.parameters().into_iter().zip(want.parameters()) {
            assert!(got.iter().zip(want).all(|(got, want)| *got == round(*want)), "{dtype:?}");
        }
        assert!(logits(dir.path(), Compute::Bf16).iter().all(|x| x.is_finite()));
    }
    for (dtype, name) in [(Dtype::F64, "F64"), (Dtype::I8, "I8"), (Dtype::F8_E4M3, "F8_E4M3"), (Dtype::U8, "U8")] {
        let said = refusal(&with(&tensors(dtype), &json!({})));
        assert!(said.contains(&format!(" is {name}; this program reads f32, bf16 and f16")), "{said}");
    }
}

#[test]
fn tensors_of_another_model_are_refused_by_name() {
    for name in [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "layers.0.mlp.up_proj.qweight",
        "model.layers.2.self_attn.o_proj.bias",
        "v_head.summary.weight",
    ] {
        let all = [&tensors(Dtype::F32)[..], &[stored(name, &[2], &[0.0; 2], Dtype::F32)]].concat();
        let said = refusal(&with(&all, &json!({})));
        let want = format!(
            "tensor {name} is not part of a Qwen2 model of 3 layers; loading and saving the model with transformers drops it"
        );
        assert!(said.ends_with(&want), "{said}");
    }
}

/// What each command that takes a model says of `model`, without its own name.
fn what_all_say(model: &Path) -> String {
    let (path, tiny) = (model.to_str().unwrap(), tiny().display().to_string());
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("out").display().to_string();
    let commands: [(&str, &[&str]); 5] = [
        (ROLLOUT, &["--text", "--device", "cpu", "--model", path]),
        (GRPO_STEP, &["--device", "cpu", "--out", &to, "--policy", path]),
        (GRPO_STEP, &["--device", "cpu", "--out", &to, "--init", "--seed", "1", "--policy", path]),
        (GRPO_STEP, &["--device", "cpu", "--out", &to, "--beta", "0.1", "--reference", path, "--policy", &tiny]),
        (EXPORT_HF, &[path, &to]),
    ];
    let mut all: Vec<String> = Vec::new();
    for (program, args) in commands {
        let done = run(program, args, "");
        assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""), "{args:?}: {}", done.stderr);
        let line = done.stderr.lines().next_back().unwrap();
        all.push(line.split_once(": ").unwrap().1.to_owned());
        assert!(!Path::new(&to).exists());
    }
    assert!(all.iter().all(|line| *line == all[0]), "{all:#?}");
    all.remove(0)
}

#[test]
fn each_command_says_alike_what_a_directory_has_instead_of_weights() {
    let adapter = br#"{"peft_type": "LORA", "base_model_name_or_path": "gone"}"#;
    let cases: [(&[&str], &str); 8] = [
        (
            &["adapter_config.json", "model.safetensors"],
            "a LoRA adapter of gone without adapter_model.safetensors: merge it",
        ),
        (&["pytorch_model.bin"], "the weights are a pickle, pytorch_model.bin, which is not read: in Python, "),
        (&["pytorch_model.bin.index.json"], "the weights are a pickle, pytorch_model.bin.index.json"),
        (&["model-q4_k_m.gguf"], "model-q4_k_m.gguf is GGUF: `rollout` samples from it with --file, and training"),
        (&["tf_model.h5"], "the weights are tf_model.h5, which is not read"),
        (&["model.onnx"], "the weights are model.onnx, which is not read"),
        (
            &["model-00001-of-00002.safetensors"],
            "but no model.safetensors.index.json: is the download or the copy whole?",
        ),
        (&["model.fp16.safetensors"], "it has model.fp16.safetensors, but no model.safetensors"),
    ];
    for (files, want) in cases {
        for config in [true, false] {
            let dir = if config { config_and_tokenizer(&json!({})) } else { tempfile::tempdir().unwrap() };
            files.iter().for_each(|name| fs::write(dir.path().join(name), adapter).unwrap());
            if files.contains(&"model.safetensors") {
                let said =
                    run(ROLLOUT, &["--text", "--device", "cpu", "--model", dir.path().to_str().unwrap()], "").stderr;
                assert!(said.contains(want), "{said}");
                continue;
            }
            let said = what_all_say(dir.path());
            assert!(said.starts_with(&format!("{}: ", dir.path().display())) && said.contains(want), "{said}");
        }
    }
}

#[test]
fn each_command_says_alike_what_a_config_asks_for_that_is_not_supported() {
    for (entries, want) in [
        (
            json!({"model_type": "bloom", "hidden_act": 7}),
            "config.json: model_type \"bloom\" is not supported; this program runs language models",
        ),
        (
            json!({"quantization_config": {"quant_method": "awq"}}),
            "config.json: quantization_config (awq) is not supported; use the",
        ),
        (
            json!({"rope_scaling": {"rope_type": "longrope"}}),
            "config.json: rope type \"longrope\" is not supported; this program has",
        ),
    ] {
        // `--init` is for a directory without weights: said first there, so it gets none.
        let said = what_all_say(config_and_tokenizer(&entries).path());
        assert!(said.contains(want), "{said}");
    }
}

#[test]
fn a_file_and_a_directory_around_the_model_are_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    fs::write(&file, "GGUF").unwrap();
    let (path, to) = (file.to_str().unwrap(), dir.path().join("out").display().to_string());
    let sampled = run(ROLLOUT, &["--text", "--device", "cpu", "--model", path], "");
    assert!(sampled.code == Some(1) && sampled.stderr.contains("model.gguf: not a GGUF file: "), "{}", sampled.stderr);
    for (program, args) in
        [(GRPO_STEP, &["--device", "cpu", "--out", &to, "--policy", path][..]), (EXPORT_HF, &[path, &to])]
    {
        let done = run(program, args, "");
        let want = "model.gguf: a GGUF file, which only `rollout` reads: give the directory of";
        assert!(done.code == Some(1) && done.stderr.contains(want), "{}", done.stderr);
    }
    let file = tiny().join("model.safetensors");
    assert!(
        what_all_say(&file)
            .ends_with("a file; a model is a directory with config.json, model.safetensors and tokenizer.json")
    );

    let around = tempfile::tempdir().unwrap();
    assert!(what_all_say(around.path()).ends_with(": no config.json, so it is no model directory"));
    let inner = around.path().join("snapshots/0123");
    fs::create_dir_all(&inner).unwrap();
    fs::copy(tiny().join("config.json"), inner.join("config.json")).unwrap();
    let said = what_all_say(around.path());
    assert!(
        said.ends_with(&format!("no config.json, so it is no model directory; {} has one", inner.display())),
        "{said}"
    );
}
