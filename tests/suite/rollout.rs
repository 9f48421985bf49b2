//! `rollout` as a process.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use grpo_pipes::checkpoint::{State, copy_companions, identity};
use grpo_pipes::gpu::device::Device;
use grpo_pipes::run::{LiveWeights, Lock, Role, Run};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures::directory;
use crate::process::{Finished, check_help, lines, run, run_into};

const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");

const FIELDS: [&str; 12] = [
    "group_id",
    "group_size",
    "sample_index",
    "policy_id",
    "policy_step",
    "seed",
    "temperature",
    "prompt_token_ids",
    "completion_token_ids",
    "logprobs",
    "finish_reason",
    "completion",
];

fn arguments<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--model", model, "--max-completion-tokens", "8", "--device", "cpu"], more].concat()
}

fn rollout(more: &[&str], input: &str) -> Finished {
    let model = directory().join("tiny-qwen2");
    run(ROLLOUT, &arguments(model.to_str().unwrap(), more), input)
}

fn prompt(i: usize) -> Value {
    json!({"prompt_id": format!("a/{i}"), "mine": {"x": [i]}, "prompt": [{"role": "user", "content": format!("{i} + 2?")}],
           "answer": "4"})
}

#[test]
fn the_help_is_the_golden_one() {
    check_help(ROLLOUT, "rollout");
}

#[test]
fn a_device_that_is_not_there_is_named_in_one_line_and_auto_does_without() {
    let Err(why) = Device::Cuda(0).open() else { return }; // there is one
    let (input, model) = (lines(&[prompt(0)]), directory().join("tiny-qwen2"));
    let model = ["--model", model.to_str().unwrap(), "--max-completion-tokens", "8"];
    let rollout = |more: &[&str]| run(ROLLOUT, &[&model, more].concat(), &input);
    let auto = rollout(&[]);
    assert_eq!(auto.code, Some(0), "{}", auto.stderr);
    let said = auto.stderr.lines().next().unwrap_or_default();
    assert!(said.starts_with("rollout: computing on the CPU (") && said.contains(", f32)"), "{said}");
    assert_eq!(auto.stderr.matches("computing on").count(), 1, "{}", auto.stderr);
    let cpu = rollout(&["--device", "cpu", "--dtype", "bf16"]);
    assert!(cpu.stderr.contains(", bf16 by ") && !cpu.stderr.contains("CUDA"), "{}", cpu.stderr);
    assert_eq!(rollout(&["--device", "cpu"]).stdout, auto.stdout);
    for device in ["cuda", "cuda:0"] {
        let done = rollout(&["--device", device]);
        assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""));
        assert_eq!(done.stderr, format!("rollout: {why}\n"));
    }
    assert_eq!(rollout(&["--device", "gpu"]).code, Some(2));
}

#[test]
fn a_rollout_has_the_prompts_fields_and_then_its_own() {
    let done = rollout(&["-n", "3", "--seed", "5", "-"], &lines(&[prompt(0), prompt(1)]));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let rollouts = done.records();
    assert_eq!(rollouts.len(), 6);
    for (i, rollout) in rollouts.iter().enumerate() {
        let fields: Vec<&str> = rollout.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, [&["prompt_id", "mine", "prompt", "answer"], &FIELDS[..]].concat());
        assert_eq!(rollout["group_id"], format!("0:a/{}", i / 3));
        assert_eq!(rollout["mine"], json!({"x": [i / 3]}));
        assert_eq!((rollout["sample_index"].as_u64(), rollout["group_size"].as_u64()), (Some(i as u64 % 3), Some(3)));
        let ids: Vec<u32> = serde_json::from_value(rollout["completion_token_ids"].clone()).unwrap();
        let logprobs: Vec<f32> = serde_json::from_value(rollout["logprobs"].clone()).unwrap();
        assert_eq!(ids.len(), logprobs.len());
        let stopped = matches!(ids.last(), Some(317 | 319));
        assert_eq!(rollout["finish_reason"], if stopped { "stop" } else { "length" });
        assert!(!rollout["completion"].as_str().unwrap().contains("<|im_end|>"));
    }
    let model = std::fs::read(directory().join("tiny-qwen2/model.safetensors")).unwrap();
    assert_eq!(rollouts[0]["policy_id"], blake3::hash(&model).to_hex()[..32]);
    assert!(done.said().starts_with("rollout: 6 sequences, "), "{}", done.stderr);
}

#[test]
fn the_file_of_a_model_is_not_the_file_of_prompts() {
    let model = directory().join("tiny-qwen2").display().to_string();
    for more in [&["--file", "none.gguf"][..], &["--file", "none.gguf", "-"]] {
        let refused = run(ROLLOUT, &[&["--model", &model], more].concat(), &lines(&[prompt(0)]));
        assert_eq!((refused.code, refused.stderr), (Some(1), format!("rollout: {model}: has no none.gguf\n")));
    }
}

#[test]
fn the_number_in_flight_changes_no_byte() {
    let input = lines(&(0..9).map(prompt).collect::<Vec<_>>());
    let whole = rollout(&["-n", "4"], &input).stdout;
    assert_eq!(whole.lines().count(), 36);
    assert_eq!(rollout(&["-n", "4", "--max-sequences", "3"], &input).stdout, whole);
    assert_ne!(rollout(&["-n", "4", "--seed", "1"], &input).stdout, whole);
}

#[test]
fn weights_in_bf16_give_other_log_probabilities_and_the_same_in_any_batch() {
    let input = lines(&(0..9).map(prompt).collect::<Vec<_>>());
    let halves = rollout(&["-n", "4", "--dtype", "bf16"], &input);
    assert!(halves.said().starts_with("rollout: 36 sequences, "), "{}", halves.stderr);
    assert_eq!(rollout(&["-n", "4", "--dtype", "bf16", "--max-sequences", "3"], &input).stdout, halves.stdout);
    let whole = rollout(&["-n", "4"], &input).stdout;
    assert_ne!(whole, halves.stdout);
    assert_eq!(rollout(&["-n", "4", "--dtype", "f32"], &input).stdout, whole);
    let refused = rollout(&["--dtype", "f16"], &input);
    let message = "rollout: --dtype f16: the CPU computes in f32 or bf16\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (Some(2), message));
}

#[test]
fn a_bad_line_ends_it_after_whole_groups() {
    let again = format!("{}{}", lines(&[prompt(0), prompt(1)]), lines(&[prompt(0)]));
    let cases = [
        (format!("{}nonsense\n", lines(&[prompt(0), prompt(1)])), "rollout: -:3: not a JSON object"),
        (
            format!("{}{{\"prompt\":[]}}\n", lines(&[prompt(0), prompt(1)])),
            "rollout: -:3: field \"prompt\" holds no message",
        ),
        (again, "rollout: -:3: prompt_id a/0 occurs again and would get the same samples; run rollout once per epoch"),
    ];
    for (input, message) in cases {
        let done = rollout(&["-n", "2"], &input);
        assert_eq!(done.code, Some(3));
        assert!(done.said().starts_with(message), "{}", done.stderr);
        assert_eq!(done.records().len(), 4);
    }
}

#[test]
fn a_long_prompt_is_refused_left_out_or_cut() {
    let mut long = prompt(1);
    long["prompt"][0]["content"] = "7 + ".repeat(100).into();
    let input = lines(&[prompt(0), long, prompt(2)]);
    let limit = ["--max-prompt-tokens", "90"];
    let done = rollout(&limit, &input);
    assert_eq!((done.code, done.records().len()), (Some(3), 1));
    assert!(done.stderr.contains("rollout: -:2: prompt a/1 has "), "{}", done.stderr);
    assert!(
        done.stderr.contains(" tokens, and --max-prompt-tokens allows 90; see --on-long-prompt"),
        "{}",
        done.stderr
    );

    let done = rollout(&[&limit[..], &["--on-long-prompt", "skip"]].concat(), &input);
    assert_eq!((done.code, done.records().len()), (Some(0), 2));
    assert!(done.stderr.contains("rollout: 1 prompts left out: too long"), "{}", done.stderr);

    let done = rollout(&[&limit[..], &["--on-long-prompt", "truncate-left"]].concat(), &input);
    assert_eq!((done.code, done.records().len()), (Some(0), 3));
    assert_eq!(done.records()[1]["prompt_token_ids"].as_array().unwrap().len(), 90);
}

#[test]
fn the_models_positions_bound_prompt_and_completion_together() {
    let model = directory().join("tiny-qwen2");
    let with = |limit| {
        let arguments = ["--model", model.to_str().unwrap(), "--max-completion-tokens", limit];
        run(ROLLOUT, &arguments, &lines(&[prompt(0)]))
    };
    let done = with("500");
    assert_eq!(done.code, Some(3));
    assert!(done.stderr.contains("and beside --max-completion-tokens the model has room for 12;"), "{}", done.stderr);
    let refused = with("512");
    let message = "rollout: --max-completion-tokens 512 leaves no room for a prompt: the model has 512 positions, so at most 511 fit\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (Some(2), message));
}

#[test]
fn defaults_fit_a_model_of_few_positions_and_text_is_asked_as_the_model_was_trained() {
    let (dir, project) = (tempfile::tempdir().unwrap(), Path::new(env!("CARGO_MANIFEST_DIR")));
    let tiny = project.join("pipelines/recipes/tiny");
    let model = dir.path().join("model");
    let init = ["--init", "--seed", "1", "--policy", tiny.to_str().unwrap(), "--out", model.to_str().unwrap()];
    assert_eq!(run(env!("CARGO_BIN_EXE_grpo-step"), &init, "").code, Some(0));
    let done = run(ROLLOUT, &["--text", "--model", model.to_str().unwrap()], "What is 2 + 3?\n");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let records = done.records();
    assert_eq!(records[0]["prompt"][0], json!({"role": "system", "content": "Solve."}));
    assert!(records[0]["completion_token_ids"].as_array().unwrap().len() <= 128);
}

#[test]
fn text_becomes_prompts_with_the_system_message() {
    let done = rollout(&["--text"], "What is 2 + 2?\n\nTwo \"quotes\"\n");
    let rollouts = done.records();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(rollouts[1]["prompt_id"], "text/3");
    let system = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n";
    let want = json!([{"role": "system", "content": system}, {"role": "user", "content": "Two \"quotes\""}]);
    assert_eq!(rollouts[1]["prompt"], want);
    assert!(rollouts[1].get("answer").is_none());

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("system.txt");
    std::fs::write(&file, "").unwrap();
    let done = rollout(&["--text", "--system-prompt", file.to_str().unwrap()], "Why?\n");
    assert_eq!(done.records()[0]["prompt"], json!([{"role": "user", "content": "Why?"}]));
}

#[test]
fn greedy_ignores_the_seed() {
    let input = lines(&[prompt(0)]);
    let completion = |seed| rollout(&["--temperature", "0", "--seed", seed], &input).records()[0]["completion"].clone();
    assert_eq!(completion("1"), completion("2"));
}

#[test]
fn options_out_of_range_are_usage_errors() {
    for wrong in [["--temperature", "-1"], ["--top-p", "0"], ["--min-p", "2"], ["--repetition-penalty", "0"]] {
        let done = rollout(&[&format!("{}={}", wrong[0], wrong[1])], "");
        assert_eq!(done.code, Some(2), "{wrong:?}: {}", done.stderr);
    }
}

/// A run whose policy is the tiny model, and its prompts; `live` makes the next step of it.
fn start_run(prompts: &[Value]) -> (TempDir, Run) {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::new(dir.path());
    fs::create_dir_all(run.checkpoint(0)).unwrap();
    copy_model(&run.checkpoint(0));
    run.point_policy_at(0).unwrap();
    fs::write(run.prompts(), lines(prompts)).unwrap();
    (dir, run)
}

fn copy_model(to: &Path) {
    let tiny = directory().join("tiny-qwen2");
    copy_companions(&tiny, to, "float32").unwrap();
    fs::copy(tiny.join("model.safetensors"), to.join("model.safetensors")).unwrap();
}

fn state(step: u64) -> State {
    State {
        step,
        optimizer_steps: step,
        seed: 0,
        prompts_consumed: 2 * step,
        tokens_consumed: 0,
        loss_scale: None,
        base_policy_id: None,
        policy_id: format!("weights of {step}"),
        parent_policy_id: String::new(),
        command_line: Vec::new(),
        package_version: String::new(),
        files: std::collections::BTreeMap::new(),
    }
}

fn following(run: &Run) -> Command {
    let mut command = Command::new(ROLLOUT);
    command.arg(run.prompts()).arg("--follow").arg(run.dir()).args(["--groups-per-step", "2", "-n", "2"]);
    command.args(["--max-completion-tokens", "8", "--device", "cpu"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn a_followed_run_is_sampled_step_by_step_as_each_step_alone_would_be() {
    // The second step has a prompt of the first again, as the next epoch may.
    let prompts = [prompt(0), prompt(1), prompt(1), prompt(2)];
    let (_dir, run) = start_run(&prompts);
    fs::create_dir_all(run.live(1)).unwrap(); // of a trainer that was killed
    let mut child = following(&run).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    let _lock = Lock::take(&run, Role::Train).unwrap();
    fs::remove_dir_all(run.dir().join("live")).unwrap();
    let live = LiveWeights::create(&run, 1, 0, None, &|_| ()).unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    for _ in 0..4 {
        stdout.read_line(&mut first).unwrap();
    }
    let publish = |dir: &Path| {
        copy_model(dir);
        state(1).save(dir)
    };
    live.publish(1, publish).unwrap();
    assert_eq!(identity(&run.live(1)).unwrap().step, 1);
    let mut second = String::new();
    stdout.read_to_string(&mut second).unwrap();
    assert!(child.wait().unwrap().success());

    let alone = |model: &Path, prompts: &[Value]| {
        run_with(&["--model", model.to_str().unwrap(), "-n", "2", "--max-completion-tokens", "8"], &lines(prompts))
    };
    assert_eq!(first, alone(&run.checkpoint(0), &prompts[..2]));
    assert_eq!(second, alone(&run.live(1), &prompts[2..]));
    assert_ne!(
        serde_json::from_str::<Value>(second.lines().next().unwrap()).unwrap()["completion_token_ids"],
        serde_json::from_str::<Value>(first.lines().nth(2).unwrap()).unwrap()["completion_token_ids"],
        "another step draws otherwise"
    );
}

#[test]
fn prompts_without_a_name_that_come_again_are_named_alike_after_a_resume() {
    let prompts = ["a", "a", "a", "b", "a", "a"].map(|text| json!({"prompt": text}));
    let (_dir, run) = start_run(&prompts);
    fs::create_dir(run.checkpoint(2)).unwrap();
    copy_model(&run.checkpoint(2));
    state(2).save(&run.checkpoint(2)).unwrap();
    run.point_policy_at(2).unwrap();
    let mut child = following(&run).spawn().unwrap();
    let _lock = Lock::take(&run, Role::Train).unwrap();
    let mut resumed = String::new();
    child.stdout.take().unwrap().read_to_string(&mut resumed).unwrap();
    assert!(child.wait().unwrap().success());

    let model = run.checkpoint(2).display().to_string();
    let alone = run_with(&["--model", &model, "-n", "2", "--max-completion-tokens", "8"], &lines(&prompts[4..]));
    assert_eq!(resumed, alone);
    let names: Vec<Value> =
        alone.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["prompt_id"].clone()).collect();
    let first = names[0].as_str().unwrap();
    assert_eq!(names, [first.to_owned(), first.to_owned(), format!("{first}-2"), format!("{first}-2")]);
}

fn run_with(arguments: &[&str], input: &str) -> String {
    let done = run(ROLLOUT, arguments, input);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    done.stdout
}

#[test]
fn the_shards_of_a_file_add_up_to_the_bytes_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.jsonl");
    let prompts = ["a", "a", "b", "a", "c", "b", "d"].map(|text| json!({"prompt": text}));
    fs::write(&path, lines(&prompts)).unwrap();
    let model = crate::fixtures::directory().join("tiny-qwen2").display().to_string();
    let file = path.to_str().unwrap();
    let sampled = |more: &[&str]| {
        run_with(&[&[file, "--model", &model, "-n", "2", "--max-completion-tokens", "8"], more].concat(), "")
    };
    let whole = sampled(&[]);
    for count in 1..=8 {
        let shards: String = (1..=count).map(|number| sampled(&["--shard", &format!("{number}/{count}")])).collect();
        assert_eq!(shards, whole, "{count}");
    }
    let done = run(ROLLOUT, &["--model", &model, "--shard", "1/2"], "");
    assert_eq!(
        (done.code, done.stderr.contains("--shard needs the prompts in a FILE")),
        (Some(2), true),
        "{}",
        done.stderr
    );
}

#[test]
fn a_followed_run_refuses_what_is_no_step() {
    let cases = [
        (
            vec![prompt(0), prompt(0)],
            ":2: prompt_id a/0 occurs again and would get the same samples; order the prompts so",
        ),
        (vec![prompt(0)], "the prompts ended after 1 of the 2 that a step takes"),
    ];
    for (prompts, message) in cases {
        let (_dir, run) = start_run(&prompts);
        let done = following(&run).output().unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert_eq!((done.status.code(), done.stdout.len()), (Some(3), 0), "{said}");
        assert!(said.contains(message), "{said}");
    }
    let (_dir, run) = start_run(&[prompt(0), prompt(1)]);
    fs::create_dir(run.checkpoint(2)).unwrap();
    copy_model(&run.checkpoint(2));
    state(2).save(&run.checkpoint(2)).unwrap();
    run.point_policy_at(2).unwrap();
    let done = following(&run).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.contains(": 2 prompts, but the policy was trained on 4 of them already"), "{said}");

    for wrong in
        [&["--on-long-prompt", "skip"][..], &["--model", "x"], &["-o", "x"], &["--text"], &["--max-staleness", "101"]]
    {
        let done = following(&run).args(wrong).output().unwrap();
        assert_eq!(done.status.code(), Some(2), "{wrong:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    for option in ["--groups-per-step", "--max-staleness"] {
        assert_eq!(rollout(&[option, "2"], "").code, Some(2), "{option}");
    }
}

#[test]
fn a_group_leaves_as_soon_as_it_is_whole() {
    let model = directory().join("tiny-qwen2");
    let mut command = std::process::Command::new(ROLLOUT);
    command.args(arguments(model.to_str().unwrap(), &[])).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let (mut stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut stdout = BufReader::new(stdout).lines();
    for i in 0..3 {
        stdin.write_all(lines(&[prompt(i)]).as_bytes()).unwrap();
        let rollout: Value = serde_json::from_str(&stdout.next().unwrap().unwrap()).unwrap();
        assert_eq!(rollout["prompt_id"], format!("a/{i}"));
    }
    drop(stdin);
    assert!(stdout.next().is_none());
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_ends_that_every_filter_shares() {
    let model = directory().join("tiny-qwen2");
    let arguments = arguments(model.to_str().unwrap(), &[]);
    let input = lines(&(0..5).map(prompt).collect::<Vec<_>>());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let done = run_into(ROLLOUT, &arguments, &input, writer.into());
    assert_eq!((done.code, done.said()), (Some(0), ""), "a closed pipe");

    if let Ok(full) = OpenOptions::new().write(true).open("/dev/full") {
        let done = run_into(ROLLOUT, &arguments, &input, full.into());
        assert_eq!((done.code, done.stderr.lines().count()), (Some(1), 2), "a full disk: {}", done.stderr);
    }

    let done = run(ROLLOUT, &[&arguments[..], &["no/such/file.jsonl"]].concat(), "");
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.contains("no/such/file.jsonl: "), "{}", done.stderr);

    let done = run(ROLLOUT, &["--model", "no/such/model/directory"], &input);
    assert_eq!(done.code, Some(1), "{}", done.stderr);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out.jsonl");
    let done = run(ROLLOUT, &[&arguments[..], &["-o", file.to_str().unwrap()]].concat(), &input);
    assert_eq!((done.code, done.stdout.as_str()), (Some(0), ""));
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 5);
}
