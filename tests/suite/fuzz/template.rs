//! Chat templates and tokenizers are programs of whoever made the model: they make text of messages and tokens of text, and come to an
//! end.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use grpo_pipes::checkpoint;
use serde_json::{Value, json};

use crate::fixtures::directory;

const QUESTION: &str = "1 + 2?";

/// What `rollout` and `grpo-step --supervised` say of a question to a model whose directory is changed: the last line of each, with
/// the code.
fn said_of(question: &str, change: impl Fn(&Path)) -> [(Option<i32>, String); 2] {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let tiny = directory().join("tiny-qwen2");
    checkpoint::copy_companions(&tiny, &model, "float32").unwrap();
    fs::copy(tiny.join(checkpoint::WEIGHTS), model.join(checkpoint::WEIGHTS)).unwrap();
    change(&model);
    let record = json!({"prompt_id": "a", "prompt": [{"role": "user", "content": question}], "completion": "3"});
    let input = dir.path().join("input.jsonl");
    fs::write(&input, format!("{record}\n")).unwrap();
    let run = |program: &str, args: &[&str]| {
        let began = Instant::now();
        let mut command = Command::new("bash");
        command.args(["-c", "ulimit -c 0 -v 2000000; exec \"$@\"", "bounded", program]).args(args).arg(&input);
        let done = command.current_dir(dir.path()).stdin(Stdio::null()).output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        assert!(!Path::new(&dir.path().join("next")).exists() && done.stdout.is_empty());
        let said = String::from_utf8(done.stderr).unwrap();
        (done.status.code(), said.lines().next_back().unwrap().to_owned())
    };
    [
        run(env!("CARGO_BIN_EXE_rollout"), &["--model", "model", "--device", "cpu"]),
        run(
            env!("CARGO_BIN_EXE_grpo-step"),
            &["--supervised", "--policy", "model", "--out", "next", "--device", "cpu"],
        ),
    ]
}

fn assert_refused(case: &str, said: [(Option<i32>, String); 2], reasons: [&str; 2]) {
    for (code, said) in said {
        assert_eq!(code, Some(3), "{case}: {said}");
        assert!(said.contains("input.jsonl:1: "), "{case}: {said}");
        assert!(reasons.iter().all(|reason| said.contains(reason)), "{case}: {said}");
    }
}

#[test]
fn a_template_that_does_not_end_or_asks_for_more_than_messages_is_refused_in_one_line() {
    let long = "{% for i in range(99999) %}".repeat(3) + "x" + &"{% endfor %}".repeat(3);
    let cases = [
        (long.as_str(), "fuel"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(99999999999) }}", "range"),
        ("{% include '/etc/passwd' %}", "/etc/passwd"),
        ("{% import 'x' as x %}", "x"),
        ("{{ messages.__class__.__mro__ }}", "undefined"),
        ("{{ open('/etc/passwd') }}", "open"),
    ];
    for (template, reason) in cases {
        let said = said_of(QUESTION, |model| fs::write(model.join("chat_template.jinja"), template).unwrap());
        assert_refused(template, said, ["chat template: ", reason]);
    }
}

#[test]
fn what_wants_excessive_memory_for_a_prompt_is_refused_in_one_line() {
    let reasons = ["chat template or tokenizer", "more than 512 MiB"];
    let doubling =
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}";
    let said = said_of(QUESTION, |model| fs::write(model.join("chat_template.jinja"), doubling).unwrap());
    assert_refused("a template that doubles a text", said, reasons);
    let said = said_of(QUESTION, |model| {
        let path = model.join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let double = json!({"type": "Replace", "pattern": {"String": "1"}, "content": "11"});
        tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": vec![double; 60]});
        fs::write(&path, tokenizer.to_string()).unwrap();
    });
    assert_refused("a tokenizer that doubles a text", said, reasons);
    let said = said_of(&QUESTION.repeat(4 << 20), |_| {});
    assert_refused("a prompt of 24 MB", said, reasons);
}
