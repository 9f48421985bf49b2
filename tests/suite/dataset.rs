//! `export-hf` on rollouts, and `make data`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::fixtures::directory;
use crate::process::{lines, run};
use crate::runs::{Root, text};

const EXPORT: &str = env!("CARGO_BIN_EXE_export-hf");

fn rollout(i: usize, completion: &str, more: Value) -> Value {
    let prompt =
        json!([{ "role": "system", "content": "Think." }, { "role": "user", "content": format!("What is {i} + 2?") }]);
    let mut record = json!({ "prompt_id": format!("a/{i}"), "prompt": prompt, "policy_id": "p", "seed": 1, "temperature": 1.0,
                             "finish_reason": "stop", "completion": completion, "rewards": { "correctness": 2.0, "int": 0.5 },
                             "reward": 2.5 });
    record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    record
}

fn rows(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn right_completions_become_rows_in_both_forms_and_no_two_are_alike() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("set");
    let words = "Seven and two are nine because two more than seven is nine";
    let records = [
        rollout(7, words, json!({})),
        rollout(7, &words.to_uppercase().replace(' ', "\n"), json!({})),
        rollout(7, "Nine comes two after seven.", json!({})),
        rollout(7, "Seven and two are ten.", json!({ "rewards": { "correctness": 0.0 }, "reward": 0.5 })),
        rollout(7, "Nine, as one counts on and on", json!({ "finish_reason": "length" })),
        rollout(8, "Ten.", json!({ "rewards": { "correctness": null }, "reward": null })),
        rollout(9, "Eleven it is.", json!({ "rewards": { "math": 1.0 }, "reward": 1.0 })),
    ];
    for _ in 0..2 {
        let done = run(EXPORT, &["-", out.to_str().unwrap()], &lines(&records));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let said = [
            "export-hf: 7 completions of 3 questions, 5 right, 1 without a reward",
            "export-hf: left out: 1 truncated, 1 much like another",
            &format!("export-hf: {}: 3 completions of 2 questions", out.display()),
        ];
        assert_eq!(done.stderr.lines().collect::<Vec<_>>(), said);
    }
    let messages = rows(&out.join("messages.jsonl"));
    let answers: Vec<_> = messages.iter().map(|row| row["messages"][2]["content"].as_str().unwrap()).collect();
    assert_eq!(answers, [words, "Nine comes two after seven.", "Eleven it is."]);
    let first = json!([
        { "role": "system", "content": "Think." },
        { "role": "user", "content": "What is 7 + 2?" },
        { "role": "assistant", "content": words },
    ]);
    assert_eq!(messages[0], json!({ "prompt_id": "a/7", "messages": first }));
    let turns = json!([
        { "from": "system", "value": "Think." },
        { "from": "human", "value": "What is 7 + 2?" },
        { "from": "gpt", "value": words },
    ]);
    let share_gpt = rows(&out.join("sharegpt.jsonl"));
    assert_eq!((share_gpt.len(), &share_gpt[0]), (3, &json!({ "id": "a/7", "conversations": turns })));
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\n") && card.contains("data_files: messages.jsonl"), "{card}");
    assert!(
        card.contains("| **kept, for 2 questions** | **3** |")
            && card.contains("* weights `p`, seed 1, temperature 1.0\n"),
        "{card}"
    );
    // The rows are prompts again for whoever samples more.
    let again = run(env!("CARGO_BIN_EXE_score"), &[out.join("messages.jsonl").to_str().unwrap()], "");
    assert_eq!(again.code, Some(3), "a row has no completion to score: {}", again.stderr);
}

#[test]
fn rollouts_without_rewards_or_answers_are_refused_and_nothing_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().to_str().unwrap();
    let good = rollout(7, "Nine.", json!({}));
    assert_eq!(run(EXPORT, &["-", out], &lines(std::slice::from_ref(&good))).code, Some(0));
    let before = fs::read(dir.path().join("messages.jsonl")).unwrap();
    let mut bare = good.clone();
    bare.as_object_mut().unwrap().retain(|name, _| !name.starts_with("reward"));
    let unanswered = rollout(8, "Ten.", json!({ "rewards": { "correctness": null }, "reward": null }));
    let cases = [
        (lines(&[good, bare]), "export-hf: -:2: no field \"rewards\" or \"reward\"; `score` adds them\n"),
        (
            lines(&[unanswered]),
            "export-hf: -: no completion has a reward; `score` gives them to prompts that have an \"answer\"\n",
        ),
    ];
    for (input, message) in cases {
        let refused = run(EXPORT, &["-", out], &input);
        assert_eq!((refused.code, refused.stderr.as_str()), (Some(3), message));
        assert_eq!(fs::read(dir.path().join("messages.jsonl")).unwrap(), before);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing half-written is left");
    }
    let refused = run(EXPORT, &["-", out, "--zip"], "");
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
}

#[test]
fn make_data_goes_on_where_it_was_killed() {
    let root = Root::new(&[]);
    let rows: Vec<Value> =
        (0..4).map(|i| json!({ "question": format!("{i} + 2?"), "answer": format!("#### {}", i + 2) })).collect();
    fs::write(root.path("asked.jsonl"), lines(&rows)).unwrap();
    let model = directory().join("tiny-qwen2").display().to_string();
    let data = || {
        let done =
            root.script("data.sh", &[("QUESTIONS", "asked.jsonl"), ("MODEL", &model), ("N", "3")]).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stderr)
    };
    let said = data();
    assert!(said.contains("export-hf: 12 completions of 4 questions, 0 right, 0 without a reward\n"), "{said}");
    let made = root.path("runs/data/asked");
    let whole = fs::read(made.join("rollouts.jsonl")).unwrap();
    fs::write(made.join("rollouts.jsonl"), &whole[..whole.len() / 2]).unwrap();
    let said = data();
    assert!(said.contains("rollout: 6 sequences, ") || said.contains("rollout: 9 sequences, "), "{said}");
    assert!(fs::read(made.join("rollouts.jsonl")).unwrap() == whole);
    assert!(made.join("README.md").is_file() && made.join("sharegpt.jsonl").is_file());
    let refused = root.script("data.sh", &[("QUESTIONS", "asked.jsonl")]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
}
