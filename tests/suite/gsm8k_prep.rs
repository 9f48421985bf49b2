//! `gsm8k-prep` as a process, and all of GSM8K through it.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, DataType, DoubleType, FloatType, Int32Type, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};

use crate::process::check_help;

const SYSTEM: &str = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n";

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gsm8k-prep"));
    command.args(args).env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent").env_remove("COLUMNS");
    command
}

fn run(args: &[&str]) -> Output {
    command(args).stdin(Stdio::null()).output().unwrap()
}

fn run_on(args: &[&str], input: &str) -> Output {
    let mut child = command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn records(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    lines(&output.stdout)
}

fn lines(bytes: &[u8]) -> Vec<Value> {
    bytes.lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
}

fn ids(records: &[Value]) -> Vec<&str> {
    records.iter().map(|record| record["prompt_id"].as_str().unwrap()).collect()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    if path.exists() {
        return Some(path);
    }
    let _ = writeln!(std::io::stderr(), "skipped: no {}", path.display());
    None
}

fn row(number: usize) -> String {
    format!("{{\"question\":\"Q{number}?\",\"answer\":\"1+{number}=<<1+{number}=x>>x\\n#### {number}\"}}\n")
}

fn rows(count: usize) -> String {
    (0..count).map(row).collect()
}

fn write_parquet(path: &Path, first: usize, count: usize) {
    let schema =
        "message rows { required binary question (UTF8); required binary answer (UTF8); required int64 level; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::new())).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let numbers = first..first + count;
    for texts in [
        numbers.clone().map(|n| format!("Q{n}?")).collect::<Vec<_>>(),
        numbers.clone().map(|n| format!("reason\n#### {n}")).collect(),
    ] {
        let texts: Vec<ByteArray> = texts.iter().map(|text| text.as_str().into()).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
    }
    let levels: Vec<i64> = numbers.map(|n| n as i64 * 10).collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&levels, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

type Group<'a> = SerializedRowGroupWriter<'a, fs::File>;

/// The next column; levels as in parquet, of which required columns have none.
fn write_column<T: DataType>(
    group: &mut Group<'_>,
    values: &[T::T],
    defined: Option<&[i16]>,
    repeated: Option<&[i16]>,
) {
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<T>().write_batch(values, defined, repeated).unwrap();
    column.close().unwrap();
}

#[test]
fn columns_of_parquet_are_kept_nested_or_not() {
    let schema = "message rows { required binary problem (UTF8); required binary solution (UTF8);
        required group from { required int32 page (INTEGER(8,true)); required float weight; }
        required group tags (LIST) { repeated group list { optional binary element (UTF8); } }
        required binary image; optional double score; required int32 date (DATE); }";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.parquet");
    let file = fs::File::create(&path).unwrap();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let texts = |texts: &[&str]| texts.iter().map(|text| ByteArray::from(*text)).collect::<Vec<_>>();
    write_column::<ByteArrayType>(&mut group, &texts(&["P", "Q"]), None, None);
    write_column::<ByteArrayType>(&mut group, &texts(&["\\boxed{1}", "\\boxed{2}"]), None, None);
    write_column::<Int32Type>(&mut group, &[-3, 4], None, None);
    write_column::<FloatType>(&mut group, &[0.1, f32::NAN], None, None);
    write_column::<ByteArrayType>(&mut group, &texts(&["a\"", "b"]), Some(&[2, 1, 2]), Some(&[0, 1, 0]));
    write_column::<ByteArrayType>(&mut group, &texts(&["\u{0}", "x"]), None, None);
    write_column::<DoubleType>(&mut group, &[2.5], Some(&[0, 1]), None);
    write_column::<Int32Type>(&mut group, &[0, 366], None, None);
    group.close().unwrap();
    writer.close().unwrap();

    let output = run(&[path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let kept: Vec<&str> = text.lines().map(|line| line.split_once("\"answer\":").unwrap().1).collect();
    assert_eq!(
        kept,
        [
            r#""1","solution":"\\boxed{1}","from":{"page":-3,"weight":0.1},"tags":["a\"",null],"score":null,"date":"1970-01-01"}"#,
            r#""2","solution":"\\boxed{2}","from":{"page":4,"weight":null},"tags":["b"],"score":2.5,"date":"1971-01-02"}"#,
        ]
    );
    assert_eq!(stderr(&output).matches("column \"image\" is left out").count(), 1, "{}", stderr(&output));
}

#[test]
fn all_of_gsm8k_passes_with_the_answers_of_the_files() {
    for (split, count) in [("train", 7473), ("test", 1319)] {
        let Some(path) = shared(&format!("gsm8k/{split}.jsonl")) else { return };
        let source = lines(&fs::read(&path).unwrap());
        let output = run(&[path.to_str().unwrap()]);
        assert_eq!(stderr(&output), "");
        let made = records(&output);
        assert_eq!(made.len(), count);
        for (index, (row, made)) in source.iter().zip(&made).enumerate() {
            let answer = row["answer"].as_str().unwrap().rsplit("#### ").next().unwrap();
            assert_eq!(made["answer"], answer.trim());
            assert_eq!(made["prompt_id"], format!("gsm8k/{split}/{index}"));
            let prompt = serde_json::json!([
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["question"]},
            ]);
            assert_eq!(made["prompt"], prompt);
            assert_eq!(made.as_object().unwrap().len(), 3);
        }
    }
}

#[test]
fn the_default_system_prompt_is_the_seeds_byte_for_byte() {
    let Some(folder) = shared("seeds") else { return };
    for file in ["000_0a32e213765875c2.txt", "004_3a9edaa0472871f7.txt"] {
        let text = fs::read_to_string(folder.join(file)).unwrap();
        let Some((_, rest)) = text.split_once("SYSTEM_PROMPT = \"\"\"") else { continue };
        assert_eq!(rest.split_once("\"\"\"").unwrap().0, SYSTEM, "{file}");
    }
    assert_eq!(records(&run_on(&["-"], &row(3)))[0]["prompt"][0]["content"], SYSTEM);
}

#[test]
fn every_demonstration_of_gsm8k_is_in_the_format_and_without_marks() {
    let Some(path) = shared("gsm8k/train.jsonl") else { return };
    for record in records(&run(&[path.to_str().unwrap(), "--demonstrations"])) {
        let completion = record["completion"].as_str().unwrap();
        let inner = completion.strip_prefix("<reasoning>\n").unwrap();
        let (reasoning, answer) = inner.split_once("\n</reasoning>\n<answer>\n").unwrap();
        assert!(!reasoning.contains("<<") && !reasoning.contains("####") && reasoning == reasoning.trim());
        assert_eq!(answer, format!("{}\n</answer>\n", record["answer"].as_str().unwrap()));
    }
}

#[test]
fn jsonl_zst_parquet_and_directories_of_them_give_the_same_rows() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("train.jsonl"), rows(5)).unwrap();
    fs::write(at("train.jsonl.zst"), zstd::encode_all(rows(5).as_bytes(), 3).unwrap()).unwrap();
    write_parquet(Path::new(&at("train.parquet")), 0, 5);
    let expected = records(&run(&[&at("train.jsonl")]));
    assert_eq!(ids(&expected), ["gsm8k/train/0", "gsm8k/train/1", "gsm8k/train/2", "gsm8k/train/3", "gsm8k/train/4"]);
    assert_eq!(records(&run(&[&at("train.jsonl.zst")])), expected);
    assert_eq!(records(&run_on(&["-"], &rows(5))), expected);
    for (index, record) in records(&run(&[&at("train.parquet")])).into_iter().enumerate() {
        assert_eq!(record["level"], index * 10);
        assert_eq!((&record["prompt"], &record["answer"]), (&expected[index]["prompt"], &expected[index]["answer"]));
    }
    let doubt = run(&[&at("")]);
    assert_eq!(doubt.status.code(), Some(3));
    assert!(stderr(&doubt).contains("are both the train split"), "{}", stderr(&doubt));

    let clone = dir.path().join("clone");
    fs::create_dir_all(clone.join("main")).unwrap();
    write_parquet(&clone.join("main/test-00001-of-00002.parquet"), 5, 3);
    write_parquet(&clone.join("main/test-00000-of-00002.parquet"), 0, 5);
    let sharded = records(&run(&[clone.to_str().unwrap(), "--split", "test"]));
    assert_eq!(ids(&sharded)[6..], ["gsm8k/test/6", "gsm8k/test/7"]);
    assert_eq!(sharded[6]["answer"], "6");
}

#[test]
fn train_and_validation_share_no_row_and_make_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.jsonl");
    fs::write(&path, rows(50)).unwrap();
    let path = path.to_str().unwrap();
    let part = |split| records(&run(&[path, "--split", split, "--holdout", "20", "--shuffle", "--seed", "3"]));
    let (train, validation) = (part("train"), part("validation"));
    assert_eq!((train.len(), validation.len()), (30, 20));
    let all = records(&run(&[path, "--shuffle", "--seed", "3"]));
    assert_eq!([ids(&train), ids(&validation)].concat(), ids(&all));
    assert_ne!(ids(&all), ids(&records(&run(&[path]))));
    assert_eq!(run(&[path, "--split", "validation"]).status.code(), Some(2));
    assert_eq!(run(&[path, "--split", "test"]).status.code(), Some(2));
}

#[test]
fn epochs_repeat_the_same_prompts_in_other_orders() {
    let args = ["-", "--epochs", "3", "--shuffle", "--limit", "10"];
    let output = run_on(&args, &rows(40));
    let made = records(&output);
    let epochs: Vec<Vec<&str>> = ids(&made).chunks(10).map(<[&str]>::to_vec).collect();
    assert_eq!(epochs.len(), 3);
    assert_ne!(epochs[0], epochs[1]);
    let sets: Vec<HashSet<_>> = epochs.iter().map(|epoch| epoch.iter().collect()).collect();
    assert!(sets[0].len() == 10 && sets[0] == sets[1] && sets[1] == sets[2]);
    assert_eq!(output.stdout, run_on(&args, &rows(40)).stdout);
}

#[test]
fn an_empty_system_prompt_is_no_message_and_one_shot_is_two() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    fs::write(&empty, "").unwrap();
    let made = records(&run_on(&["-", "--system-prompt", empty.to_str().unwrap(), "--one-shot"], &row(1)));
    let roles: Vec<_> = made[0]["prompt"].as_array().unwrap().iter().map(|m| m["role"].clone()).collect();
    assert_eq!(roles, ["user", "assistant", "user"]);
    fs::write(&empty, "Be brief.").unwrap();
    let made = records(&run_on(&["-", "--system-prompt", empty.to_str().unwrap()], &row(1)));
    assert_eq!(made[0]["prompt"][0]["content"], "Be brief.");
}

#[test]
fn generated_splits_share_no_question_and_are_the_same_each_time() {
    let make = |split, seed| run(&["--generate", "600", "--split", split, "--seed", seed]);
    let questions = |output: &Output| -> HashSet<String> {
        records(output).iter().map(|record| record["prompt"][1]["content"].as_str().unwrap().to_owned()).collect()
    };
    let (train, test) = (make("train", "1"), make("test", "2"));
    assert_eq!(train.stdout, make("train", "1").stdout);
    assert_eq!((questions(&train).len(), questions(&test).len()), (600, 600));
    assert!(questions(&train).is_disjoint(&questions(&test)));
    assert_eq!(ids(&records(&test))[17], "generated/test/17");
}

#[test]
fn sloppy_demonstrations_are_made_on_request() {
    let good = records(&run(&["--generate", "200", "--demonstrations"]));
    let args = ["--generate", "200", "--demonstrations", "--sloppy-format", "0.5", "--sloppy-arithmetic", "0.2"];
    let sloppy = records(&run(&args));
    let differ = good.iter().zip(&sloppy).filter(|(a, b)| a["completion"] != b["completion"]).count();
    assert!((90..150).contains(&differ), "{differ}");
    assert!(good.iter().zip(&sloppy).all(|(a, b)| a["answer"] == b["answer"] && a["prompt"] == b["prompt"]));
    assert_eq!(run(&["--generate", "9", "--sloppy-format", "0.5"]).status.code(), Some(2));
    assert_eq!(run(&["--generate", "9", "--demonstrations", "--sloppy-format", "NaN"]).status.code(), Some(2));
}

#[test]
fn rows_without_an_answer_are_skipped_and_counted() {
    let input = row(0) + "{\"question\":\"?\",\"answer\":\"none\"}\n" + &row(2);
    let output = run_on(&["-"], &input);
    assert_eq!(ids(&records(&output)), ["gsm8k/train/0", "gsm8k/train/2"]);
    assert_eq!(stderr(&output), "gsm8k-prep: skipped 1 rows without an answer\n");
}

#[test]
fn problems_that_rollouts_always_or_never_solved_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let rollouts = dir.path().join("rollouts");
    fs::create_dir(&rollouts).unwrap();
    // Of 4 completions each, in two files: problem 0 solves 0, 1 solves 1, 2 solves 2, 3 solves 3, 4 solves 4; 5 has none.
    for file in 0..2 {
        let record = |i: usize| {
            let (problem, sample) = (i / 2, i % 2 + 2 * file);
            let right = f64::from(u8::from(sample < problem)) * 2.0;
            json!({"prompt_id": format!("gsm8k/train/{problem}"), "rewards": {"correctness": right, "int": 0.5}})
                .to_string()
        };
        let text: Vec<String> = (0..10).map(record).collect();
        fs::write(rollouts.join(format!("step_{file}.jsonl")), text.join("\n")).unwrap();
    }
    let source = dir.path().join("train.jsonl");
    fs::write(&source, rows(6)).unwrap();
    let paths = [source.to_str().unwrap(), "--pass-rates", rollouts.to_str().unwrap()];
    let with = |more: &[&str]| run(&[&paths[..], more].concat());
    let output = with(&[]);
    assert_eq!(ids(&records(&output)), ["gsm8k/train/1", "gsm8k/train/2", "gsm8k/train/3"]);
    let said = "left out 1 problems without rollouts, 1 never solved and 1 always solved";
    assert!(stderr(&output).contains(said), "{}", stderr(&output));
    assert_eq!(ids(&records(&with(&["--limit", "1"]))), ["gsm8k/train/2"]);
    assert_eq!(ids(&records(&with(&["--limit", "2"]))), ["gsm8k/train/1", "gsm8k/train/2"], "of equals the first");

    // An unjudged completion says nothing of its problem.
    let unjudged = json!({"prompt_id": "gsm8k/train/5", "rewards": {"correctness": null}}).to_string();
    fs::write(rollouts.join("step_8.jsonl"), unjudged).unwrap();
    assert!(stderr(&with(&[])).contains(said), "{}", stderr(&with(&[])));
    fs::write(rollouts.join("step_9.jsonl"), "{\"prompt_id\": \"a\", \"reward\": 1}\n").unwrap();
    let refused = with(&[]);
    assert_eq!(refused.status.code(), Some(3));
    let said = "step_9.jsonl:1: no \"rewards\" with correctness or math: run score first";
    assert!(stderr(&refused).contains(said), "{}", stderr(&refused));
}

#[test]
fn a_bad_line_is_named_after_whole_records_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.jsonl");
    fs::write(&path, row(0) + &row(1) + "{\"question\":\"?\"}\n" + &row(3)).unwrap();
    let output = run(&[path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(stderr(&output), format!("gsm8k-prep: {}:3: no field \"answer\"\n", path.display()));
    assert_eq!(lines(&output.stdout).len(), 2);
    let shuffled = run(&[path.to_str().unwrap(), "--shuffle"]);
    assert_eq!((shuffled.status.code(), shuffled.stdout.len()), (Some(3), 0));
}

#[test]
fn unknown_fields_are_kept_as_they_stand() {
    let output = run_on(&["-"], "{\"level\":1.10,\"question\":\"Q?\",\"answer\":\"#### 3\",\"tags\":[\"a\", {}]}\n");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with("\"answer\":\"3\",\"level\":1.10,\"tags\":[\"a\", {}]}\n"), "{text}");
}

#[test]
fn what_is_missing_or_broken_is_said_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("train.parquet");
    fs::write(&broken, "no parquet").unwrap();
    let cases = [
        ("missing.jsonl", 1, "gsm8k-prep: missing.jsonl: No such file"),
        (broken.to_str().unwrap(), 3, "gsm8k-prep: "),
        (dir.path().to_str().unwrap(), 3, "gsm8k-prep: "),
        ("openai/gsm8k", 1, "gsm8k-prep: hub: openai/gsm8k: HF_HUB_OFFLINE is set"),
    ];
    for (source, code, message) in cases {
        let output = run(&[source]);
        assert_eq!(output.status.code(), Some(code), "{source}: {}", stderr(&output));
        assert!(stderr(&output).starts_with(message), "{}", stderr(&output));
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    }
    assert_eq!(run(&["x.jsonl", "--generate", "3"]).status.code(), Some(2));
}

#[test]
fn a_closed_stdout_is_a_quiet_success() {
    let mut child = command(&["--generate", "50000"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command(&["--generate", "2"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("gsm8k-prep: cannot write the output: "), "{}", stderr(&output));
}

#[test]
fn an_output_file_appears_when_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.jsonl.zst");
    assert!(run(&["--generate", "3", "-o", path.to_str().unwrap()]).status.success());
    assert_eq!(lines(&zstd::decode_all(fs::File::open(&path).unwrap()).unwrap()).len(), 3);
    let bad = dir.path().join("bad.jsonl");
    let output = run_on(&["-", "-o", bad.to_str().unwrap()], "no JSON\n");
    assert_eq!((output.status.code(), bad.exists()), (Some(3), false));
}

#[test]
fn the_help_is_as_reviewed() {
    check_help(env!("CARGO_BIN_EXE_gsm8k-prep"), "gsm8k-prep");
}
