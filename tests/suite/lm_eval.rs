//! The prompts and judgements of lm-evaluation-harness, as `tests/fixtures/make_lm_eval_reference.py` has them from the harness itself.

use std::fs;

use clap::ValueEnum;
use grpo_pipes::reward::lm_eval::{LmEvalTask, is_exact_match};
use serde_json::{Value, json};

use crate::process::run;

const PREP: &str = env!("CARGO_BIN_EXE_gsm8k-prep");
const EVALUATE: &str = env!("CARGO_BIN_EXE_evaluate");
const TASKS: [&str; 2] = ["gsm8k", "gsm8k_cot"];

fn reference() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/lm_eval_reference.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

fn records(args: &[&str]) -> Vec<Value> {
    let done = run(PREP, args, "");
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    done.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn questions_are_asked_byte_for_byte_as_the_harness_asks_them() {
    for set in list(&reference()["sets"]) {
        let folder = tempfile::tempdir().unwrap();
        for split in ["train", "test"] {
            fs::write(folder.path().join(format!("{split}.jsonl")), lines(list(&set[split]))).unwrap();
        }
        let dir = folder.path().to_str().unwrap();
        for task in TASKS {
            let expected = list(&set["prompts"][task]);
            let got = records(&[dir, "--lm-eval", task]);
            let prompts: Vec<&Value> = got.iter().map(|record| &record["prompt"]).collect();
            assert_eq!(prompts, expected.iter().collect::<Vec<_>>(), "{task}");
            assert_eq!(got[0]["prompt_id"], "gsm8k/test/0");
            // A question has the same examples wherever it stands.
            let got = records(&[dir, "--lm-eval", task, "--shuffle", "--limit", "2", "--seed", "3"]);
            assert_eq!(got.len(), 2);
            for record in got {
                let index: usize = text(&record["prompt_id"]).rsplit('/').next().unwrap().parse().unwrap();
                assert_eq!(record["prompt"], expected[index], "{task}");
            }
        }
    }
}

#[test]
fn completions_are_read_and_matched_as_the_harness_does() {
    let reference = reference();
    let judged = list(&reference["judged"]);
    assert!(judged.len() > 100);
    for name in TASKS {
        let task = LmEvalTask::from_str(name, false).unwrap();
        let mut right = [0, 0];
        for one in judged {
            let (completion, answer) = (text(&one["completion"]), text(&one["answer"]));
            let read = task.read(completion);
            assert_eq!(json!([read.strict, read.flexible]), one[name]["extracted"], "{name} {completion:?}");
            for (at, found) in [read.strict, read.flexible].into_iter().enumerate() {
                let matches = is_exact_match(found, answer);
                assert_eq!(matches, one[name]["matches"][at], "{name} {completion:?} {answer:?}");
                right[at] += usize::from(matches);
            }
        }
        assert!(right.iter().all(|right| *right > 4), "{right:?}");

        let record = |(at, one): (usize, &Value)| json!({"prompt_id": at, "completion": one["completion"], "answer": one["answer"]});
        let rollouts: Vec<Value> = judged.iter().enumerate().map(record).collect();
        let done = run(EVALUATE, &["--lm-eval", name, "--json"], &lines(&rollouts));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let summary: Value = serde_json::from_str(&done.stdout).unwrap();
        for (at, kind) in ["accuracy_strict", "accuracy_flexible"].into_iter().enumerate() {
            assert_eq!(summary[kind]["value"], right[at] as f64 / judged.len() as f64, "{name} {kind}");
        }
    }
}

#[test]
fn what_a_stop_sequence_ends_is_not_truncated_and_votes_by_its_strict_answer() {
    let completions = ["#### 5\n\nQuestion: 7", "#### 7 or so", "#### 5"];
    let record = |completion: &&str| json!({"group_id": "a", "completion": completion, "answer": "5", "finish_reason": "length"});
    let rollouts: Vec<Value> = completions.iter().map(record).collect();
    let done = run(EVALUATE, &["--lm-eval", "gsm8k", "--json"], &lines(&rollouts));
    let summary: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(summary["truncation_rate"]["value"], 2.0 / 3.0);
    assert_eq!(summary["maj_at_k"], json!({"1": 1.0, "2": 1.0}));
    assert_eq!((&summary["format_rate"], &summary["reward"]), (&Value::Null, &Value::Null));
    let baseline = tempfile::NamedTempFile::new().unwrap();
    fs::write(baseline.path(), lines(&[json!({"group_id": "b", "prompt_id": "p", "completion": "5", "answer": "5"})]))
        .unwrap();
    let one = lines(&[json!({"prompt_id": "p", "completion": "#### 5", "answer": "5"})]);
    let args = ["--lm-eval", "gsm8k", "--json", "--baseline", baseline.path().to_str().unwrap()];
    let paired: Value = serde_json::from_str(&run(EVALUATE, &args, &one).stdout).unwrap();
    assert_eq!((&paired["paired"]["better"], &paired["paired"]["worse"]), (&json!(1), &json!(0)));
}

#[test]
fn examples_need_a_train_split_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let row = json!({"question": "?", "answer": "#### 1"});
    fs::write(path("test.jsonl"), lines(std::slice::from_ref(&row))).unwrap();
    fs::write(path("train.jsonl"), lines(&vec![row; 4])).unwrap();
    let refused = |args: &[&str], what: &str| {
        let done = run(PREP, args, "");
        assert_eq!((done.code, &*done.stdout), (Some(2), ""), "{}", done.stderr);
        assert!(done.stderr.contains(what), "{}", done.stderr);
    };
    let dir = path("");
    refused(&[&path("test.jsonl"), "--lm-eval", "gsm8k"], "give a directory or data set with both splits, and not ");
    refused(&[&dir, "--lm-eval", "gsm8k"], "gsm8k takes five examples, and the train split has 4");
    refused(&[&dir, "--lm-eval", "gsm8k", "--split", "train"], "cannot be used with");
    assert_eq!(records(&[&path("test.jsonl"), "--lm-eval", "gsm8k_cot"]).len(), 1, "its examples are its own");
}
