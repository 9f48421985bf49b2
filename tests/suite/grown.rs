//! `rollout --jsonl`: a file that grows, and goes on where it was killed.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::fixtures::directory;
use crate::process::{Finished, lines, run};

const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");

fn prompts(range: std::ops::Range<usize>) -> String {
    lines(&range.map(|i| json!({"prompt_id": format!("a/{i}"), "prompt": format!("{i} + 2?")})).collect::<Vec<_>>())
}

fn arguments<'a>(model: &'a str, file: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["--model", model, "--max-completion-tokens", "8", "--device", "cpu", "-n", "3", "--jsonl", file], more].concat()
}

fn rollout(file: &str, more: &[&str], input: &str) -> Finished {
    let model = directory().join("tiny-qwen2");
    run(ROLLOUT, &arguments(model.to_str().unwrap(), file, more), input)
}

#[test]
fn a_file_cut_anywhere_becomes_whole_and_what_it_has_is_not_sampled_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.jsonl");
    let file = path.to_str().unwrap();
    let done = rollout(file, &[], &prompts(0..6));
    assert_eq!((done.code, done.stdout.as_str()), (Some(0), ""), "{}", done.stderr);
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.iter().filter(|&&byte| byte == b'\n').count(), 18);
    let third = whole.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(9).unwrap().0;
    // Between groups, within a group between its lines, within a line, before any.
    for cut in [whole.len(), third + 1, third, third - 20, 30, 0] {
        fs::write(&path, &whole[..cut]).unwrap();
        let done = rollout(file, &[], &prompts(0..6));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        assert!(fs::read(&path).unwrap() == whole, "cut at {cut}");
        let groups = whole[..cut].iter().filter(|&&byte| byte == b'\n').count() / 3;
        assert!(done.stderr.contains(&format!("rollout: {} sequences, ", 3 * (6 - groups))), "{}", done.stderr);
    }
    let more = rollout(file, &[], &prompts(4..8));
    assert!(more.stderr.contains("rollout: 6 sequences, "), "{}", more.stderr);
    assert!(fs::read(&path).unwrap().starts_with(&whole));
}

#[test]
fn a_killed_process_leaves_what_it_had_complete() {
    let dir = tempfile::tempdir().unwrap();
    let (path, input) = (dir.path().join("all.jsonl"), dir.path().join("prompts.jsonl"));
    fs::write(&input, prompts(0..3000)).unwrap();
    let (file, model) = (path.to_str().unwrap(), directory().join("tiny-qwen2"));
    let more = [input.to_str().unwrap(), "--max-sequences", "2"];
    let mut command = Command::new(ROLLOUT);
    command.args(arguments(model.to_str().unwrap(), file, &more)).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    while fs::metadata(&path).map_or(0, |found| found.len()) < 20_000 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let busy = rollout(file, &[], &prompts(0..1));
    assert_eq!(busy.code, Some(2), "{}", busy.stderr);
    assert_eq!(busy.said(), format!("rollout: --jsonl {file}: another process is writing it\n"));
    child.kill().unwrap();
    child.wait().unwrap();
    let left = fs::read(&path).unwrap();
    assert_eq!(rollout(file, &[], &prompts(0..60)).code, Some(0));
    let grown = fs::read_to_string(&path).unwrap();
    let end = left.iter().rposition(|&byte| byte == b'\n').unwrap();
    assert!(grown.len() >= end && grown.lines().count() % 3 == 0);
    fs::remove_file(&path).unwrap();
    assert_eq!(rollout(file, &[], &prompts(0..3000)).code, Some(0));
    assert!(fs::read_to_string(&path).unwrap().starts_with(&grown[..end.min(grown.len())]));
}

#[test]
fn records_of_another_kind_are_refused_and_the_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.jsonl");
    let file = path.to_str().unwrap();
    assert_eq!(rollout(file, &[], &prompts(0..2)).code, Some(0));
    let whole = fs::read(&path).unwrap();
    let other = prompts(0..2).replace("0 + 2", "5 + 2");
    let zst = format!("{file}.zst");
    let llama = directory().join("tiny-llama").display().to_string();
    let cases = [
        (file, vec!["--seed", "1"], prompts(0..2), 2, "its records were sampled with --seed 0; take another file"),
        (file, vec!["--temperature", "0.5"], prompts(0..2), 2, "were sampled with --temperature 1; take another"),
        (file, vec!["--model", &llama], prompts(0..2), 2, "were sampled from other weights; take another file"),
        (file, vec![], other, 3, "has completions of another prompt a/0"),
        (&zst, vec![], prompts(0..2), 2, "a file that grows is not compressed"),
    ];
    for (file, more, input, code, message) in cases {
        let refused = match more.first() {
            Some(&"--model") => run(ROLLOUT, &arguments(more[1], file, &[]), &input),
            _ => rollout(file, &more, &input),
        };
        assert_eq!(refused.code, Some(code), "{}", refused.stderr);
        assert!(refused.stderr.contains(message), "{message}: {}", refused.stderr);
        assert!(fs::read(&path).unwrap() == whole);
    }
    let lines: Vec<&str> = std::str::from_utf8(&whole).unwrap().lines().collect();
    fs::write(&path, format!("{}\n", [&lines[..2], &lines[3..]].concat().join("\n"))).unwrap();
    let refused = rollout(file, &[], &prompts(0..2));
    assert_eq!(refused.code, Some(3));
    assert!(refused.stderr.contains("all.jsonl:3: group 0:a/0 before it is not complete"), "{}", refused.stderr);

    // A file that was joined from two has both origins.
    let joined = [&whole[..], String::from_utf8_lossy(&whole).replace("\"seed\":0", "\"seed\":7").as_bytes()].concat();
    fs::write(&path, &joined).unwrap();
    let refused = rollout(file, &[], &prompts(0..2));
    assert!(refused.stderr.contains("were sampled with --seed 7; take another file"), "{}", refused.stderr);
    assert!(fs::read(&path).unwrap() == joined);
}

#[test]
fn a_file_of_another_kind_without_a_line_end_is_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes");
    for (text, what) in [
        ("what I learned", "not a file of rollouts; take another file"),
        (r#"{"model_type":"qwen2"}"#, "group_id"),
        ("[1, 2]", "not a file of rollouts; take another file"),
    ] {
        fs::write(&path, text).unwrap();
        let refused = rollout(path.to_str().unwrap(), &[], &prompts(0..2));
        assert_eq!(refused.code, Some(3), "{}", refused.stderr);
        assert!(refused.stderr.contains("notes:1: ") && refused.stderr.contains(what), "{}", refused.stderr);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}
