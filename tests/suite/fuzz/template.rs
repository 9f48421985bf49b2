//! Chat templates are programs of whoever made the model: they read messages and make text, and come to an end.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use grpo_pipes::policy;

use crate::fixtures::directory;

/// What `rollout` and `grpo-step --supervised` say of a model with this template: the last line of each, with the code.
fn said_of(template: &str) -> [(Option<i32>, String); 2] {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let tiny = directory().join("tiny-qwen2");
    policy::copy_companions(&tiny, &model, "float32").unwrap();
    fs::copy(tiny.join(policy::WEIGHTS), model.join(policy::WEIGHTS)).unwrap();
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    let record = r#"{"prompt_id":"a","prompt":[{"role":"user","content":"1 + 2?"}],"completion":"3"}"#;
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
        for (code, said) in said_of(template) {
            assert_eq!(code, Some(3), "{template}: {said}");
            assert!(said.contains("input.jsonl:1: ") && said.contains("chat template: "), "{template}: {said}");
            assert!(said.contains(reason), "{template}: {said}");
        }
    }
}
