//! Low-rank adapters: against PEFT's numbers, against the gradients of all weights, and through the commands.

use std::fs;
use std::path::Path;
use std::process::Command;

use grpo_pipes::checkpoint;
use grpo_pipes::model::{AdapterConfig, Gradients, Model, TARGETS};
use grpo_pipes::numbers::aligned::AlignedVec;
use grpo_pipes::numbers::dtype::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::families::trained;
use crate::fixtures::{Reference, directory, distance, worst};
use crate::grpo_step::SCORED;
use crate::model::lay;
use crate::process::{Finished, lines, run};

const GRPO_STEP: &str = env!("CARGO_BIN_EXE_grpo-step");
const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");
const EXPORT_HF: &str = env!("CARGO_BIN_EXE_export-hf");

fn logprobs(model: &Model) -> Vec<f32> {
    let (batch, targets) = lay(&Reference::load().sequences());
    model.logprobs(&batch, &targets, 1.0).iter().map(|stats| stats.logprob).collect()
}

/// A copy of the adapter of the fixtures, beside its base model, with other entries in its config.
fn copied(entries: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tiny-qwen2", "tiny-adapter"] {
        fs::create_dir(dir.path().join(name)).unwrap();
        for file in fs::read_dir(directory().join(name)).unwrap() {
            let file = file.unwrap().path();
            fs::copy(&file, dir.path().join(name).join(file.file_name().unwrap())).unwrap();
        }
    }
    let path = dir.path().join("tiny-adapter/adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(entries.as_object().unwrap().clone());
    fs::write(path, config.to_string()).unwrap();
    dir
}

#[test]
fn log_probabilities_with_an_adapter_equal_peft() {
    let reference = Reference::of_adapters();
    let off = worst(&logprobs(&Model::load(&directory().join("tiny-adapter")).unwrap()), &reference.tensor("logprob"));
    assert!(off < 1e-4, "{off:e}");
    let stabilized = copied(&json!({"use_rslora": true}));
    let got = logprobs(&Model::load(&stabilized.path().join("tiny-adapter")).unwrap());
    let off = worst(&got, &reference.tensor("logprob.rslora"));
    assert!(off < 1e-4, "{off:e}");
    let base = logprobs(&Model::load(&directory().join("tiny-qwen2")).unwrap());
    assert!(worst(&base, &got) > 0.1, "the adapter changes something");
}

#[test]
fn gradients_of_an_adapter_equal_peft_and_the_base_model_has_none() {
    let (reference, model) = (Reference::of_adapters(), Model::load(&directory().join("tiny-adapter")).unwrap());
    let (batch, targets) = lay(&Reference::load().sequences());
    let mut gradients = Gradients::zeros(&model);
    let slope = -1.0 / targets.len() as f32;
    model.accumulate_gradients(&batch, &targets, 1.0, &mut gradients, &|_, _| slope.into());
    assert_eq!(gradients.0.len(), 2 * 5 * model.config().num_hidden_layers);
    for ((name, _), gradient) in model.trained().iter().zip(&gradients.0) {
        let off = distance(gradient, &reference.tensor(&format!("gradient.{name}")));
        assert!(off < 1e-5, "{name}: {off:e}");
    }
}

#[test]
fn an_adapter_after_five_steps_equals_torch() {
    let reference = Reference::of_adapters();
    let mut trainer = trained("tiny-adapter", Reference::load().sequences(), &reference.json["losses"]);
    let mut model = trainer.weights().unwrap().clone();
    let names: Vec<String> = model.trained().into_iter().map(|(name, _)| name).collect();
    for (name, part) in names.iter().zip(model.trainable_parts()) {
        let off = distance(part.values, &reference.tensor(&format!("trained.{name}")));
        assert!(off < 1e-5, "{name}: {off:e}");
    }
}

/// dA = factor B^T dW and dB = factor dW A^T, where dW is the gradient of the sum.
#[test]
fn gradients_of_an_adapter_are_projections_of_those_of_the_sums_also_in_bf16() {
    let config = AdapterConfig { rank: 5, alpha: 4.0, is_rank_stabilized: false, targets: TARGETS.to_vec() };
    for family in ["tiny-qwen2", "tiny-qwen3", "tiny-smollm2"] {
        for is_half in [false, true] {
            let mut adapted = Model::load(&directory().join(family)).unwrap().with_adapter(config.clone(), 3);
            adapted.trainable_parts().into_iter().skip(1).step_by(2).for_each(|b| {
                b.values.iter_mut().enumerate().for_each(|(i, x)| *x = 0.1 * ((i * 7) as f32).sin());
            });
            adapted.merge_adapter();
            let mut sums = adapted.parameters().into_iter();
            let next = |_, _, _: &[usize]| Ok(AlignedVec::from(sums.next().unwrap()));
            let mut whole = Model::from_parameters(adapted.config(), Dtype::F32, next).unwrap();
            if is_half {
                (adapted, whole) = (adapted.with_bf16_products(), whole.with_bf16_products());
            }
            check_projections(&mut adapted, &whole, if is_half { 2e-2 } else { 2e-5 });
        }
    }
}

fn check_projections(adapted: &mut Model, whole: &Model, most: f64) {
    let (batch, targets) = lay(&Reference::load().sequences());
    let slope = |i: usize, _: f32| ((i as f32 * 0.7).cos() / 20.0).into();
    let gradients = [&*adapted, whole].map(|model| {
        let mut gradients = Gradients::zeros(model);
        model.accumulate_gradients(&batch, &targets, 1.0, &mut gradients, &slope);
        gradients
    });
    let (factor, named) = (4.0 / 5.0, whole.trained());
    let trained = adapted.trained();
    let parts: Vec<Vec<f32>> = adapted.trainable_parts().into_iter().map(|part| part.values.to_vec()).collect();
    for i in (0..parts.len()).step_by(2) {
        let name = trained[i].0.replace("base_model.model.", "").replace(".lora_A", "");
        let place = named.iter().position(|(other, _)| *other == name).unwrap();
        let (dw, [out, width]) = (&gradients[1].0[place], [named[place].1[0], named[place].1[1]]);
        let at = |x: &[f32], i: usize| f64::from(x[i]);
        let of_a = (0..5 * width).map(|at_a| {
            let (r, column) = (at_a / width, at_a % width);
            factor * (0..out).map(|row| at(&parts[i + 1], row * 5 + r) * at(dw, row * width + column)).sum::<f64>()
        });
        let of_b = (0..out * 5).map(|at_b| {
            let (row, r) = (at_b / 5, at_b % 5);
            factor
                * (0..width).map(|column| at(dw, row * width + column) * at(&parts[i], r * width + column)).sum::<f64>()
        });
        for (got, want) in [(&gradients[0].0[i], of_a.collect::<Vec<_>>()), (&gradients[0].0[i + 1], of_b.collect())] {
            let want: Vec<f32> = want.into_iter().map(|x| x as f32).collect();
            let off = distance(got, &want);
            assert!(off < most, "{name}: {off:e}");
        }
    }
}

/// A folder with calls that work in it.
struct Folder(TempDir);

impl Folder {
    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn train(&self, policy: &str, out: &str, options: &str, records: &[Value]) -> Finished {
        let out = self.path(out);
        let own = ["--policy", policy, "--out", &out, "--device", "cpu", "--learning-rate", "1e-2", "--seed", "4"];
        run(GRPO_STEP, &own.into_iter().chain(options.split_whitespace()).collect::<Vec<_>>(), &lines(records))
    }

    fn sample(&self, model: &str, options: &[&str]) -> Vec<Value> {
        let prompts: Vec<Value> = (0..4)
            .map(|i| json!({"prompt_id": format!("a/{i}"), "prompt": [{"role": "user", "content": format!("{i} + 2?")}]}))
            .collect();
        let args = ["--model", model, "--max-completion-tokens", "8", "-n", "3", "--seed", "6", "--device", "cpu"];
        let done = run(ROLLOUT, &[&args, options].concat(), &lines(&prompts));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        done.records()
    }
}

fn tiny() -> String {
    directory().join("tiny-qwen2").display().to_string()
}

#[test]
fn a_checkpoint_of_an_adapter_goes_on_is_sampled_from_and_is_exported_merged_and_as_it_is() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let lora = "--lora-rank 4 --lora-targets q_proj,down_proj --groups-per-step 2 --max-staleness any";
    let twice = folder.train(&tiny(), "twice", lora, &SCORED);
    let once = folder.train(&tiny(), "once", lora, &SCORED[..6]);
    assert_eq!((twice.code, once.code), (Some(0), Some(0)), "{}{}", twice.stderr, once.stderr);
    assert!(!Path::new(&folder.path("once/model.safetensors")).exists(), "the base model is elsewhere");
    // The second half, by a checkpoint that is an adapter already.
    let again = folder.train(&folder.path("once"), "again", "--max-staleness any --groups-per-step 2", &SCORED[6..]);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    for file in ["adapter_model.safetensors", checkpoint::OPTIMIZER, "adapter_config.json"] {
        let [one, other] = ["twice", "again"].map(|name| fs::read(folder.path(&format!("{name}/{file}"))).unwrap());
        assert!(one == other, "{file}");
    }
    let [one, other] = ["twice", "again"].map(|name| checkpoint::identity(folder.path(name).as_ref()).unwrap());
    assert_eq!(one, other);

    // What it is sampled from is what it was trained with, and what it is merged to.
    let merged = run(EXPORT_HF, &[&folder.path("twice"), &folder.path("merged")], "");
    assert_eq!(merged.code, Some(0), "{}", merged.stderr);
    assert!(!Path::new(&folder.path("merged/adapter_config.json")).exists());
    let greedy = |model: &str, dtype: &str| -> Vec<Value> {
        let records = folder.sample(model, &["--dtype", dtype, "--temperature", "0"]);
        records.iter().map(|record| json!([record["completion_token_ids"], record["logprobs"]])).collect()
    };
    for dtype in ["f32", "bf16"] {
        let adapted = greedy(&folder.path("twice"), dtype);
        assert_eq!(adapted, greedy(&folder.path("merged"), dtype));
        assert_ne!(adapted, greedy(&tiny(), dtype));
        let mut scored = folder.sample(&folder.path("twice"), &["--dtype", dtype]);
        scored.iter_mut().enumerate().for_each(|(i, record)| record["reward"] = (i % 3).into());
        let step = folder.train(&folder.path("twice"), &format!("third-{dtype}"), &format!("--dtype {dtype}"), &scored);
        assert_eq!(step.code, Some(0), "{}", step.stderr);
        let line = &step.records()[0];
        assert_eq!(line["sampling/sampling_logp_difference/max"], 0.0, "{line}");
    }

    // Alone it has no base model in the next directory.
    let alone = run(EXPORT_HF, &["--adapter", &folder.path("twice"), &folder.path("alone/adapter")], "");
    assert_eq!(alone.code, Some(0), "{}", alone.stderr);
    let config: Value =
        serde_json::from_slice(&fs::read(folder.path("alone/adapter/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["base_model_name_or_path"], json!(fs::canonicalize(tiny()).unwrap()));
    assert!(fs::read_to_string(folder.path("alone/adapter/README.md")).unwrap().contains("library_name: peft"));
    assert_eq!(greedy(&folder.path("alone/adapter"), "f32"), greedy(&folder.path("twice"), "f32"));
    peft_answers_alike(&folder.path("alone/adapter"), &folder.sample(&folder.path("twice"), &["--temperature", "0"]));
}

/// PEFT, where there is one, loads the adapter and answers greedily with the same tokens. `PYTHON` names another Python than `python3`.
fn peft_answers_alike(adapter: &str, records: &[Value]) {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import peft, transformers"]).output();
    if !has.is_ok_and(|done| done.status.success()) {
        return eprintln!("test of adapters against PEFT skipped: {python} has no peft");
    }
    let check = directory().join("check_export.py").display().to_string();
    let done = run(&python, &[&check, adapter], &lines(records));
    assert_eq!(done.stdout, format!("{} answers equal, token for token\n", records.len()), "{}", done.stderr);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let refused = |policy: &str, options: &str, code: i32, what: &str| {
        let done = folder.train(policy, "out", options, &SCORED);
        assert_eq!(done.code, Some(code), "{options}: {}", done.stderr);
        assert!(done.stderr.contains(what), "{options}: {}", done.stderr);
        assert!(!Path::new(&folder.path("out")).exists());
    };
    refused(&tiny(), "--lora-rank 4 --lora-dropout 0.1", 2, "only 0: with dropout a policy would not train on");
    refused(&tiny(), "--lora-rank 4 --lora-targets q_proj,lm_head", 2, "the names are q_proj, k_proj, ");
    refused(&tiny(), "--lora-rank 4 --lora-alpha 0", 2, "--lora-alpha must be more than 0");
    let adapter = directory().join("tiny-adapter").display().to_string();
    let there = "--lora-rank 3 --lora-alpha 5 --lora-targets q_proj,v_proj,o_proj,up_proj,down_proj";
    refused(&adapter, "--lora-rank 4", 2, there);

    let entries = [
        (json!({"use_dora": true}), "use_dora = true is not supported; merge it in Python"),
        (json!({"rank_pattern": {"q_proj": 4}}), "rank_pattern = {\"q_proj\":4} is not supported"),
        (json!({"bias": "all"}), "bias = \"all\" is not supported"),
        (json!({"init_lora_weights": "pissa"}), "init_lora_weights = \"pissa\" is not supported"),
        (json!({"an_entry_of_later": 1}), "an_entry_of_later = 1 is not supported"),
        (json!({"r": 0}), "r is not a whole number above 0"),
        (json!({"r": 4}), "lora_A.weight has shape [3, "),
        (json!({"r": 1_000_000_000_000_000_000_u64}), "lora_A.weight has shape [3, "),
        (
            json!({"base_model_name_or_path": "../elsewhere"}),
            "its base model ../elsewhere is neither a directory nor in the Hub's",
        ),
        (json!({"base_model_name_or_path": "../tiny-adapter"}), "is an adapter, too"),
        (json!({"base_model_name_or_path": null}), "no base_model_name_or_path"),
    ];
    for (entry, what) in entries {
        let dir = copied(&entry);
        let adapter = dir.path().join("tiny-adapter").display().to_string();
        let done = run(ROLLOUT, &["--text", "--device", "cpu", "--model", &adapter], "hi\n");
        assert_eq!(done.code, Some(1), "{entry}: {}", done.stderr);
        assert!(done.stderr.lines().last().unwrap().contains(what), "{entry}: {}", done.stderr);
    }
}

#[test]
fn an_adapter_is_not_trained_on_with_another_base_model() {
    let folder = Folder(tempfile::tempdir().unwrap());
    let dir = copied(&json!({}));
    let base = dir.path().join("tiny-qwen2").display().to_string();
    assert_eq!(folder.train(&base, "one", "--lora-rank 2", &SCORED).code, Some(0));
    let theirs = dir.path().join("tiny-adapter").display().to_string(); // as PEFT wrote it, without our state
    let done = folder.train(&theirs, "goes-on", "--max-staleness any", &SCORED);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let weights = dir.path().join("tiny-qwen2/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    for name in ["one", "goes-on"] {
        let refused = folder.train(&folder.path(name), "two", "--max-staleness any", &SCORED);
        assert_eq!(refused.code, Some(1), "{}", refused.stderr);
        assert!(refused.stderr.contains("is not the one that it was trained on"), "{}", refused.stderr);
    }
}
