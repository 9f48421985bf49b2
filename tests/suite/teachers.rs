//! Models that candle runs: the tokens and log-probabilities of transformers, and the same commands around them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as Number};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device};
use grpo_pipes::engine::{CandleDecoder, Settings, Teacher};
use grpo_pipes::gguf::Gguf;
use grpo_pipes::gpu::device::{self, ComputeDevice};
use grpo_pipes::model::Sampling;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures::{directory, ids};
use crate::process::{lines, run};
use crate::sampled::completions;

const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");

fn reference() -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(directory().join("teachers/reference.json")).unwrap();
    serde_json::from_value(serde_json::from_str::<Value>(&text).unwrap()["kinds"].take()).unwrap()
}

fn teacher(kind: &str) -> PathBuf {
    directory().join("teachers").join(kind)
}

fn cpu() -> ComputeDevice {
    device::Device::Cpu.open().unwrap()
}

#[test]
fn each_architecture_answers_as_transformers_does() {
    let reference = reference();
    assert_eq!(reference.keys().collect::<Vec<_>>(), Teacher::names()[0].iter().collect::<Vec<_>>());
    for (kind, cases) in reference {
        check(&kind, &Teacher::of_directory(&teacher(&kind), &cpu()).unwrap(), &cases);
    }
}

/// The tokens and log-probabilities that a teacher answers, against the reference's.
fn check(kind: &str, teacher: &Teacher, cases: &Value) {
    let settings = Settings {
        group_size: 2,
        max_sequences: 4,
        max_completion_tokens: 12,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stop_ids: Vec::new(),
        seed: 1,
        step: 0,
    };
    let cases = cases.as_array().unwrap();
    let prompts = cases.iter().map(|case| ids(&case["prompt_token_ids"]));
    let groups = completions(&mut CandleDecoder::new(teacher, &settings), settings.clone(), prompts).unwrap();
    for (group, case) in groups.iter().zip(cases) {
        for completion in group {
            assert_eq!(completion.tokens, ids(&case["completion_token_ids"]), "{kind}");
            for (got, want) in completion.logprobs.iter().zip(case["logprobs"].as_array().unwrap()) {
                let off = (f64::from(*got) - want.as_f64().unwrap()).abs();
                assert!(off < 1e-4, "{kind}: {off:e}");
            }
        }
    }
}

/// Names of tensors in model directories, and in GGUF files.
const NAMES: [(&str, &str); 10] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// A model directory as llama.cpp's converter would write it, in f32.
fn as_gguf(kind: &str, arch: &str, entries: &[(&str, Number)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(teacher(kind).join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let integer = |name: &str| Number::U32(config[name].as_u64().unwrap() as u32);
    let mut header = vec![("general.architecture".to_owned(), Number::String(arch.into()))];
    let sizes = [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ];
    header.extend(sizes.map(|(to, from)| (format!("{arch}.{to}"), integer(from))));
    let epsilon = config["rms_norm_eps"].as_f64().unwrap() as f32;
    header.push((format!("{arch}.attention.layer_norm_rms_epsilon"), Number::F32(epsilon)));
    header.extend(entries.iter().map(|(name, value)| (format!("{arch}.{name}"), value.clone())));
    let tensors = candle_core::safetensors::load(teacher(kind).join("model.safetensors"), &Device::Cpu).unwrap();
    let stored: Vec<(String, QTensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let tensor = tensor.to_dtype(DType::F32).unwrap();
            let name = NAMES.iter().fold(name, |name, (from, to)| name.replace(from, to));
            (name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        })
        .collect();
    let header: Vec<_> = header.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let stored: Vec<_> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(dir.path().join("x.gguf")).unwrap();
    gguf_file::write(&mut file, &header, &stored).unwrap();
    dir
}

#[test]
fn files_of_other_architectures_answer_as_transformers_does() {
    let reference = reference();
    let phi3 = [("rope.dimension_count", Number::U32(8))];
    let dir = as_gguf("phi3", "phi3", &phi3);
    let file = Gguf::open(&dir.path().join("x.gguf")).unwrap();
    check("phi3", &Teacher::of_gguf(&file, &cpu()).unwrap(), &reference["phi3"]);
    let dir =
        as_gguf("phi3", "phi3", &[("rope.dimension_count", Number::U32(8)), ("rope.freq_base", Number::F32(5e5))]);
    let said = Teacher::of_gguf(&Gguf::open(&dir.path().join("x.gguf")).unwrap(), &cpu()).err().unwrap().to_string();
    assert!(said.contains("a rope that is not Phi-3's plain one"), "{said}");
}

/// A teacher with a tokenizer, and other entries in its config.
fn with_tokenizer(kind: &str, entries: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(teacher(kind).join("config.json")).unwrap();
    let mut config: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    config.extend(entries.as_object().unwrap().clone());
    std::fs::write(dir.path().join("config.json"), Value::Object(config).to_string()).unwrap();
    let link = |from: &Path, name: &str| std::os::unix::fs::symlink(from.join(name), dir.path().join(name)).unwrap();
    link(&teacher(kind), "model.safetensors");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        link(&directory().join("tiny-qwen2"), name);
    }
    dir
}

#[test]
fn a_teacher_writes_the_records_of_any_model_and_the_same_ones_in_any_batch() {
    let dir = with_tokenizer("gemma2", &json!({}));
    let rollout = |more: &[&str]| {
        let model = dir.path().to_str().unwrap();
        let options = ["--text", "--model", model, "-n", "3", "--max-completion-tokens", "5", "--device", "cpu"];
        run(ROLLOUT, &[&options[..], more].concat(), "How many apples?\nAnd pears?\n")
    };
    let whole = rollout(&[]);
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    assert!(
        whole.stderr.contains("computing on the CPU (") && whole.stderr.contains("by candle, in f32"),
        "{}",
        whole.stderr
    );
    let records = whole.records();
    assert_eq!(records.len(), 6);
    assert!(records.iter().all(|record| record["policy_id"].as_str().unwrap().len() == 32));
    assert_ne!(records[0]["completion_token_ids"], records[1]["completion_token_ids"]);
    assert_eq!(rollout(&["--max-sequences", "1"]).stdout, whole.stdout);
    let refused = rollout(&["--dtype", "bf16"]);
    assert_eq!((refused.code, refused.stderr.lines().count()), (Some(2), 1), "{}", refused.stderr);

    // What a teacher said is what a student is shown.
    let right: Vec<Value> = records.into_iter().filter(|record| record["completion"] != "").collect();
    let (student, out) = (directory().join("tiny-qwen2").display().to_string(), dir.path().join("taught"));
    let options = ["--supervised", "--device", "cpu", "--policy", &student, "--out", out.to_str().unwrap()];
    let taught = run(env!("CARGO_BIN_EXE_grpo-step"), &options, &lines(&right));
    assert_eq!((taught.code, taught.stdout.lines().count()), (Some(0), 1), "{}", taught.stderr);
}

#[test]
fn a_sequence_is_no_longer_than_the_window_that_candle_would_give_to_other_layers() {
    for (kind, entries, want) in [
        ("gemma2", json!({"sliding_window": 64}), 64),
        ("gemma3_text", json!({}), 256),
        ("phi3", json!({"sliding_window": 47}), 47),
        ("qwen2_moe", json!({"use_sliding_window": false, "sliding_window": 4}), 256),
    ] {
        assert_eq!(
            Teacher::of_directory(with_tokenizer(kind, &entries).path(), &cpu()).unwrap().positions,
            want,
            "{kind}"
        );
    }
}

#[test]
fn what_candle_would_ignore_is_refused_by_name() {
    for (kind, entries, want) in [
        ("phi3", json!({"rope_scaling": {"type": "longrope"}}), "rope_scaling = {"),
        ("phi3", json!({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}), "rope type \"yarn\""),
        ("stablelm", json!({"qk_layernorm": true}), "qk_layernorm = true"),
        (
            "gemma3_text",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "layer_types that do not follow",
        ),
        ("qwen3_moe", json!({"mlp_only_layers": [1]}), "mlp_only_layers = [1]"),
        ("olmo2", json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config = {"),
    ] {
        let said = Teacher::of_directory(with_tokenizer(kind, &entries).path(), &cpu()).err().unwrap().to_string();
        assert!(said.contains(want) && said.contains("not supported") && !said.contains('\n'), "{said}");
    }
}
