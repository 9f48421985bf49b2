//! Lines that are too long or too full, and texts at which a careless scan would take forever.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use grpo_pipes::reward::number::Number;
use grpo_pipes::reward::{RewardWeights, Scorer, Semantics};

use crate::fixtures::directory;
use crate::process::run;

/// What any of this may take: seconds less here, hours more where time grows with the square.
const SOON: Duration = Duration::from_secs(20);

/// The code of a command that has 2 GB of address space, and its last words.
fn bounded(program: &str, args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new("bash");
    command.args(["-c", "ulimit -c 0 -v 2000000; exec \"$@\"", "bounded", program]).args(args);
    let done = command.stdin(Stdio::null()).stdout(Stdio::null()).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    (done.status.code(), said.lines().next_back().unwrap_or_default().to_owned())
}

/// Each command that reads records, with a file to read.
fn readers(file: &str, out: &str) -> Vec<(&'static str, Vec<String>)> {
    let model = directory().join("tiny-qwen2").display().to_string();
    let args = |list: &[&str]| list.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    vec![
        (env!("CARGO_BIN_EXE_gsm8k-prep"), args(&[file])),
        (env!("CARGO_BIN_EXE_rollout"), args(&[file, "--model", &model])),
        (env!("CARGO_BIN_EXE_rollout"), args(&[file, "--model", &model, "--text"])),
        (env!("CARGO_BIN_EXE_score"), args(&[file])),
        (env!("CARGO_BIN_EXE_grpo-step"), args(&[file, "--policy", &model, "--out", out])),
        (env!("CARGO_BIN_EXE_grpo-step"), args(&[file, "--policy", &model, "--out", out, "--supervised"])),
        (env!("CARGO_BIN_EXE_evaluate"), args(&[file])),
    ]
}

/// Every command but the exceptions refuses the file in its first line, for this reason.
fn assert_refused(file: &Path, reason: &str, exceptions: &[&str]) {
    let file = file.display().to_string();
    let out = format!("{file}.out");
    for (program, args) in readers(&file, &out) {
        if exceptions.iter().any(|exception| args.iter().any(|arg| arg == exception)) {
            continue;
        }
        let began = Instant::now();
        let (code, said) = bounded(program, &args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(code, Some(3), "{program}: {said}");
        assert!(said.contains(&format!(": {file}:1: {reason}")), "{program}: {said}");
        assert!(began.elapsed() < SOON, "{program}: {:?}", began.elapsed());
        assert!(!Path::new(&out).exists());
    }
}

#[test]
fn a_line_of_100_mb_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, packed) = (dir.path().join("long.jsonl"), dir.path().join("long.jsonl.zst"));
    let line = [&b"{\"completion\":\""[..], &vec![b'a'; 100 << 20], b"\"}\n"].concat();
    std::fs::write(&plain, &line).unwrap();
    std::fs::write(&packed, zstd::encode_all(&line[..], 1).unwrap()).unwrap();
    for file in [plain, packed] {
        assert_refused(&file, "line longer than 64 MiB", &[]);
    }
}

#[test]
fn a_record_of_a_million_fields_or_nested_a_million_times_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("full.jsonl");
    let mut file = BufWriter::new(File::create(&path).unwrap());
    write!(file, "{{\"a\":1").unwrap();
    (0..1_000_000).for_each(|i| write!(file, ",\"{i}\":1").unwrap());
    writeln!(file, "}}").unwrap();
    file.into_inner().unwrap();
    assert_refused(&path, "not a JSON object: more than 4096 fields", &["--text"]);
    let nested = "[".repeat(1_000_000) + &"]".repeat(1_000_000);
    let fields = ["prompt", "completion", "rewards", "group_id", "question"];
    let record: Vec<_> = fields.iter().map(|field| format!("\"{field}\":{nested}")).collect();
    std::fs::write(&path, format!("{{\"prompt_id\":\"a\",{}}}\n", record.join(","))).unwrap();
    assert_refused(&path, "field \"", &["--text"]);
}

#[test]
fn a_million_names_of_rewards_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rewards.jsonl");
    let rewards: Vec<_> = (0..1_000_000).map(|i| format!("\"{i}\":1")).collect();
    let line = format!("{{\"group_id\":\"a\",\"completion\":\"\",\"rewards\":{{{}}}}}\n", rewards.join(","));
    std::fs::write(&path, line).unwrap();
    let (code, said) = bounded(env!("CARGO_BIN_EXE_evaluate"), &[path.to_str().unwrap()]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.ends_with(":1: field \"rewards\": more than 1000 names so far"), "{said}");
}

#[test]
fn what_an_error_quotes_stays_one_line_of_bounded_length() {
    let model = directory().join("tiny-qwen2").display().to_string();
    let done = |id: &str, length: usize| {
        let id = serde_json::to_string(&(id.to_owned() + &"x".repeat(length))).unwrap();
        let record = format!(
            r#"{{"group_id":{id},"group_size":2,"sample_index":0,"prompt_token_ids":[1],"completion_token_ids":[2],"logprobs":[-1],"reward":1}}"#
        );
        run(env!("CARGO_BIN_EXE_grpo-step"), &["--policy", &model, "--dry-run", "--device", "cpu"], &(record + "\n"))
    };
    let done_short = done("a\nb\u{1b}[2J", 0);
    assert_eq!(done_short.said(), "grpo-step: -:1: group a\\nb\\u{1b}[2J: 1 of 2 samples when the input ended\n");
    let done_long = done("\u{1f600}", 1 << 20);
    assert!(
        done_long.said().len() < 2100 && done_long.said().ends_with("xx: 1 of 2 samples when the input ended\n"),
        "{}",
        done_long.stderr.len()
    );
    assert_eq!((done_short.code, done_long.code), (Some(3), Some(3)));
}

/// How long this thread has computed [ns]; not how long it waited for a processor.
fn computed() -> u64 {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    told.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_text_of_100_mb_is_scored_in_time_that_grows_with_its_length() {
    let size = if std::env::var_os("FUZZ").is_some() { 100 << 20 } else { 4 << 20 };
    let tags =
        ["<", "<reasoning>", "</reasoning>", "</reasoning> ", "</reasoning>\n<answer>", "<answer>", "\n</answer>\n"];
    let others = [" ", "\n", "1", "1,111", "1,", ".", "-", "$", "1.", "a.1", "\u{3000}", "\u{1d7d8}"];
    let marks =
        ["\\boxed{", "\\boxed{1}, ", "{", "}", "\\frac", "\\frac{1}{", "####", "####1\n", "answer", "answer is ", "="];
    let numbers = ["1/", "1 ", "(1,", "10^", "1e9", " million", " apples", "'", "*", "\\", "\u{b2}", "\u{bd}"];
    for part in tags.into_iter().chain(others).chain(marks).chain(numbers) {
        let body = part.repeat(size / 2 / part.len());
        for text in [body.repeat(2), format!("<reasoning>{body}</reasoning><answer>{body}</answer>")] {
            let began = computed();
            for semantics in [Semantics::Fixed, Semantics::Seed] {
                let score = Scorer { semantics, weights: RewardWeights::default(), lengths: None, command: None }
                    .score(&text, Some("1,111"), None);
                assert!(score.reward.is_some_and(f64::is_finite));
            }
            let _ = Number::last_in(&text);
            let math = Scorer {
                semantics: Semantics::Fixed,
                weights: "math=1".parse().unwrap(),
                lengths: None,
                command: None,
            };
            for reference in ["1,111", &text] {
                assert!(math.score(&text, Some(reference), None).reward.is_some());
                assert!(math.score("1/3", Some(reference), None).reward.is_some());
            }
            // With the square of the length it would be hours in all.
            let took = (computed() - began) / text.len() as u64;
            assert!(took < 1000, "{part:?}: {took} ns a byte");
        }
    }
}
