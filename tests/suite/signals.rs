//! SIGINT, SIGTERM, and stages that die: what was finished is kept, nobody is left, and the run goes on to the same bytes.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use grpo_pipes::run::{Lock, Role, Run};
use serde_json::{Value, json};

use crate::fixtures::directory;
use crate::process::lines;
use crate::runs::{Root, Started, news, send, text};

/// From a stage's end to that of the last one; the promise is 2 s, on a machine that does nothing else.
const SOON: Duration = Duration::from_secs(5);

/// To whom a signal goes.
enum To {
    Script,
    Stage(&'static str),
    All,
}

impl To {
    fn send(&self, signal: &str, run: &Started) {
        match self {
            Self::Script => send(signal, &run.child.id().to_string()),
            Self::Stage(name) => assert!(run.signal_one(signal, name)),
            Self::All => {
                let ids: Vec<_> = run.processes().into_iter().map(|(id, _)| id).collect();
                send(signal, &ids.join(" "));
            }
        }
    }
}

#[test]
fn a_signal_ends_a_run_at_the_step_it_reached_and_it_goes_on_from_there() {
    let [whole, ahead] = ["0", "2"].map(|ahead| {
        let whole = Root::new(&[("STEPS", "100"), ("SAVE_EVERY", "90"), ("MAX_STALENESS", ahead)]);
        whole.train_whole();
        whole
    });
    let cases = [
        (&whole, "INT", To::Script, 130),
        (&whole, "TERM", To::Script, 143),
        (&whole, "INT", To::All, 130),
        (&whole, "TERM", To::All, 143),
        (&whole, "TERM", To::Stage("grpo-step"), 143),
        (&whole, "INT", To::Stage("rollout"), 130),
        (&ahead, "INT", To::Script, 130),
    ];
    for (whole, signal, to, code) in cases {
        let root = whole.back_to_the_start();
        let mut run = root.start();
        run.wait_for(&root.run("rollouts/step_000003.jsonl.zst"));
        to.send(signal, &run);
        let began = Instant::now();
        let id = run.child.id();
        let (ended, said) = run.end_of_it();
        assert_eq!(ended, Some(code), "{signal} {said}");
        assert!(began.elapsed() < SOON, "{signal}: {:?}", began.elapsed());
        assert_eq!(Started::left_of(id), [], "{signal}");
        let reached = fs::read_link(root.run("policy")).unwrap();
        let step: u64 = reached.to_str().unwrap().rsplit('_').next().unwrap().parse().unwrap();
        assert!((3..100).contains(&step), "{signal}: no checkpoint of the step reached: {step}");
        let want =
            format!("runs/run was ended by signal {} at step {step}; the same command goes on from there", code - 128);
        assert_eq!(news(&said), [want], "{signal}");
        assert!(!root.run("live").exists());
        root.train_whole();
        root.assert_same_files(whole);
    }
}

#[test]
fn a_signal_before_the_training_ends_the_run_too() {
    let root = Root::new(&[("SUPERVISED_STEPS", "20000")]);
    let mut run = root.start();
    run.wait_for(&root.run("supervised.jsonl"));
    send("TERM", &run.child.id().to_string());
    let began = Instant::now();
    let id = run.child.id();
    let (ended, said) = run.end_of_it();
    assert_eq!(ended, Some(143), "{said}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(
        said.lines().last(),
        Some("runs/run was ended by signal 15 at step 0; the same command goes on from there")
    );
    assert_eq!(Started::left_of(id), []);
}

/// Of the user's stage nothing can be asked but that it reads and writes, some time.
#[test]
fn a_stage_that_is_far_from_noticing_is_ended_too() {
    let root = Root::new(&[("SCORER", "bash ./scorer.sh")]);
    fs::write(root.path("scorer.sh"), "sleep 100; score\n").unwrap();
    let mut run = root.start();
    run.wait_for(&root.run("live"));
    run.wait_for(&root.run(".scorer"));
    std::thread::sleep(Duration::from_millis(300));
    assert!(run.signal_one("KILL", "rollout"));
    let began = Instant::now();
    let id = run.child.id();
    let (ended, said) = run.end_of_it();
    assert_eq!(ended, Some(1));
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert!(said.contains("rollout was killed by signal 9"), "{said}");
    assert_eq!(Started::left_of(id), []);
}

fn prompts(count: usize) -> String {
    let prompt = |i| json!({"prompt_id": format!("a/{i}"), "prompt": [{"role": "user", "content": "one two three"}]});
    lines(&(0..count).map(prompt).collect::<Vec<_>>())
}

fn sampling(tokens: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rollout"));
    command.arg("--model").arg(directory().join("tiny-qwen2")).args(["-n", "3", "--max-completion-tokens", tokens]);
    command.args(["--max-sequences", "6"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn rollout_writes_the_groups_that_are_whole_and_ends() {
    // One that waits for more prompts, and one that has enough of them.
    for (count, code, signal) in [(2, 130, "INT"), (100_000, 143, "TERM")] {
        let mut child = sampling("16");
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || {
            let _ = stdin.write_all(prompts(count).as_bytes());
            stdin
        });
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut written = String::new();
        for _ in 0..6 {
            stdout.read_line(&mut written).unwrap();
        }
        send(signal, &child.id().to_string());
        stdout.read_to_string(&mut written).unwrap();
        let done = child.wait_with_output().unwrap();
        assert_eq!(done.status.code(), Some(code));
        assert_eq!(news(&text(&done.stderr)), [""; 0], "the code says it");
        let records: Vec<Value> = written.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(records.len() % 3, 0);
        assert!(written.ends_with('\n') && records.len() < 3 * count.max(3));
        drop(writer.join());
    }
}

/// A run, and records of steps of one group each: its prompt, its size, and the tokens of each completion. 120 of 500 take very
/// long to train on.
pub fn long_step(dir: &Path, steps: &[(usize, usize, usize)]) -> (Run, String) {
    let (run, tiny) = (Run::new(dir), directory().join("tiny-qwen2"));
    let model = dir.join("model");
    fs::create_dir_all(dir.join("checkpoints")).unwrap();
    fs::create_dir(&model).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(tiny.join("config.json")).unwrap()).unwrap();
    for (name, number) in [("hidden_size", 256), ("intermediate_size", 1024), ("num_hidden_layers", 8)] {
        config[name] = number.into();
    }
    config["max_position_embeddings"] = 600.into();
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_grpo-step"))
        .args(["--init", "--seed", "1", "--weights-only", "--policy"])
        .arg(&model)
        .arg("--out")
        .arg(run.checkpoint(0))
        .stdin(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    run.point_policy_at(0).unwrap();
    fs::write(run.prompts(), prompts(steps.len() + 1)).unwrap();
    let policy_id = grpo_pipes::checkpoint::identity(&run.checkpoint(0)).unwrap().policy_id;
    let records = steps.iter().flat_map(|&(prompt, size, tokens)| {
        let record = {
            let policy_id = policy_id.clone();
            move |sample: usize| {
                json!({"prompt_id": format!("a/{prompt}"), "group_id": format!("g{prompt}"), "group_size": size,
                   "sample_index": sample, "policy_id": policy_id, "policy_step": 0, "prompt_token_ids": [1, 2],
                   "completion_token_ids": vec![3; tokens], "logprobs": vec![-1.0; tokens], "reward": sample % 2})
            }
        };
        (0..size).map(record)
    });
    (run, lines(&records.collect::<Vec<_>>()))
}

#[test]
fn a_long_step_is_dropped_and_the_one_before_it_kept() {
    for (signal, code) in [(None, 5), (Some("TERM"), 143)] {
        let dir = tempfile::tempdir().unwrap();
        let (run, records) = long_step(dir.path(), &[(0, 2, 4), (1, 120, 500)]);
        let sampler = Lock::take(&run, Role::Sample).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_grpo-step"));
        command.arg("--follow").arg(dir.path()).args(["--groups-per-step", "1", "--save-every", "100"]);
        command.args(["--max-staleness", "1", "--logprob-band", "1e9", "--loss", "grpo"]);
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(records.as_bytes()).unwrap();
        let began = Instant::now();
        while !run.live(1).exists() {
            assert!(began.elapsed() < 20 * SOON && child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(1500)); // well into the second step
        match signal {
            Some(signal) => send(signal, &child.id().to_string()),
            None => drop(sampler),
        }
        let ended = Instant::now();
        let done = child.wait_with_output().unwrap();
        assert!(ended.elapsed() < SOON, "{:?}", ended.elapsed());
        assert_eq!(done.status.code(), Some(code));
        assert_eq!(news(&text(&done.stderr)), [""; 0], "the code says it");
        assert_eq!(run.policy().unwrap(), run.checkpoint(1));
        assert_eq!(fs::read_to_string(run.metrics()).unwrap().lines().count(), 1);
        assert!(!run.rollouts(2).exists());
    }
}
