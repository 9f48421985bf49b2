//! GGUF files: what `export-hf --gguf` writes, `rollout` and candle's own models read, with the answers of the checkpoint.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, quantized_llama, quantized_qwen2, quantized_qwen3, qwen2};
use grpo_pipes::gguf::Gguf;
use grpo_pipes::lines::record::Message;
use grpo_pipes::model::Model;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::process::message::note;
use grpo_pipes::tokenizer::{Tokenizer, stop_ids};
use serde_json::Value;
use tempfile::TempDir;

use crate::fixtures::{Reference, directory, ids, worst};
use crate::model::decoded_logits;
use crate::process::{lines, run};

const EXPORT_HF: &str = env!("CARGO_BIN_EXE_export-hf");
const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");

const FAMILIES: [&str; 5] = ["qwen2", "qwen3", "llama", "smollm2", "mistral"];

/// A tiny model of a family with a tokenizer.
fn model_dir(family: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = if family == "smollm2" { "qwen2" } else { family };
    for entry in fs::read_dir(directory().join(format!("tiny-{tokenizer}"))).unwrap().flatten() {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    for name in ["config.json", "model.safetensors"] {
        fs::copy(directory().join(format!("tiny-{family}")).join(name), dir.path().join(name)).unwrap();
    }
    dir
}

/// The file that `export-hf --gguf` makes of a model.
fn exported(model: &Path, out: &Path, quantization: &str) -> PathBuf {
    let done = run(EXPORT_HF, &[model.to_str().unwrap(), out.to_str().unwrap(), "--gguf", quantization], "");
    assert_eq!((done.code, done.stdout.as_str()), (Some(0), ""), "{}", done.stderr);
    let name = model.file_name().unwrap().to_str().unwrap();
    out.join(format!("{name}-{quantization}.gguf"))
}

/// Prompts of the tiny problems.
fn prompts() -> String {
    let prompt = |i: usize| {
        let question = format!("Tom has {i} apples and buys {} more. How many?", i * 3 % 7);
        serde_json::json!({"prompt_id": format!("p/{i}"), "prompt": [{"role": "user", "content": question}]})
    };
    lines(&(0..32).map(prompt).collect::<Vec<_>>())
}

/// Greedy records without the id of the weights.
fn answers(model: &Path) -> Vec<Value> {
    let options = ["--temperature", "0", "--max-completion-tokens", "16", "--device", "cpu", "--dtype", "f32"];
    let done = run(ROLLOUT, &[&["--model", model.to_str().unwrap()], &options[..]].concat(), &prompts());
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let mut records = done.records();
    records.iter_mut().for_each(|record| drop(record.as_object_mut().unwrap().remove("policy_id")));
    records
}

#[test]
fn a_file_in_f32_or_f16_is_the_model_in_each_family() {
    for family in FAMILIES {
        let dir = model_dir(family);
        let want = answers(dir.path());
        for quantization in ["f32", "f16"] {
            let file = exported(dir.path(), &dir.path().join(format!("out-{quantization}")), quantization);
            let got = answers(&file);
            if quantization == "f32" {
                assert_eq!(got, want, "{family}: the same bits");
            }
            let tokens = |records: &[Value]| -> Vec<Value> {
                records
                    .iter()
                    .flat_map(|r| [r["prompt_token_ids"].clone(), r["completion_token_ids"].clone()])
                    .collect()
            };
            assert_eq!(tokens(&got), tokens(&want), "{family} {quantization}");
            let (ours, theirs) = (Gguf::open(&file).unwrap().stop_ids().unwrap(), stop_ids(dir.path()).unwrap());
            assert!(theirs.iter().all(|id| ours.contains(id)), "{family}: {ours:?}");
            let modelfile = fs::read_to_string(file.with_file_name("Modelfile")).unwrap();
            assert!(modelfile.starts_with(&format!("FROM ./{}\n", file.file_name().unwrap().to_str().unwrap())));
        }
    }
}

/// Logits after the last token, by candle.
type Run = Box<dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor>>;

fn by_candle(file: &Path, family: &str) -> Run {
    let mut reader = BufReader::new(File::open(file).unwrap());
    let header = Content::read(&mut reader).unwrap();
    let cpu = Device::Cpu;
    match family {
        "qwen2" => {
            let mut model = quantized_qwen2::ModelWeights::from_gguf(header, &mut reader, &cpu).unwrap();
            Box::new(move |tokens, at| model.forward(tokens, at))
        }
        "qwen3" => {
            let mut model = quantized_qwen3::ModelWeights::from_gguf(header, &mut reader, &cpu).unwrap();
            Box::new(move |tokens, at| model.forward(tokens, at))
        }
        _ => {
            let mut model = quantized_llama::ModelWeights::from_gguf(header, &mut reader, &cpu).unwrap();
            Box::new(move |tokens, at| model.forward(tokens, at))
        }
    }
}

#[test]
fn candles_own_models_answer_the_same_from_the_file() {
    // candle's llama has neither Llama 3's frequencies nor heads of another width.
    for family in ["qwen2", "qwen3", "smollm2"] {
        let dir = model_dir(family);
        let file = exported(dir.path(), &dir.path().join("out"), "f16");
        for record in answers(&file).iter().take(8) {
            let mut tokens = ids(&record["prompt_token_ids"]);
            let (mut model, mut at) = (by_candle(&file, family), 0);
            for want in ids(&record["completion_token_ids"]) {
                let next = Tensor::new(&tokens[at..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
                let logits = model(&next, at).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
                assert_eq!(best, want, "{family}");
                at = tokens.len();
                tokens.push(want);
            }
        }
    }
}

/// Whether Python has this module of llama.cpp; `PYTHON` names another one than `python3`.
fn python_with(module: &str) -> Option<String> {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let import = format!("import {module}");
    let found = Command::new(&python).args(["-c", &import]).output().is_ok_and(|out| out.status.success());
    if !found {
        note("test of GGUF against llama.cpp skipped", &format!("{python} has no {module}"));
    }
    found.then_some(python)
}

/// The server of llama.cpp's Python package returns no token ids.
#[test]
fn a_server_of_llama_cpp_gives_records_and_the_same_again() {
    let Some(python) = python_with("llama_cpp.server.app") else { return };
    let dir = model_dir(FAMILIES[0]);
    let file = exported(dir.path(), &dir.path().join("out"), "f32");
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = Command::new(python);
    command.args(["-m", "llama_cpp.server", "--logits_all", "true", "--port", &free.port().to_string(), "--model"]);
    let mut server = command.arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while std::net::TcpStream::connect(free).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60) && server.try_wait().unwrap().is_none(), "it does not serve");
        std::thread::sleep(Duration::from_millis(50));
    }
    let prompts: Vec<Value> = (0..3).map(|i| serde_json::json!({ "prompt": format!("{i} + 2?") })).collect();
    let url = format!("http://{free}");
    let sample = || run(ROLLOUT, &["--server", &url, "-n", "2", "--max-completion-tokens", "8"], &lines(&prompts));
    let (first, again) = (sample(), sample());
    server.kill().unwrap();
    server.wait().unwrap();
    let texts: Vec<Value> = first.records().iter().map(|record| record["completion"].clone()).collect();
    assert!(texts.len() == 6 && texts[0] != texts[1], "{} {texts:?}", first.stderr);
    assert!(first.stderr.contains("this server returns no token ids"), "{}", first.stderr);
    assert_eq!(first.stdout, again.stdout);
}

#[test]
fn llama_cpp_has_the_same_tokens_and_the_same_answers() {
    let Some(python) = python_with("llama_cpp") else { return };
    let script = directory().join("llama_answers.py").display().to_string();
    for family in FAMILIES {
        let dir = model_dir(family);
        let file = exported(dir.path(), &dir.path().join("out"), "f32");
        let (records, tokenizer) = (answers(dir.path()), Tokenizer::load(dir.path()).unwrap());
        let case = |record: &Value| {
            let messages: Vec<Message> = serde_json::from_value(record["prompt"].clone()).unwrap();
            serde_json::json!({"text": tokenizer.chat(&messages).unwrap(), "ids": record["prompt_token_ids"]})
        };
        let cases = lines(&records.iter().map(case).collect::<Vec<_>>());
        let done = run(&python, &[&script, file.to_str().unwrap()], &cases);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        for (record, theirs) in records.iter().zip(done.records()) {
            assert_eq!(theirs["tokens"], record["prompt_token_ids"], "{family}");
            let ours = ids(&record["completion_token_ids"]);
            assert_eq!(ids(&theirs["answer"])[..ours.len()], ours, "{family}");
        }
    }
}

#[test]
fn quantised_files_are_read_back_and_near_the_model() {
    let dir = model_dir("qwen2");
    let model = Model::load(dir.path()).unwrap();
    let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    for (quantization, most) in [("bf16", 3e-3), ("q8_0", 1e-2), ("q6_k", 3e-2), ("q4_k", 1e-1)] {
        let file = exported(dir.path(), &dir.path().join(quantization), quantization);
        let read = Gguf::open(&file).unwrap().load(Dtype::F32).unwrap();
        for (got, want) in read.parameters().iter().zip(model.parameters()) {
            let off: Vec<f32> = got.iter().zip(want).map(|(a, b)| a - b).collect();
            assert!(norm(&off) <= most * norm(want), "{quantization}: {}", norm(&off) / norm(want));
        }
        let done = run(
            ROLLOUT,
            &["--text", "--model", file.to_str().unwrap(), "--max-completion-tokens", "4", "--device", "cpu"],
            "How many?\n",
        );
        let dtype = if quantization == "bf16" { ", f32)" } else { ", bf16 by " };
        assert!(done.code == Some(0) && done.stderr.contains(dtype), "{}", done.stderr);
    }
}

#[test]
fn what_gguf_has_no_entry_for_is_said_before_anything_appears() {
    let dir = model_dir("qwen2");
    let export = || {
        let out = dir.path().join("out");
        let done = run(EXPORT_HF, &[dir.path().to_str().unwrap(), out.to_str().unwrap(), "--gguf", "f16"], "");
        assert!(done.code == Some(1) && done.stderr.lines().count() == 1 && !out.exists(), "{}", done.stderr);
        done.stderr
    };
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 999999}"#).unwrap();
    assert!(export().contains("the end token 999999 is not in the vocabulary of 320"));
    let path = dir.path().join("tokenizer.json");
    let text = fs::read_to_string(&path).unwrap().replace("{N}| ?", "{N}{1,2}| ?");
    fs::write(&path, text).unwrap();
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 319}"#).unwrap();
    assert!(export().contains("the pattern that splits its words has no name in GGUF"));
}

#[test]
fn broken_files_and_other_models_are_refused_in_one_line() {
    let dir = model_dir("qwen2");
    let file = exported(dir.path(), &dir.path().join("out"), "f32");
    let whole = fs::read(&file).unwrap();
    let place = |name: &[u8]| whole.windows(name.len()).position(|window| window == name).unwrap();
    let renamed = |from: &[u8], to: &[u8]| {
        let mut bytes = whole.clone();
        let at = place(from);
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    for (bytes, want) in [
        (b"GGML".to_vec(), "not a GGUF file"),
        (whole[..1000].to_vec(), "not a GGUF file"),
        (whole[..whole.len() - 5000].to_vec(), "x.gguf: "),
        (renamed(b"qwen2", b"bloom"), "architecture \"bloom\" is not one of"),
        (
            renamed(b"blk.1.ffn_up", b"blk.1.ffn_ux"),
            "tensor blk.1.ffn_ux.weight is not part of a Qwen2 model of 3 layers",
        ),
        (renamed(b"qwen2.block_count", b"qwen2.block_kount"), "the header has no number qwen2.block_count"),
    ] {
        let path = dir.path().join("x.gguf");
        fs::write(&path, bytes).unwrap();
        fs::remove_file(dir.path().join("tokenizer.json")).ok();
        let done = run(ROLLOUT, &["--text", "--model", path.to_str().unwrap(), "--device", "cpu"], "Hello\n");
        assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""), "{want}: {}", done.stderr);
        assert!(done.said().contains(want) && done.said().lines().count() == 1, "{want}: {}", done.stderr);
    }
    // An alignment of 0, by which candle divides.
    let path = dir.path().join("x.gguf");
    fs::write(&path, renamed(b"general.file_type", b"general.alignment")).unwrap();
    assert!(Gguf::open(&path).err().unwrap().to_string().ends_with("not a GGUF file: candle panics on it"));
}

/// An independent implementation in the same language, from the same files.
#[test]
fn candle_computes_the_same_logits() {
    let reference = Reference::of_families();
    let (prompt, completion) = reference.sequences().swap_remove(1);
    let tokens = [&prompt[..], &completion].concat();
    for family in ["qwen2", "llama", "smollm2"] {
        let dir = directory().join(format!("tiny-{family}"));
        let weights = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
        let weights = weights.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap())).collect();
        let weights = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let text = fs::read_to_string(dir.join("config.json")).unwrap();
        let input = Tensor::new(&tokens[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = if family == "qwen2" {
            qwen2::ModelForCausalLM::new(&serde_json::from_str(&text).unwrap(), weights).unwrap().forward(&input, 0)
        } else {
            let config = serde_json::from_str::<llama::LlamaConfig>(&text).unwrap().into_config(false);
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            llama::Llama::load(weights, &config).unwrap().forward(&input, 0, &mut cache)
        };
        let want = logits.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let got = decoded_logits(&Model::load(&dir).unwrap(), &tokens, 1).pop().unwrap();
        assert!(worst(&got, &want) < 2e-4, "{family}: {:e}", worst(&got, &want));
    }
}

/// The pipe of the README: a teacher's samples, scored, the right ones kept, and a student of another family trained on them.
#[test]
fn a_student_learns_what_a_quantised_teacher_writes() {
    let (teacher, student) = (model_dir("qwen2"), model_dir("llama"));
    let file = exported(teacher.path(), &teacher.path().join("out"), "q8_0");
    let rollout =
        ["--model", file.to_str().unwrap(), "-n", "4", "--temperature", "0.2", "--max-completion-tokens", "12"];
    let answered = prompts().replace("\"prompt_id\"", "\"answer\":\"7\",\"prompt_id\"");
    let sampled = run(ROLLOUT, &[&rollout[..], &["--seed", "1", "--device", "cpu"]].concat(), &answered);
    assert_eq!(sampled.code, Some(0), "{}", sampled.stderr);
    let scored = run(env!("CARGO_BIN_EXE_score"), &["--reward", "correctness=1"], &sampled.stdout);
    assert_eq!(scored.code, Some(0), "{}", scored.stderr);
    let mut right = scored.records();
    right.retain(|record| record["sample_index"].as_u64().unwrap() < 3);
    assert_eq!(right.len(), 32 * 3);

    let out = student.path().join("taught");
    let (policy, out) = (student.path().to_str().unwrap(), out.to_str().unwrap());
    let options =
        ["--supervised", "--policy", policy, "--out", out, "--groups-per-step", "8", "--learning-rate", "1e-2"];
    let taught = run(env!("CARGO_BIN_EXE_grpo-step"), &[&options[..], &["--device", "cpu"]].concat(), &lines(&right));
    assert_eq!(taught.code, Some(0), "{}", taught.stderr);
    let losses: Vec<f64> = taught.records().iter().map(|step| step["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 12);
    assert!(losses[11] < 0.8 * losses[0], "{losses:?}");
}
