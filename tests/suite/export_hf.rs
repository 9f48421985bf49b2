//! `export-hf` as a process: what it writes is what transformers reads.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use grpo_pipes::checkpoint::{self, State};
use grpo_pipes::model::{Config, Model};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::tensors::TensorFile;
use half::{bf16, f16};
use serde_json::{Value, json};

use crate::fixtures::directory;
use crate::process::{Finished, check_help, run};

const EXPORT_HF: &str = env!("CARGO_BIN_EXE_export-hf");

fn export(checkpoint: &Path, out: &Path, options: &[&str]) -> Finished {
    run(EXPORT_HF, &[&[checkpoint.to_str().unwrap(), out.to_str().unwrap()], options].concat(), "")
}

fn exported(checkpoint: &Path, out: &Path, options: &[&str]) {
    let done = export(checkpoint, out, options);
    assert_eq!((done.code, done.stdout.as_str()), (Some(0), ""), "{}", done.stderr);
}

fn tiny() -> PathBuf {
    directory().join("tiny-qwen2")
}

/// A copy of the tiny model as a checkpoint at step 7, with one weight changed.
fn checkpoint(dir: &Path, weight: f32) -> PathBuf {
    let path = dir.join("step_000007");
    fs::create_dir(&path).unwrap();
    checkpoint::copy_companions(&tiny(), &path, "float32").unwrap();
    let mut model = Model::load(&tiny()).unwrap();
    model.parameters_mut()[4][1] = weight;
    model.save(&path.join(checkpoint::WEIGHTS), Dtype::F32).unwrap();
    fs::write(path.join(checkpoint::OPTIMIZER), "moments").unwrap();
    let state = State {
        step: 7,
        optimizer_steps: 14,
        seed: 3,
        prompts_consumed: 28,
        tokens_consumed: 1234,
        policy_id: "0123".into(),
        parent_policy_id: "4567".into(),
        command_line: vec!["grpo-step".into()],
        package_version: "0.1.0".into(),
        ..State::default()
    };
    state.save(&path).unwrap();
    path
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

#[test]
fn the_help_is_the_golden_one() {
    check_help(EXPORT_HF, "export-hf");
}

#[test]
fn a_checkpoint_becomes_a_model_directory_without_what_only_training_needs() {
    let dir = tempfile::tempdir().unwrap();
    let (from, out) = (checkpoint(dir.path(), 0.5), dir.path().join("export"));
    exported(&from, &out, &[]);
    let files = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(names(&out), [&files[..], &["tokenizer_config.json"]].concat());
    for name in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(tiny().join(name)).unwrap(), "{name}");
    }
    assert_eq!(names(dir.path()), ["export", "step_000007"]);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\nlibrary_name: transformers\n"), "{card}");
    for words in
        ["# step_000007", "Weights in float32.", "7 steps on 28 groups, 1234 tokens, seed 3", "`0123`", "`4567`"]
    {
        assert!(card.contains(words), "{words}: {card}");
    }
}

type Round = fn(f32) -> f32;

#[test]
fn weights_are_the_same_in_f32_and_the_nearest_in_fewer_bits() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::load(&tiny()).unwrap();
    let storages: [(&str, &str, Round); 3] = [
        ("f32", "float32", |x| x),
        ("bf16", "bfloat16", |x| bf16::from_f32(x).to_f32()),
        ("f16", "float16", |x| f16::from_f32(x).to_f32()),
    ];
    for (option, dtype, round) in storages {
        let out = dir.path().join(option);
        exported(&tiny(), &out, &["--dtype", option]);
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        let mut want: Value = serde_json::from_slice(&fs::read(tiny().join("config.json")).unwrap()).unwrap();
        (want["torch_dtype"], want["dtype"]) = (dtype.into(), dtype.into());
        want["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 1e6});
        assert_eq!(config, want);
        let file = TensorFile::open(&out.join("model.safetensors")).unwrap();
        assert_eq!(file.note("format"), Some("pt"), "transformers refuses a file that does not say so");
        let parameters = model.config().stored().named();
        assert_eq!(file.names(), parameters.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>());
        for ((name, shape), values) in parameters.iter().zip(model.parameters()) {
            assert_eq!(file.shape(name).unwrap(), shape);
            let want: Vec<u32> = values.iter().map(|x| round(*x).to_bits()).collect();
            let got: Vec<u32> = file.read::<f32>(name).unwrap().iter().map(|x| x.to_bits()).collect();
            assert!(got == want, "{option} {name}");
        }
        let size = if option == "f32" { 4 } else { 2 };
        let numbers: usize = model.parameters().iter().map(|values| values.len()).sum();
        let bytes = fs::metadata(out.join("model.safetensors")).unwrap().len() as usize;
        assert!((numbers * size..numbers * size + 10_000).contains(&bytes), "{option}: {bytes}");
    }
}

/// `tests/fixtures/check_config.py` holds what each version of transformers makes of it.
#[test]
fn the_config_is_in_the_spelling_of_transformers_4_and_of_5() {
    let default = json!({"rope_theta": 1e6, "rope_type": "default"});
    let yarn = json!({"type": "yarn", "factor": 4, "original_max_position_embeddings": 128});
    let five = json!({"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0});
    for (entries, theta, scaling) in [
        (json!({"rope_parameters": default, "dtype": "bfloat16"}), 1e6, json!(null)),
        (json!({"rope_theta": 1e6, "rope_scaling": null}), 1e6, json!(null)),
        (json!({"model_type": null}), 1e4, json!(null)),
        (
            json!({"rope_theta": 1e6, "rope_scaling": yarn}),
            1e6,
            json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}),
        ),
        (json!({"rope_parameters": five}), 5e5, json!({"rope_type": "linear", "factor": 2.0})),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("from"), dir.path().join("out"));
        fs::create_dir(&from).unwrap();
        checkpoint::copy_companions(&tiny(), &from, "float32").unwrap();
        fs::write(from.join("chat_template.jinja"), "{{ messages }}").unwrap();
        fs::copy(tiny().join(checkpoint::WEIGHTS), from.join(checkpoint::WEIGHTS)).unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(tiny().join("config.json")).unwrap()).unwrap();
        let object = config.as_object_mut().unwrap();
        ["rope_theta", "torch_dtype"].iter().for_each(|name| _ = object.remove(*name));
        object.extend(entries.as_object().unwrap().clone());
        object.retain(|name, value| name != "model_type" || !value.is_null());
        fs::write(from.join("config.json"), config.to_string()).unwrap();
        exported(&from, &out, &["--dtype", "bf16"]);
        let got: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        let mut parameters = if scaling.is_null() { json!({"rope_type": "default"}) } else { scaling.clone() };
        parameters["rope_theta"] = theta.into();
        let names = ["model_type", "torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters"];
        let want = [json!("qwen2"), json!("bfloat16"), json!("bfloat16"), theta.into(), scaling, parameters];
        assert_eq!(names.map(|name| got[name].clone()), want, "{entries}");
        assert_eq!(Config::load(&out).unwrap(), Config::load(&from).unwrap());
        assert!(out.join("chat_template.jinja").exists());
    }
}

#[test]
fn a_head_of_its_own_is_exported_and_a_tied_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    for tied in [true, false] {
        let (from, out) = (dir.path().join(format!("from_{tied}")), dir.path().join(format!("out_{tied}")));
        fs::create_dir(&from).unwrap();
        checkpoint::copy_companions(&tiny(), &from, "float32").unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(tiny().join("config.json")).unwrap()).unwrap();
        config["tie_word_embeddings"] = tied.into();
        fs::write(from.join("config.json"), config.to_string()).unwrap();
        let model = Model::random(Config::load(&from).unwrap(), 1);
        model.save(&from.join(checkpoint::WEIGHTS), Dtype::F32).unwrap();
        exported(&from, &out, &[]);
        let names = TensorFile::open(&out.join(checkpoint::WEIGHTS)).unwrap().names();
        assert_eq!(names.iter().filter(|name| *name == "lm_head.weight").count(), usize::from(!tied));
        assert_eq!(names.iter().filter(|name| *name == "model.embed_tokens.weight").count(), 1);
        assert_eq!(Model::load(&out).unwrap().parameters(), model.parameters());
    }
}

#[test]
fn the_card_has_the_last_metrics_and_the_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    let (metrics, evaluation) = (dir.path().join("metrics.jsonl"), dir.path().join("evaluation.json"));
    fs::write(
        &metrics,
        "{\"step\":1,\"reward\":0.25}\n{\"step\":2,\"reward\":0.75,\"completions/mean_length\":31.5}\n",
    )
    .unwrap();
    let rollout = json!({"group_id": "0:a", "answer": "4", "completion": "4", "rewards": {"correctness": 2.0}, "reward": 2.0,
                         "finish_reason": "stop", "completion_token_ids": [1, 2]});
    let done = run(env!("CARGO_BIN_EXE_evaluate"), &["--json"], &format!("{rollout}\n"));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    fs::write(&evaluation, &done.stdout).unwrap();
    let options = ["--metrics", metrics.to_str().unwrap(), "--evaluation", evaluation.to_str().unwrap()];
    exported(&tiny(), &dir.path().join("out"), &options);
    let card = fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    for row in ["| reward | 0.75 |", "| completions/mean_length | 31.5 |", "| accuracy_strict.value | 1.0 |"] {
        assert!(card.contains(row), "{row}: {card}");
    }
    assert!(!card.contains("0.25"), "{card}");
}

/// What the Hub finds a model by, and the recipe without what concerns the machine alone.
#[test]
fn the_card_of_a_runs_checkpoint_has_its_licence_base_model_data_set_and_recipe() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("run/checkpoints")).unwrap();
    let from = checkpoint(&dir.path().join("run/checkpoints"), 0.5);
    fs::write(from.join("LICENSE"), "                    Apache License\n").unwrap();
    let recipe = "# a run\nSEED=3\nSCORER=judge --key abc\nMODEL=Qwen/Qwen2.5-0.5B-Instruct\nSYSTEM_PROMPT=/home/me/prompt.txt\n\
                  DATA=openai/gsm8k\nEPSILON_HIGH=\nLEARNING_RATE=5e-6\n";
    fs::write(dir.path().join("run/recipe.env"), recipe).unwrap();
    let evaluation = dir.path().join("after.json");
    fs::write(&evaluation, r#"{"accuracy_strict":{"value":0.5},"accuracy_flexible":null}"#).unwrap();
    exported(&from, &dir.path().join("out"), &["--evaluation", evaluation.to_str().unwrap()]);
    let card = fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    let front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: \"apache-2.0\"\n\
                 base_model: Qwen/Qwen2.5-0.5B-Instruct\ndatasets:\n- openai/gsm8k\ntags:\n- grpo\nmodel-index:\n\
                 - name: \"step_000007\"\n  results:\n  - task:\n      type: text-generation\n    dataset:\n      name: openai/gsm8k\n\
                 \x20     type: openai/gsm8k\n    metrics:\n    - type: accuracy\n      name: accuracy_strict\n      value: 0.5\n---\n";
    assert!(card.starts_with(front), "{card}");
    for row in ["| SEED | 3 |", "| SYSTEM_PROMPT | prompt.txt |", "| LEARNING_RATE | 5e-6 |"] {
        assert!(card.contains(row), "{row}: {card}");
    }
    assert!(!["SCORER", "abc", "/home", "EPSILON_HIGH"].iter().any(|word| card.contains(word)), "{card}");
    exported(&from, &dir.path().join("other"), &["--license", "mit"]);
    let card = fs::read_to_string(dir.path().join("other/README.md")).unwrap();
    assert!(card.contains("\nlicense: \"mit\"\n") && !card.contains("model-index"), "{card}");
}

#[test]
fn a_zip_file_holds_the_directory_and_has_the_same_bytes_each_time() {
    let dir = tempfile::tempdir().unwrap();
    exported(&tiny(), &dir.path().join("plain"), &["--dtype", "bf16"]);
    let zips = ["a", "b"].map(|folder| {
        fs::create_dir(dir.path().join(folder)).unwrap();
        let path = dir.path().join(folder).join("my-model.zip");
        exported(&tiny(), &path, &["--dtype", "bf16", "--zip"]);
        assert_eq!(names(&dir.path().join(folder)), ["my-model.zip"], "nothing is left beside it");
        path
    });
    assert!(fs::read(&zips[0]).unwrap() == fs::read(&zips[1]).unwrap());
    let mut archive = zip::ZipArchive::new(File::open(&zips[0]).unwrap()).unwrap();
    let order: Vec<String> = archive.file_names().map(|name| name.unwrap().to_string()).collect();
    assert!(order.is_sorted(), "{order:?}");
    let mut found = BTreeMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        found.insert(entry.name().unwrap().strip_prefix("my-model/").unwrap().to_owned(), bytes);
    }
    let plain = dir.path().join("plain");
    let want: BTreeMap<_, _> =
        names(&plain).into_iter().map(|name| (name.clone(), fs::read(plain.join(name)).unwrap())).collect();
    assert!(found == want, "{:?}", found.keys());
}

#[test]
fn nothing_is_written_when_it_cannot_be_right() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("damaged"), "{\"step\":1}\n{\"step\":").unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::create_dir(path("exists")).unwrap();
    let damaged = path("damaged").display().to_string();
    let empty = path("empty").display().to_string();
    let nowhere = path("nowhere").display().to_string();
    let cases = [
        (tiny(), "exists", vec![], 2, "exists already".to_owned()),
        (tiny(), "damaged", vec!["--zip"], 2, "exists already".to_owned()),
        (tiny(), "...zip", vec!["--zip"], 2, "...zip: not a name".to_owned()),
        (path("nowhere"), "out", vec![], 1, format!("{nowhere}: no such directory")),
        (path("exists"), "out", vec![], 1, "exists".to_owned()),
        (tiny(), "out", vec!["--metrics", &damaged], 3, format!("export-hf: {damaged}:2: ")),
        (tiny(), "out", vec!["--evaluation", &empty], 3, format!("{empty}: empty")),
        (tiny(), "out", vec!["--metrics", &nowhere], 1, format!("{nowhere}: ")),
    ];
    let before = names(dir.path());
    for (from, out, options, code, message) in cases {
        let done = export(&from, &path(out), &options);
        assert_eq!(done.code, Some(code), "{message}: {}", done.stderr);
        assert!(done.stderr.contains(&message), "{message}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
        assert_eq!(names(dir.path()), before);
    }
}

#[test]
fn a_weight_that_the_storage_cannot_hold_is_refused() {
    for (weight, refused) in [(f32::NAN, &["f32", "bf16", "f16"][..]), (1e5, &["f16"])] {
        let dir = tempfile::tempdir().unwrap();
        let from = checkpoint(dir.path(), weight);
        for dtype in ["f32", "bf16", "f16"] {
            for zip in [None, Some("--zip")] {
                let out = dir.path().join(format!("out_{dtype}_{}", zip.is_some()));
                let done = export(&from, &out, &["--dtype", dtype].into_iter().chain(zip).collect::<Vec<_>>());
                let code = if refused.contains(&dtype) { 4 } else { 0 };
                assert_eq!(done.code, Some(code), "{weight} {dtype}: {}", done.stderr);
                assert_eq!(out.exists(), code == 0);
                assert!(code == 0 || done.stderr.contains(": model.layers."), "{}", done.stderr);
            }
        }
        assert!(names(dir.path()).iter().all(|name| !name.starts_with('.') && !name.contains("unzipped")));
    }
}
