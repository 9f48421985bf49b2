//! Data as people have it: the forms of TRL, verl, OpenAI, ShareGPT and Alpaca files, and files as editors and tools leave them.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures::directory;
use crate::process::{Finished, lines, run};

const PREP: &str = env!("CARGO_BIN_EXE_gsm8k-prep");
const ROLLOUT: &str = env!("CARGO_BIN_EXE_rollout");
const SCORE: &str = env!("CARGO_BIN_EXE_score");
const EVALUATE: &str = env!("CARGO_BIN_EXE_evaluate");
const STEP: &str = env!("CARGO_BIN_EXE_grpo-step");

fn model() -> String {
    directory().join("tiny-qwen2").display().to_string()
}

fn sampled(more: &[&str], input: &str) -> Finished {
    let model = model();
    run(ROLLOUT, &[&["--model", &model, "--max-completion-tokens", "6"], more].concat(), input)
}

/// A file of the material for CI, where it is there.
fn case(name: &str) -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/cases").join(name);
    let found = fs::read_to_string(&path);
    found.inspect_err(|err| eprintln!("skipped: {}: {err}", path.display())).ok()
}

fn file(dir: &TempDir, name: &str, bytes: &[u8]) -> String {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

#[test]
fn prompts_come_as_messages_as_text_and_as_conversations() {
    let question = "2 + 3?";
    let user = json!([{"role": "user", "content": question}]);
    let forms = [
        json!({"prompt": user, "answer": "5"}),
        json!({"prompt": question, "answer": "5"}),
        json!({"id": 7, "messages": [{"role": "user", "content": [{"type": "text", "text": question}]}]}),
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "5"}]}),
        json!({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "5"}]}),
    ];
    let done = sampled(&["-n", "2"], &lines(&forms));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let records = done.records();
    assert_eq!(records.len(), 10);
    let first = records[0]["prompt_id"].as_str().unwrap();
    for (at, pair) in records.chunks(2).enumerate() {
        let id = if at == 0 { first.to_owned() } else { format!("{first}-{}", at + 1) };
        for record in pair {
            assert_eq!((&record["prompt"], &record["prompt_id"]), (&user, &json!(id)));
            assert_eq!(record["prompt_token_ids"], records[0]["prompt_token_ids"]);
            assert_eq!(record["group_id"], format!("0:{id}"));
        }
        assert_eq!(pair[0].get("id"), forms[at].get("id"));
    }
    let samples = |at: usize| (&records[2 * at]["completion_token_ids"], &records[2 * at + 1]["completion_token_ids"]);
    assert!((1..5).any(|at| samples(at) != samples(0)), "equal prompts, equal samples");
    assert_eq!(done.stderr.matches("the assistant's last message is left off").count(), 1, "{}", done.stderr);
    assert_eq!(sampled(&["-n", "2"], &lines(&forms)).stdout, done.stdout);
}

#[test]
fn the_cases_of_prompts_give_rollouts() {
    for (name, count) in
        [("trl-conversational.jsonl", 2), ("trl-standard-repeated.jsonl", 4), ("messages-parts.jsonl", 2)]
    {
        let Some(input) = case(name) else { return };
        let done = sampled(&["-n", "2"], &input);
        assert_eq!((done.code, done.records().len()), (Some(0), count), "{name}: {}", done.stderr);
    }
}

#[test]
fn the_cases_of_rows_give_prompts() {
    for (name, answers) in [("bom-crlf-blank.jsonl", &["7", "1,200"][..]), ("problem-boxed.jsonl", &["5"])] {
        let Some(input) = case(name) else { return };
        let done = run(PREP, &["-"], &input);
        assert_eq!(done.code, Some(0), "{name}: {}", done.stderr);
        let found: Vec<Value> = done.records().into_iter().map(|record| record["answer"].clone()).collect();
        assert_eq!(found, answers, "{name}");
    }
}

#[test]
fn a_model_without_a_chat_template_takes_raw_prompts_or_a_template() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"] {
        fs::copy(Path::new(&model()).join(name), dir.path().join(name)).unwrap();
    }
    let base = dir.path().display().to_string();
    let rollout = |more: &[&str], input: &Value| {
        let arguments = [&["--model", &base, "--max-completion-tokens", "4"], more].concat();
        run(ROLLOUT, &arguments, &lines(std::slice::from_ref(input)))
    };
    let text = json!({"prompt": "2 + 3 = "});
    let refused = rollout(&[], &text);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("--raw (no template) or --chat-template FILE"), "{}", refused.stderr);

    let raw = rollout(&["--raw"], &text);
    assert_eq!(raw.code, Some(0), "{}", raw.stderr);
    assert_eq!(raw.records()[0]["prompt"], "2 + 3 = ");
    let chat = rollout(&["--raw"], &json!({"prompt": [{"role": "user", "content": "Q"}]}));
    assert_eq!(chat.code, Some(3));
    assert!(chat.stderr.contains("--raw takes a \"prompt\" that is a text"), "{}", chat.stderr);

    let template = file(&dir, "template.jinja", b"{% for m in messages %}{{ m.content }}{% endfor %}");
    let templated = rollout(&["--chat-template", &template], &text);
    assert_eq!(templated.code, Some(0), "{}", templated.stderr);
    assert_eq!(templated.records()[0]["prompt_token_ids"], raw.records()[0]["prompt_token_ids"]);
    let arguments = ["--text", "--raw", "--model", &base, "--max-completion-tokens", "4"];
    let asked = run(ROLLOUT, &arguments, "2 + 3 = \n");
    assert_eq!(asked.records()[0]["prompt_token_ids"], raw.records()[0]["prompt_token_ids"]);
}

#[test]
fn columns_are_found_or_named_and_what_was_taken_is_said() {
    let row = json!({"problem": "2 + 3?", "solution": "It is $\\boxed{5}$.", "level": "1"});
    let done = run(PREP, &["-"], &lines(std::slice::from_ref(&row)));
    let record = &done.records()[0];
    assert_eq!((&record["answer"], &record["level"]), (&json!("5"), &json!("1")));
    assert_eq!(record["prompt"][1]["content"], "2 + 3?");
    assert_eq!(record["solution"], row["solution"]);
    assert_eq!(
        done.stderr,
        "gsm8k-prep: the question is \"problem\", the answer in the last \\boxed of \"solution\"\n"
    );

    let row = json!({"task": "2 + 3?", "gold": 5, "answer": "no"});
    let done = run(PREP, &["-", "--question-field", "task", "--answer-field", "gold"], &lines(&[row]));
    assert_eq!(done.records()[0]["answer"], "5", "{}", done.stderr);
    let none = run(PREP, &["-"], &lines(&[json!({"text": "Q"})]));
    assert_eq!(none.code, Some(3));
    assert!(none.stderr.starts_with("gsm8k-prep: -:1: no question: none of the fields question,"), "{}", none.stderr);

    let prose =
        json!({"question": "Q", "answer": "Well, that depends on what one means by it, and on much else besides."});
    let done = run(PREP, &["-"], &lines(&[prose]));
    assert_eq!((done.code, done.stdout.as_str()), (Some(0), ""));
    assert_eq!(done.stderr, "gsm8k-prep: skipped 1 rows without an answer\n");
    let bare = json!({"problem": "2 + 3?", "answer": "5"});
    let done = run(PREP, &["-", "--demonstrations"], &lines(&[bare]));
    assert!(done.stderr.ends_with("gsm8k-prep: skipped 1 rows without an answer and reasoning\n"), "{}", done.stderr);
}

#[test]
fn rows_that_lack_an_answer_are_skipped_wherever_they_stand() {
    let mut rows: Vec<Value> =
        (0..5).map(|at| json!({"question": format!("{at}?"), "answer": "5", "id": at})).collect();
    rows[0]["answer"] = Value::Null;
    rows[1]["answer"] = json!("\\boxed{}");
    rows[2]["answer"] = json!("");
    rows[3]["answer"] = json!(2.5);
    let done = run(PREP, &["-"], &lines(&rows));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let found: Vec<Value> = done.records().into_iter().map(|record| json!([record["answer"], record["id"]])).collect();
    assert_eq!(found, [json!(["2.5", 3]), json!(["5", 4])]);
    assert!(done.stderr.ends_with("gsm8k-prep: skipped 3 rows without an answer\n"), "{}", done.stderr);

    let row = json!({"task": "2 + 3?", "gold": "5", "question": "which?", "id": 7});
    let done = run(PREP, &["-", "--question-field", "task", "--answer-field", "gold"], &lines(&[row]));
    let record = &done.records()[0];
    assert_eq!((&record["question"], &record["id"]), (&json!("which?"), &json!(7)), "further fields are kept");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn files_are_read_as_editors_and_tools_leave_them() {
    let dir = tempfile::tempdir().unwrap();
    let plain = "{\"completion\":\"a\",\"answer\":\"b\"}\n{\"completion\":\"c\"}\n";
    let scored = run(SCORE, &["--reward", "int=1"], plain).stdout;
    assert_eq!(scored.lines().count(), 2);
    let marked = format!("\u{feff}{}", plain.replace('\n', "\r\n\r\n"));
    let forms: [(&str, Vec<u8>); 6] = [
        ("bom.jsonl", marked.clone().into_bytes()),
        ("a.jsonl.gz", gzip(plain.as_bytes())),
        ("b.jsonl.gz", [gzip(&marked.as_bytes()[..20]), gzip(&marked.as_bytes()[20..])].concat()),
        ("a.jsonl.zst", zstd::encode_all(plain.as_bytes(), 1).unwrap()),
        ("named.otherwise", gzip(plain.as_bytes())),
        ("no_end.jsonl", plain.trim_end().into()),
    ];
    for (name, bytes) in forms {
        let path = file(&dir, name, &bytes);
        let done = run(SCORE, &["--reward", "int=1", &path], "");
        assert_eq!((done.code, done.stdout), (Some(0), scored.clone()), "{name}: {}", done.stderr);
    }
    let out = dir.path().join("out.jsonl.gz").display().to_string();
    assert_eq!(run(SCORE, &["--reward", "int=1", "-o", &out], plain).code, Some(0));
    assert!(fs::read(&out).unwrap().starts_with(&[0x1f, 0x8b]));
    assert_eq!(run(SCORE, &["--reward", "int=1", &out], "").stdout, scored, "scores are replaced where they stand");
}

#[test]
fn what_is_no_jsonl_gets_a_line_that_says_how_to_convert_it() {
    let dir = tempfile::tempdir().unwrap();
    let utf16: Vec<u8> = "\u{feff}{}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let unmarked: Vec<u8> = "{}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let cases: [(&str, &[u8], &str); 13] = [
        ("array.json", b"[{\"completion\": \"a\"},\n {\"completion\": \"b\"}]\n", "jq -c '.[]' "),
        ("array_of_one_line.json", b"[{\"completion\": \"a\"}]", "jq -c '.[]' "),
        ("array_later.json", b"\n\n[{\"completion\": \"a\"}]", "jq -c '.[]' "),
        ("pretty_later.json", b"\n{ \"completion\": \"a\",\n\"answer\": \"b\" }\n", "jq -c . "),
        ("table.tsv", b"completion\tanswer\na\tb\n", "csv.DictReader(sys.stdin, delimiter='\\t')"),
        ("column.csv", b"completion\na\n", "csv.DictReader(sys.stdin)"),
        ("unmarked.jsonl", &unmarked, "iconv -f UTF-16LE"),
        ("a.jsonl.xz", b"\xfd7zXZ\0...", "xz -dc"),
        ("pretty.json", b"{\n  \"completion\": \"a\"\n}\n", "jq -c . "),
        ("table.csv", b"completion,answer\na,b\n", "csv.DictReader"),
        ("rows.parquet", b"PAR1....PAR1", "a parquet file; `gsm8k-prep"),
        ("wide.jsonl", &utf16, "iconv -f UTF-16"),
        (
            "broken.jsonl",
            b"{\"completion\": \"a\"}\n{\"completion\": a}\n",
            "broken.jsonl:2: not a JSON object: expected value at line 1 column 16",
        ),
    ];
    for (name, bytes, remedy) in cases {
        let path = file(&dir, name, bytes);
        let done = run(SCORE, &[&path], "");
        assert_eq!((done.code, done.stderr.lines().count()), (Some(3), 1), "{name}: {}", done.stderr);
        assert!(done.stderr.contains(remedy) && done.stderr.contains(&path), "{name}: {}", done.stderr);
    }
    let piped = run(SCORE, &[], "{\n\"completion\": \"a\"}\n");
    assert!(piped.stderr.ends_with("become JSONL with: jq -c .\n"), "{}", piped.stderr);
    let cut = run(SCORE, &[], "{\"completion\": \"a\n");
    assert!(cut.stderr.ends_with("at line 1 column 17\n"), "a line that is cut off: {}", cut.stderr);
}

#[test]
fn records_of_other_samplers_are_scored_and_evaluated() {
    let said = "<reasoning>\n2+3=5.\n</reasoning>\n<answer>\n5\n</answer>\n";
    let records = [
        json!({"prompt": "2 + 3?", "completion": said, "answer": 5}),
        json!({"prompt": "2 + 3?", "completion": [{"role": "assistant", "content": said}], "reward_model": {"ground_truth": "5"}}),
        json!({"prompt": "2 + 4?", "completion": said, "answer": "6"}),
    ];
    let scored = run(SCORE, &[], &lines(&records));
    assert_eq!(scored.code, Some(0), "{}", scored.stderr);
    let correct: Vec<Value> = scored.records().iter().map(|record| record["rewards"]["correctness"].clone()).collect();
    assert_eq!(correct, [2.0, 2.0, 0.0]);
    let evaluated = run(EVALUATE, &["--json"], &scored.stdout);
    assert_eq!(evaluated.code, Some(0), "{}", evaluated.stderr);
    let summary: Value = serde_json::from_str(&evaluated.stdout).unwrap();
    assert_eq!((&summary["num_completions"], &summary["num_prompts"]), (&json!(3), &json!(2)), "{summary}");
    let numbered: Vec<Value> =
        [7, 7, 8].iter().map(|id| json!({"prompt_id": id, "completion": "", "reward": 1})).collect();
    let evaluated = run(EVALUATE, &["--json"], &lines(&numbered));
    let summary: Value = serde_json::from_str(&evaluated.stdout).unwrap();
    assert_eq!((&summary["num_completions"], &summary["num_prompts"]), (&json!(3), &json!(2)), "{summary}");

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let refused = run(STEP, &["--policy", &model(), "--out", &out], &scored.stdout);
    assert_eq!(refused.code, Some(3));
    let message = "-:1: no field \"group_id\", which completions are of one prompt: `rollout` writes it, and another sampler must\n";
    assert!(refused.stderr.ends_with(message), "{}", refused.stderr);
}

/// Python with one of the packages that read JSONL into typed columns.
fn reader() -> Option<(String, &'static str)> {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has = |package: &&&str| {
        let import = format!("import {package}");
        let tried = Command::new(&python).args(["-c", &import]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    let found = ["datasets", "duckdb", "pandas"].iter().find(has).copied();
    found.map(|package| (python, package))
}

#[test]
fn output_reads_as_typed_columns_without_a_cast() {
    let Some((python, package)) = reader() else {
        eprintln!("skipped: python3 has none of datasets, duckdb and pandas; set PYTHON");
        return;
    };
    let prompts: Vec<Value> = (0..6)
        .map(|i| json!({"prompt": format!("{i} + 3?"), "answer": if i % 2 == 0 { json!("5") } else { Value::Null }}))
        .collect();
    let rollouts = sampled(&["-n", "2"], &lines(&prompts));
    let scored = run(SCORE, &[], &rollouts.stdout);
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "scored.jsonl", scored.stdout.as_bytes());
    let code = match package {
        "datasets" => {
            "d = __import__('datasets').load_dataset('json', data_files=F, split='train'); n, r = len(d), d['reward']"
        }
        "duckdb" => "r = __import__('duckdb').sql(f\"select reward::double from '{F}'\").fetchall(); n = len(r)",
        _ => "d = __import__('pandas').read_json(F, lines=True); n, r = len(d), list(d['reward'])",
    };
    let program = format!("F = {path:?}\n{code}\nprint(n)");
    let home = dir.path().display().to_string();
    let done = Command::new(python).args(["-c", &program]).env("HF_HOME", home).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), "12");
}
