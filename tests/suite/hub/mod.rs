//! The Hub's protocol, spoken by a small server of our own.

mod push;
mod server;
mod writes;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::Ordering;

use serde_json::Value;
use server::Hub;

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn assert_ids(output: &Output, count: usize) {
    assert!(output.status.success(), "{}", stderr(output));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(text.lines().count(), count);
    assert!(text.starts_with("{\"prompt_id\":\"gsm8k/train/0\""), "{text}");
}

const ROWS: &[u8] = b"{\"question\":\"Q?\",\"answer\":\"#### 1\"}\n{\"question\":\"R?\",\"answer\":\"#### 2\"}\n";
const DATA: [(&str, &[u8]); 2] = [("README.md", b"hello"), ("main/train-00000-of-00001.jsonl", ROWS)];

#[test]
fn a_data_set_is_downloaded_once_and_then_there_offline_and_without_a_server() {
    let hub = Hub::start(&DATA);
    let offline = hub.prep("openai/gsm8k", &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.status.code(), Some(1));
    assert!(
        stderr(&offline).starts_with("gsm8k-prep: hub: openai/gsm8k: HF_HUB_OFFLINE is set"),
        "{}",
        stderr(&offline)
    );
    assert_eq!(hub.state.log.lock().unwrap().len(), 0);

    assert_ids(&hub.prep("openai/gsm8k", &[]), 2);
    assert_ids(&hub.prep("openai/gsm8k", &[]), 2);
    assert_eq!(hub.downloads(), 1);
    let asked = hub.state.log.lock().unwrap().len();
    assert_ids(&hub.prep("openai/gsm8k", &[("HF_HUB_OFFLINE", "true")]), 2);
    assert_eq!(hub.state.log.lock().unwrap().len(), asked);
    assert_ids(&hub.prep("openai/gsm8k", &[("HF_ENDPOINT", "http://127.0.0.1:1")]), 2);
}

#[test]
fn a_download_cut_off_or_answered_with_an_error_page_is_never_taken_for_whole() {
    for (cuts, fails) in [(1, 0), (9, 0), (0, 1), (0, 9)] {
        let hub = Hub::start(&DATA);
        hub.state.cut.store(cuts, Ordering::SeqCst);
        hub.state.fail.store(fails, Ordering::SeqCst);
        let first = hub.prep("openai/gsm8k", &[]);
        if !first.status.success() {
            assert_eq!(first.status.code(), Some(1));
            assert!(stderr(&first).starts_with("gsm8k-prep: hub: openai/gsm8k: main/train"), "{}", stderr(&first));
            assert_eq!(stderr(&first).lines().count(), 1, "{}", stderr(&first));
            assert_eq!(first.stdout, b"");
            assert_eq!(hub.prep("openai/gsm8k", &[("HF_HUB_OFFLINE", "1")]).status.code(), Some(1));
        }
        hub.state.cut.store(0, Ordering::SeqCst);
        hub.state.fail.store(0, Ordering::SeqCst);
        assert_ids(&hub.prep("openai/gsm8k", &[]), 2);
    }
}

#[test]
fn a_download_that_was_cut_off_goes_on_where_it_ended_and_a_busy_hub_is_asked_again() {
    let hub = Hub::start(&DATA);
    hub.state.cut.store(3, Ordering::SeqCst);
    hub.state.busy.store(2, Ordering::SeqCst);
    assert_ids(&hub.prep("openai/gsm8k", &[("HF_TOKEN", "sesame")]), 2);
    assert_eq!(hub.state.resumed.load(Ordering::SeqCst), 3);
    hub.state.busy.store(u32::MAX, Ordering::SeqCst);
    assert_ids(&hub.prep("openai/gsm8k", &[]), 2);
    let other = Hub::start(&DATA);
    other.state.busy.store(u32::MAX, Ordering::SeqCst);
    let busy = other.prep("openai/gsm8k", &[]);
    let expected = format!("gsm8k-prep: hub: openai/gsm8k: cannot get it from {}: status 503\n", other.endpoint);
    assert_eq!((busy.status.code(), stderr(&busy)), (Some(1), expected));
}

/// All names below a directory.
fn walk(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        found.push(entry.path().display().to_string());
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), found);
        }
    }
}

#[test]
fn a_server_cannot_name_files_outside_the_cache() {
    for climb in ["../../../", "../../../../../", ""] {
        for part in ["headers", "object", "commit"] {
            let hub = Hub::start(&DATA);
            let outside = tempfile::tempdir().unwrap();
            // Relative to where contents are, and to where snapshots are; or from the root.
            let path = if climb.is_empty() {
                outside.path().join("evil").display().to_string()
            } else {
                format!("{climb}evil")
            };
            *hub.state.astray.lock().unwrap() = Some((part, path.clone()));
            let done = hub.prep("openai/gsm8k", &[]);
            match part {
                "headers" => assert_ids(&done, 2),
                _ => {
                    assert_eq!(done.status.code(), Some(1), "{}", stderr(&done));
                    let what =
                        if part == "object" { "main/train-00000-of-00001.jsonl: bad object id" } else { "bad commit" };
                    assert_eq!(stderr(&done), format!("gsm8k-prep: hub: openai/gsm8k: {what} {path:?}\n"));
                }
            }
            let mut names = Vec::new();
            walk(hub.home.path(), &mut names);
            walk(outside.path(), &mut names);
            let beside = hub.home.path().parent().unwrap().join("evil");
            assert!(!names.iter().any(|name| name.contains("evil")) && !beside.exists(), "{names:?}");
        }
    }
}

#[test]
fn a_cached_file_that_lost_its_end_is_fetched_again() {
    let hub = Hub::start(&DATA);
    assert_ids(&hub.prep("openai/gsm8k", &[]), 2);
    let blobs = hub.home.path().join("hub/datasets--openai--gsm8k/blobs");
    let blob = fs::read_dir(blobs).unwrap().next().unwrap().unwrap().path();
    fs::write(&blob, &ROWS[..40]).unwrap();
    assert_ids(&hub.prep("openai/gsm8k", &[]), 2);
    assert_eq!(fs::read(&blob).unwrap(), ROWS);
}

#[test]
fn what_the_hub_refuses_is_said_in_one_line_with_the_remedy() {
    let hub = Hub::start(&DATA);
    let cases = [
        ("own/nothing", format!("gsm8k-prep: hub: own/nothing: not found on {}\n", hub.endpoint)),
        (
            "own/secret",
            "gsm8k-prep: hub: own/secret: not found, or private: check the name, and set HF_TOKEN to a token that may read it\n".into(),
        ),
    ];
    for (id, message) in cases {
        let output = hub.prep(id, &[]);
        assert_eq!((output.status.code(), stderr(&output)), (Some(1), message));
    }
    let allowed = hub.prep("own/secret", &[("HF_TOKEN", "sesame")]);
    assert!(allowed.status.success(), "{}", stderr(&allowed));
    let nobody = hub.prep("own/er", &[("HF_ENDPOINT", "http://127.0.0.1:1")]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(stderr(&nobody).starts_with("gsm8k-prep: hub: own/er: cannot get it from http://127.0.0.1:1: "));
    assert_eq!(stderr(&nobody).lines().count(), 1);
}

#[test]
fn a_data_set_without_the_split_says_so() {
    let hub = Hub::start(&DATA[..1]);
    let output = hub.prep("openai/gsm8k", &[]);
    assert!(stderr(&output).starts_with("gsm8k-prep: hub: openai/gsm8k: no file train*"), "{}", stderr(&output));
}

/// Resolves a model in a process of its own, since the cache and the endpoint are of the environment.
fn model(hub: &Hub, id: &str, settings: &[(&str, &str)]) -> std::result::Result<String, String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "hub::resolves_the_model_named_in_the_environment", "--ignored", "--nocapture"]);
    for name in ["HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", hub.home.path()).env("HF_ENDPOINT", &hub.endpoint).env("TEST_MODEL", id);
    command.env("TEST_REPLY", hub.home.path().join("reply")).envs(settings.iter().copied());
    let output = command.output().unwrap();
    let reply = fs::read_to_string(hub.home.path().join("reply")).unwrap_or_else(|_| panic!("{output:?}"));
    fs::remove_file(hub.home.path().join("reply")).unwrap();
    match reply.split_once(' ').unwrap() {
        ("ok", dir) => Ok(dir.into()),
        (_, error) => Err(error.into()),
    }
}

#[test]
#[ignore = "a part of the other tests, run by them in a process of its own"]
fn resolves_the_model_named_in_the_environment() {
    let Ok(model) = std::env::var("TEST_MODEL") else { return };
    let file = std::env::var("TEST_FILE").ok();
    let others: Vec<String> = std::env::var("TEST_OTHERS").into_iter().collect();
    let others: Vec<&str> = others.iter().map(String::as_str).collect();
    let reply = match grpo_pipes::checkpoint::hub::model(&model, file.as_deref(), &others) {
        Ok(dir) => format!("ok {}", dir.display()),
        Err(error) => format!("error {error}"),
    };
    fs::write(std::env::var("TEST_REPLY").unwrap(), reply).unwrap();
}

const MODEL: [(&str, &[u8]); 6] = [
    ("config.json", br#"{"model_type": "qwen2"}"#),
    ("generation_config.json", b"{ }"),
    ("tokenizer.json", b"[]"),
    ("tokenizer_config.json", b"[ ]"),
    ("model.safetensors", b"weights"),
    ("pytorch_model.bin", b"not wanted"),
];

fn names(dir: &str) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn a_models_own_files_are_downloaded_and_no_others() {
    let hub = Hub::start(&MODEL);
    let dir = model(&hub, "own/er", &[]).unwrap();
    let mut expected: Vec<_> = MODEL[..5].iter().map(|(name, _)| *name).collect();
    expected.sort_unstable();
    assert_eq!(names(&dir), expected);
    assert_eq!(fs::read(Path::new(&dir).join("model.safetensors")).unwrap(), b"weights");
    assert_eq!(model(&hub, "own/er", &[("HF_HUB_OFFLINE", "1")]).unwrap(), dir);
    let here = hub.home.path().to_str().unwrap();
    assert_eq!(model(&hub, here, &[("HF_HUB_OFFLINE", "1")]).unwrap(), here);
}

#[test]
fn a_gguf_file_is_downloaded_alone_and_a_model_of_another_program_where_it_can_be_sampled_from() {
    let files: [(&str, &[u8]); 3] = [("README.md", b"-"), ("a-q4_k_m.gguf", b"GGUF"), ("a-q8_0.gguf", b"GGUF8")];
    let hub = Hub::start(&files);
    let file = model(&hub, "own/er", &[("TEST_FILE", "a-q8_0.gguf")]).unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"GGUF8");
    assert_eq!(names(Path::new(&file).parent().unwrap().to_str().unwrap()), ["a-q8_0.gguf"]);
    let missing = model(&hub, "own/er", &[("TEST_FILE", "b.gguf")]).unwrap_err();
    assert_eq!(missing, "hub: own/er: has no b.gguf; it has a-q4_k_m.gguf, a-q8_0.gguf");
    let refused = model(&hub, "own/er", &[("TEST_FILE", "model.safetensors")]).unwrap_err();
    assert!(refused.starts_with("--file model.safetensors: not a GGUF file"), "{refused}");

    let gemma = [("config.json", &br#"{"model_type": "gemma2"}"#[..])];
    let hub = Hub::start(&[&gemma[..], &MODEL[1..]].concat());
    assert!(model(&hub, "own/er", &[]).unwrap_err().contains("model_type \"gemma2\" is not supported"));
    let dir = model(&hub, "own/er", &[("TEST_OTHERS", "gemma2")]).unwrap();
    assert!(names(&dir).contains(&"model.safetensors".to_owned()));
}

#[test]
fn the_shards_of_an_index_are_all_downloaded_or_it_is_an_error() {
    let index =
        br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let shards: [(&str, &[u8]); 3] =
        [("model.safetensors.index.json", index), ("model-1.safetensors", b"1"), ("model-2.safetensors", b"2")];
    let hub = Hub::start(&[&MODEL[..4], &shards[..]].concat());
    let dir = model(&hub, "own/er", &[]).unwrap();
    assert_eq!(names(&dir).iter().filter(|name| name.starts_with("model")).count(), 3);
    fs::remove_file(Path::new(&dir).join("model-2.safetensors")).unwrap();
    let error = model(&hub, "own/er", &[("HF_HUB_OFFLINE", "1")]).unwrap_err();
    assert!(error.ends_with("does not have it whole (no model-2.safetensors)"), "{error}");

    let partial = Hub::start(&[&MODEL[..4], &shards[..2]].concat());
    assert_eq!(model(&partial, "own/er", &[]).unwrap_err(), "hub: own/er: has no file model-2.safetensors");
}

#[test]
fn an_index_cannot_name_files_outside_its_directory() {
    let hub = Hub::start(&MODEL[..4]);
    let evil = br#"{"weight_map": {"a": "../../../../evil"}}"#.to_vec();
    hub.state.files.lock().unwrap().insert("model.safetensors.index.json".into(), evil);
    hub.state.files.lock().unwrap().insert("../../../../evil".into(), b"evil".to_vec());
    assert_eq!(model(&hub, "own/er", &[]).unwrap_err(), "hub: own/er: bad file name \"../../../../evil\"");
    assert_eq!(model(&hub, "../own/er", &[]).unwrap_err(), "../own/er: no such directory, and not a Hub id owner/name");
}

#[test]
fn a_repository_without_a_model_that_is_read_says_what_it_has_before_weights_are_downloaded() {
    let adapter =
        ("adapter_config.json", &br#"{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}"#[..]);
    let tokenizer = MODEL[2];
    let large = |name: &'static str| (name, &b"large"[..]);
    let cases = [
        (vec![adapter, tokenizer, large("adapter_model.bin")], "a LoRA adapter of Qwen/Qwen2.5-0.5B without "),
        (
            vec![large("README.md"), large("model-q4_0.gguf")],
            "model-q4_0.gguf is GGUF: `rollout` samples from it with --file",
        ),
        (vec![MODEL[0], tokenizer, large("pytorch_model.bin")], "the weights are a pickle, pytorch_model.bin, "),
        (
            vec![("config.json", br#"{"model_type": "gemma2"}"#), large("tokenizer.model"), large("model.safetensors")],
            "config.json: model_type \"gemma2\" is not supported; ",
        ),
        (
            vec![
                ("config.json", br#"{"model_type": "qwen2", "quantization_config": {"quant_method": "fp8"}}"#),
                tokenizer,
                large("model.safetensors"),
            ],
            "config.json: quantization_config (fp8) is not supported; ",
        ),
    ];
    for (files, want) in cases {
        let hub = Hub::start(&files);
        let said = model(&hub, "own/er", &[]).unwrap_err();
        assert!(said.starts_with(&format!("hub: own/er: {want}")), "{said}");
        assert_eq!(hub.downloads(), 0, "{want}");
    }
}

#[test]
fn an_adapter_and_its_base_model_are_each_found_on_the_hub_or_here() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let files = |name: &str| -> BTreeMap<String, Vec<u8>> {
        let paths = fs::read_dir(tests.join(name)).unwrap().map(|entry| entry.unwrap().path());
        paths.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())).collect()
    };
    let adapter_of = |base: &str| {
        let mut files = files("tiny-adapter");
        let mut config: Value = serde_json::from_slice(&files["adapter_config.json"]).unwrap();
        config["base_model_name_or_path"] = base.into();
        files.insert("adapter_config.json".into(), config.to_string().into());
        files
    };
    let sampled = |hub: &Hub, model: &str| {
        let mut command = hub.command(env!("CARGO_BIN_EXE_rollout"));
        fs::write(hub.home.path().join("questions"), "2 + 2?\n").unwrap();
        command.args(["--text", "--device", "cpu", "--max-completion-tokens", "8", "--model", model]);
        let done = command.arg(hub.home.path().join("questions")).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        done.stdout
    };
    let want = sampled(&Hub::start(&[]), tests.join("tiny-adapter").to_str().unwrap());

    let hub = Hub::start(&[]);
    *hub.state.files.lock().unwrap() = adapter_of(tests.join("tiny-qwen2").to_str().unwrap());
    assert_eq!(sampled(&hub, "own/er"), want);

    let (hub, here) = (Hub::start(&[]), tempfile::tempdir().unwrap());
    adapter_of("own/er").iter().for_each(|(name, bytes)| fs::write(here.path().join(name), bytes).unwrap());
    *hub.state.files.lock().unwrap() = files("tiny-qwen2");
    assert_eq!(sampled(&hub, here.path().to_str().unwrap()), want);
}

#[test]
fn a_chat_template_in_a_file_of_its_own_comes_with_the_model() {
    let templates: [(&str, &[u8]); 2] = [("chat_template.jinja", b"{{ messages }}"), ("chat_template.json", b"{}")];
    let hub = Hub::start(&[&MODEL[..], &templates].concat());
    let dir = model(&hub, "own/er", &[]).unwrap();
    assert!(templates.iter().all(|(name, bytes)| fs::read(Path::new(&dir).join(name)).unwrap() == *bytes));
}

#[test]
fn a_model_of_the_hub_is_trained_from_as_one_in_a_directory() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines/recipes/tiny");
    let step = env!("CARGO_BIN_EXE_grpo-step");
    let hub = Hub::start(&[]);
    let dir = hub.home.path();
    let mut init = hub.command(step);
    init.args(["--init", "--seed", "1", "--weights-only", "--policy"]).arg(root);
    assert!(init.arg("--out").arg(dir.join("start")).status().unwrap().success());
    let files = fs::read_dir(dir.join("start")).unwrap().map(|entry| entry.unwrap().path());
    let served = files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap()));
    *hub.state.files.lock().unwrap() = served.collect();

    let prep = ["--generate", "2", "--demonstrations", "--split", "train", "--seed", "1"];
    let demonstrations = hub.command(env!("CARGO_BIN_EXE_gsm8k-prep")).args(prep).output().unwrap().stdout;
    fs::write(dir.join("demonstrations.jsonl"), demonstrations).unwrap();
    let trained = |policy: &str, out: &str| {
        let mut command = hub.command(step);
        command.arg(dir.join("demonstrations.jsonl")).args([
            "--supervised",
            "--weights-only",
            "--learning-rate",
            "1e-3",
        ]);
        let output = command.args(["--policy", policy, "--out"]).arg(dir.join(out)).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        fs::read(dir.join(out).join("model.safetensors")).unwrap()
    };
    assert!(trained("own/er", "of_hub") == trained(dir.join("start").to_str().unwrap(), "of_dir"));
    assert!(hub.downloads() > 0);
}
