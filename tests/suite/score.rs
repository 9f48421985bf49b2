//! `score` as a process, and its rewards against the notebook's Python.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use grpo_pipes::reward::{REWARDS, RewardWeights, Scorer, Semantics, math};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::process::{check_closed_pipe, check_full_disk, check_help, check_missing_file, lines, run};

const SCORE: &str = env!("CARGO_BIN_EXE_score");

fn rollout(answer: &str) -> Value {
    let completion = format!("<reasoning>\nOne.\nTwo.\n</reasoning>\n<answer>\n{answer}\n</answer>\n");
    json!({"zeta": 1.25, "completion": completion, "answer": "1000", "alpha": {"kept": [1, 2]}})
}

fn scored(args: &[&str], records: &[Value]) -> Vec<Value> {
    let done = run(SCORE, args, &lines(records));
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    done.records()
}

fn scorer(semantics: Semantics) -> Scorer {
    Scorer { semantics, weights: RewardWeights::default(), lengths: None, command: None }
}

#[test]
fn seed_rewards_are_the_doubles_that_python_computes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/score_reference.jsonl");
    let reference = std::fs::read_to_string(path).unwrap();
    assert!(reference.lines().count() > 900);
    for line in reference.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| record[name].as_str().unwrap();
        let scorer = scorer(Semantics::Seed);
        let score = scorer.score(text("completion"), Some(text("answer")), None);
        assert_eq!(score.extracted, Some(text("extracted")), "{line}");
        for (reward, value) in score.rewards {
            let want = record["rewards"][reward.name].as_f64();
            assert_eq!(value.map(f64::to_bits), want.map(f64::to_bits), "{} of {line}", reward.name);
        }
    }
}

#[test]
fn fields_are_added_and_unknown_ones_kept_in_their_order() {
    let done = run(
        SCORE,
        &["-"],
        "{\"zeta\": 1.250, \"completion\":\"<answer>-5</answer>\", \"answer\":\"-5\", \"alpha\":{ \"b\":1}}\r\n\n",
    );
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let rewards = r#""rewards":{"correctness":2.0,"int":0.5,"strict_format":0.0,"soft_format":0.0,"xmlcount":0.0}"#;
    let kept = r#"{"zeta":1.250,"completion":"<answer>-5</answer>","answer":"-5","alpha":{ "b":1}"#;
    assert_eq!(done.stdout, format!("{kept},{rewards},\"reward\":2.5,\"extracted\":\"-5\"}}\n"));
}

#[test]
fn scoring_twice_replaces_what_the_first_time_wrote() {
    let once = run(SCORE, &[], &lines(&[rollout("7")]));
    let twice = run(SCORE, &[], &once.stdout);
    assert_eq!(once.stdout, twice.stdout);
    let other = run(SCORE, &["--reward", "int=3"], &once.stdout);
    assert!(
        other.stdout.contains(r#""alpha":{"kept":[1,2]},"rewards":{"int":0.5},"reward":1.5,"extracted":"7"}"#),
        "{}",
        other.stdout
    );
}

#[test]
fn the_semantics_differ_where_the_notebook_is_at_fault() {
    let record = [rollout("$1,000.0")];
    let fixed = &scored(&[], &record)[0];
    assert_eq!((fixed["reward"].as_f64(), fixed["extracted"].as_str()), (Some(4.0), Some("$1,000.0")));
    let seed = &scored(&["--semantics", "seed"], &record)[0];
    assert_eq!(
        seed["rewards"],
        json!({"correctness": 0.0, "int": 0.0, "strict_format": 0.0, "soft_format": 0.0, "xmlcount": 0.5})
    );
}

#[test]
fn without_an_answer_correctness_and_what_counts_it_are_null() {
    let mut record = rollout("7");
    record.as_object_mut().unwrap().remove("answer");
    let all = &scored(&[], &[record.clone()])[0];
    assert!(all["rewards"]["correctness"].is_null() && all["reward"].is_null());
    assert_eq!(all["rewards"]["int"], 0.5);
    record["answer"] = Value::Null;
    for rest in ["int=1", "int=1,correctness=0"] {
        assert_eq!(scored(&["--reward", rest], &[record.clone()])[0]["reward"], 0.5, "{rest}");
    }
}

/// `answers.tsv` and what people write beside it: the answer of a completion, the reference, and whether it is right.
fn answers() -> Vec<(String, String, bool)> {
    let mut table = ANSWERS.to_owned();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/cases/answers.tsv");
    match std::fs::read_to_string(&path) {
        Ok(text) => table += &text,
        Err(err) => eprintln!("skipped: {}: {err}", path.display()),
    }
    let row = |line: &str| {
        let [answer, reference, right] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        (answer.to_owned(), reference.to_owned(), right == "yes")
    };
    table.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(row).collect()
}

const ANSWERS: &str = "\\boxed{18\\text{ dollars}}\t$18\tyes\n18 km/h\t18\tyes\n1{,}234\t1,234\tyes\n18 or 19\t18\tno\n\
    \\dfrac{1}{2}\t0.5\tyes\n(A)\ta\tyes\nblue\tred\tno\n1 234,5\t1.234,50\tyes\n";

#[test]
fn math_takes_answers_in_tags_boxes_sentences_and_alone() {
    let answers = answers();
    let marked: [fn(&str) -> String; 4] = [
        str::to_owned,
        |answer| format!("<reasoning>\n9 * 2 = 17\n</reasoning>\n<answer>\n{answer}\n</answer>\n"),
        |answer| format!("9 * 2 = 17, no.\n\n**Answer:** {answer}\nI hope it is correct."),
        |answer| format!("9 * 2 = 17, no.\n{answer}\n"),
    ];
    for mark in marked {
        let record =
            |(answer, reference, _): &(String, String, bool)| json!({"completion": mark(answer), "answer": reference});
        let records: Vec<_> = answers.iter().map(record).collect();
        for ((row, record), scored) in answers.iter().zip(&records).zip(scored(&["--reward", "math=1"], &records)) {
            assert_eq!(scored["reward"], if row.2 { 1.0 } else { 0.0 }, "{record}");
        }
    }
}

#[test]
fn math_stands_alone_or_beside_the_others_and_not_among_the_defaults() {
    let record = json!({"completion": "So <answer>-</answer>... <answer>$18.00</answer>", "answer": "18 dollars"});
    let alone = run(SCORE, &["--reward", "math=2"], &lines(std::slice::from_ref(&record)));
    assert!(
        alone.stdout.ends_with(",\"rewards\":{\"math\":1.0},\"reward\":2.0,\"extracted\":\"$18.00\"}\n"),
        "{}",
        alone.stdout
    );
    for semantics in ["fixed", "seed"] {
        let both = &scored(&["--reward", "math=2,int=0.5", "--semantics", semantics], std::slice::from_ref(&record))[0];
        assert_eq!(both["rewards"], json!({"math": 1.0, "int": 0.0}), "{semantics}");
        assert_eq!(both["extracted"].as_str(), (semantics == "seed").then_some("$18.00"), "what int looked at");
    }
    assert!(scored(&[], std::slice::from_ref(&record))[0]["rewards"].get("math").is_none());
    let unanswered = json!({"completion": "18"});
    let null = &scored(&["--reward", "math=1"], &[unanswered])[0];
    assert!(null["rewards"]["math"].is_null() && null["reward"].is_null() && null["extracted"] == "18");
    let nothing = &scored(&["--reward", "math=1"], &[json!({"completion": "", "answer": "18"})])[0];
    assert!(nothing["reward"] == 0.0 && nothing["extracted"].is_null());
}

#[test]
fn an_unknown_reward_is_a_usage_error_that_lists_the_known_ones() {
    let done = run(SCORE, &["--reward", "speed=1"], "");
    assert_eq!(done.code, Some(2));
    assert!(REWARDS.iter().all(|reward| done.stderr.contains(reward.name)), "{}", done.stderr);
}

#[test]
fn a_bad_line_is_named_once_everything_before_it_is_written() {
    let good = lines(&vec![rollout("7"); 2000]);
    for bad in [
        "{\"completion\": 7}",
        "{\"completion\":\"\",\"answer\":[7]}",
        "{\"answer\":\"7\"}",
        "nonsense",
        "{\"completion\":\"\\ud800\"}",
    ] {
        let done = run(SCORE, &[], &format!("{good}\n{bad}\n{good}"));
        assert_eq!((done.code, done.stdout.lines().count()), (Some(3), 2000), "{bad}");
        assert!(done.stderr.starts_with("score: -:2002: ") && done.stderr.lines().count() == 1, "{}", done.stderr);
        assert!(done.stdout.ends_with("}\n"));
    }
}

#[test]
fn the_order_is_kept_over_many_batches() {
    let records: Vec<_> = (0..5000).map(|n| json!({"n": n, "completion": "x".repeat(n % 700), "answer": ""})).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.jsonl.zst");
    std::fs::write(&path, zstd::encode_all(lines(&records).as_bytes(), 1).unwrap()).unwrap();
    let numbers =
        scored(&[path.to_str().unwrap()], &[]).into_iter().map(|record| record["n"].as_u64().unwrap() as usize);
    assert!(numbers.eq(0..5000));
}

#[test]
fn a_batch_is_answered_while_the_input_stays_open() {
    let mut child = Command::new(SCORE).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let (sender, answers) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut line = String::new();
        while stdout.read_line(&mut line).unwrap() > 0 {
            sender.send(std::mem::take(&mut line)).unwrap();
        }
    });
    for round in 0..3 {
        // The blank line and the half line must not hold the whole ones back.
        stdin.write_all(format!("{}\n\n{{\"completion\"", lines(&[rollout("7"), rollout("8")])).as_bytes()).unwrap();
        stdin.flush().unwrap();
        for _ in 0..2 {
            assert!(answers.recv_timeout(Duration::from_secs(20)).is_ok(), "round {round}");
        }
        stdin.write_all(b":\"\"}\n").unwrap();
        assert!(answers.recv_timeout(Duration::from_secs(20)).is_ok(), "round {round}");
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
    reader.join().unwrap();
}

#[test]
fn a_file_is_published_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.jsonl");
    let args = ["-o", path.to_str().unwrap()];
    assert_eq!(run(SCORE, &args, &format!("{}nonsense\n", lines(&[rollout("7")]))).code, Some(3));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert_eq!(run(SCORE, &args, &lines(&[rollout("7")])).code, Some(0));
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
}

#[test]
fn a_named_pipe_and_a_link_stay_what_they_are_and_get_the_output() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = path("pipe");
        move || std::fs::read_to_string(pipe).unwrap()
    });
    let scored = run(SCORE, &["-o", path("pipe").to_str().unwrap()], &lines(&[rollout("7")]));
    assert_eq!(scored.code, Some(0), "{}", scored.stderr);
    let want = run(SCORE, &[], &lines(&[rollout("7")])).stdout;
    assert_eq!(reader.join().unwrap(), want);
    assert!(!path("pipe").metadata().unwrap().is_file());

    std::fs::write(path("file"), "old").unwrap();
    std::os::unix::fs::symlink("file", path("link")).unwrap();
    assert_eq!(run(SCORE, &["-o", path("link").to_str().unwrap()], &lines(&[rollout("7")])).code, Some(0));
    assert!(path("link").is_symlink());
    assert_eq!(std::fs::read_to_string(path("file")).unwrap(), want);
}

#[test]
fn a_placebo_deals_rewards_within_whole_groups_and_the_same_again() {
    let record = |group: &str, sample: usize| {
        let right = if sample < 3 { "7" } else { "8" };
        json!({"group_id": group, "group_size": 6, "completion": format!("<answer>\n{right}\n</answer>"), "answer": "7"})
    };
    let input = lines(&(0..60).map(|at| record(&format!("3:{}", at / 6), at % 6)).collect::<Vec<_>>());
    let score = |args: &[&str], input: &str| {
        let done = run(SCORE, args, input);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        done.records()
    };
    let rewards = |records: &[Value]| records.iter().map(|one| one["reward"].as_f64().unwrap()).collect::<Vec<_>>();
    let (honest, dealt) = (score(&[], &input), score(&["--placebo", "1"], &input));
    let sorted = |rewards: &[f64]| {
        let mut sorted = rewards.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted
    };
    let (real, wrong) = (rewards(&honest), rewards(&dealt));
    for (real, wrong) in real.chunks(6).zip(wrong.chunks(6)) {
        assert_eq!(sorted(real), sorted(wrong));
    }
    let moved = real.iter().zip(&wrong).filter(|(real, wrong)| real != wrong).count();
    assert!((15..45).contains(&moved), "{moved} of 60 rewards moved");
    let without = |records: &[Value]| {
        let mut records = records.to_vec();
        records.iter_mut().for_each(|one| drop(one.as_object_mut().unwrap().remove("reward")));
        records
    };
    assert_eq!(without(&honest), without(&dealt));
    // A run that is interrupted goes on with the same rewards; another seed deals others.
    let later: String = input.lines().skip(30).map(|line| format!("{line}\n")).collect();
    assert_eq!(score(&["--placebo", "1"], &later), dealt[30..]);
    assert_ne!(rewards(&score(&["--placebo", "2"], &input)), wrong);

    let cut: String = input.lines().take(8).map(|line| format!("{line}\n")).collect();
    let done = run(SCORE, &["--placebo", "1"], &cut);
    assert_eq!((done.code, done.records().len()), (Some(3), 6));
    assert!(done.stderr.contains("the input ended after 2 of the 6 in a group"), "{}", done.stderr);
    let lost: String =
        input.lines().enumerate().filter(|(at, _)| *at != 3).map(|(_, line)| format!("{line}\n")).collect();
    let done = run(SCORE, &["--placebo", "1"], &lost);
    assert_eq!((done.code, done.records().len()), (Some(3), 0));
    assert!(done.stderr.contains("-:6: group 3:0 has 5 of its 6 records"), "{}", done.stderr);
}

#[test]
fn score_has_the_ends_of_a_filter() {
    let input = lines(&vec![rollout("7"); 500]);
    check_help(SCORE, "score");
    check_missing_file(SCORE);
    check_closed_pipe(SCORE, &input);
    check_full_disk(SCORE, &input);
}

/// Texts of tags, newlines, digits and anything.
fn nasty_text() -> impl Strategy<Value = String> {
    let tags = "</?(reasoning|answer)>|\n|</|-?[0-9]{1,4}(,[0-9]{3})?[.%$]?";
    prop::collection::vec(prop_oneof![3 => tags, 1 => "\\PC{0,3}", 1 => any::<char>().prop_map(String::from)], 0..20)
        .prop_map(|parts| parts.concat())
}

/// Numbers with what stands around them, right and wrong.
fn answer_text() -> impl Strategy<Value = String> {
    let parts = "[$-]|[0-9]{1,3}|[.,' /]|\\\\(frac|text|boxed|d?frac)\\{|[{}()^%=*]| (million|cm|dollars|apples|and|x)|e[0-9]|[a-z]";
    (prop::collection::vec(parts, 0..8), "[1-9x]").prop_map(|(parts, last)| parts.concat() + &last)
}

proptest! {
    #[test]
    fn any_text_has_finite_rewards_within_their_bounds(completion in nasty_text(), answer in nasty_text()) {
        for semantics in [Semantics::Seed, Semantics::Fixed] {
            let score = scorer(semantics).score(&completion, Some(&answer), None);
            let most = [2.0, 0.5, 0.5, 0.5, 0.5];
            for ((_, value), most) in score.rewards.iter().zip(most) {
                prop_assert!(value.is_some_and(|value| value.is_finite() && value <= most));
            }
            prop_assert!(score.reward.is_some_and(f64::is_finite));
        }
    }

    #[test]
    fn math_is_symmetric_and_takes_what_it_read_for_itself(left in answer_text(), right in answer_text()) {
        let found = |text: &str| math::extract(&format!("<answer>{text}</answer>")).map(str::to_owned);
        let (Some(left), Some(right)) = (found(&left), found(&right)) else { return Ok(()) };
        let is_right = |left: &str, right: &str| math::is_correct(Some(left), right);
        prop_assert_eq!(is_right(&left, &right), is_right(&right, &left));
        prop_assert!(is_right(&left, &left));
    }

    #[test]
    fn what_is_strict_in_the_notebook_is_strict_when_mended_if_its_tags_stand_once(completion in nasty_text()) {
        let text = format!("<reasoning>\n{completion}\n</reasoning>\n<answer>\n7\n</answer>\n");
        let value = |semantics, at: usize| scorer(semantics).score(&text, None, None).rewards[at].1;
        let once = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"].iter().all(|tag| text.matches(tag).count() == 1);
        prop_assert_eq!(value(Semantics::Fixed, 2), Some(if once { 0.5 } else { 0.0 }));
        prop_assert!(!once || value(Semantics::Seed, 2) <= value(Semantics::Fixed, 2));
    }

    #[test]
    fn any_bytes_are_scored_or_refused(line in "\\PC*|\\{\"completion\":\\PC*") {
        let done = grpo_pipes::lines::record::Line { path: "x".into(), number: 1, text: line };
        let _ = scorer(Semantics::Fixed).score_line(&done, &mut Vec::new());
    }
}

/// 200 records that a command can tell apart.
fn numbered() -> Vec<Value> {
    (0..200).map(|i| json!({"n": i, "completion": "x", "answer": "1"})).collect()
}

/// Answers each record with its number, some of them late.
const ITS_NUMBER: &str = r#"while IFS= read -r line; do
    n=${line#*\"n\":}; n=${n%%,*}
    [ $((n % 50)) -ne 7 ] || sleep 0.3
    echo "$n"
done"#;

#[test]
fn a_command_gives_each_record_its_own_reward_whatever_copy_it_asks() {
    for jobs in ["1", "4"] {
        let records = scored(&["--command", ITS_NUMBER, "--jobs", jobs], &numbered());
        for (i, record) in records.iter().enumerate() {
            assert_eq!((&record["n"], &record["reward"]), (&json!(i), &json!(i as f64)));
            assert_eq!(record["rewards"], json!({"command": i as f64}));
        }
    }
}

#[test]
fn what_a_command_answers_is_added_to_the_rewards_by_name() {
    let command = r#"while read -r _; do echo '{"brief": 0.25, "kind": -1}'; done"#;
    let records = scored(&["--reward", "correctness=2", "--command", command], &[rollout("1000"), rollout("7")]);
    assert_eq!(records[0]["rewards"], json!({"correctness": 2.0, "brief": 0.25, "kind": -1.0}));
    assert_eq!((&records[0]["reward"], &records[1]["reward"]), (&json!(3.25), &json!(-0.75)));
    let null = scored(&["--command", "while read -r _; do echo null; done"], &[rollout("1000")]);
    assert_eq!((&null[0]["reward"], &null[0]["rewards"]), (&Value::Null, &json!({"command": null})));
}

#[test]
fn a_command_that_fails_names_the_record_and_what_came_before_is_kept() {
    let until = |n: u32, then: &str| {
        format!("i=0; while read -r _; do i=$((i + 1)); if [ $i -gt {n} ]; then {then}; else echo 1; fi; done")
    };
    for (command, message) in [
        (
            until(2, "exit 3"),
            "ended before it answered (exit status: 3); it must answer each line of its input with a line",
        ),
        (until(2, "exec sleep 100"), "gives no answer within 0.5 s"),
        (until(2, "echo good"), "answers \"good\", which is no number, null, or object of these"),
        (until(2, "echo '{\"correctness\": 1}'"), "and score both have a reward \"correctness\""),
    ] {
        let args = ["--reward", "correctness=1", "--command", &command, "--jobs", "1", "--timeout", "0.5"];
        let done = run(SCORE, &args, &lines(&numbered()[..5]));
        assert_eq!((done.code, done.records().len()), (Some(3), 2), "{message}: {}", done.stderr);
        assert!(
            done.stderr.starts_with("score: -:3: the command ") && done.stderr.trim_end().ends_with(message),
            "{}",
            done.stderr
        );
    }
    // Of one line too many for a record, a later record would get what is left over. It shows before the next record, or at the end.
    for (twice, place) in [
        ("while read -r _; do echo 1; echo 2; sleep 0.2; done", "the command "),
        ("while read -r _; do echo 1; done; echo 2", "score: the command "),
    ] {
        let done = run(SCORE, &["--command", twice, "--jobs", "1"], &lines(&numbered()[..5]));
        let said = format!("{place}answered an earlier record with a second line, \"");
        assert!(done.code == Some(3) && done.stderr.contains(&said), "{:?}: {}", done.code, done.stderr);
    }
    let done = run(SCORE, &["--command", "cat", "--timeout", "0"], "");
    assert_eq!((done.code, done.stderr.contains("--timeout must be above 0")), (Some(2), true), "{}", done.stderr);
}

/// The lines `score --command ...` of docs/rewards.md, with its `brief.py`, on records short and long.
#[test]
fn the_commands_of_the_page_on_rewards_score_as_it_says() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/rewards.md")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (_, brief) = page.split_once("# brief.py\n").unwrap();
    std::fs::write(dir.path().join("brief.py"), brief.split_once("```").unwrap().0).unwrap();
    let records =
        [json!({"completion": "short", "answer": "1"}), json!({"completion": "long ".repeat(1000), "answer": "1"})];
    std::fs::write(dir.path().join("rollouts.jsonl"), lines(&records)).unwrap();
    let asks_a_script = |line: &&str| line.starts_with("score ") && line.contains("--command '");
    let commands: Vec<&str> = page.lines().filter(asks_a_script).collect();
    assert_eq!(commands.len(), 3);
    for command in commands {
        let needs = ["jq", "python3"].into_iter().find(|needed| command.contains(needed));
        if let Some(needed) = needs.filter(|needed| Command::new(needed).arg("--version").output().is_err()) {
            println!("skipped, because there is no {needed}: {command}");
            continue;
        }
        let command = command.replacen("score", SCORE, 1);
        let done = Command::new("sh").args(["-c", &command]).current_dir(dir.path()).output().unwrap();
        let rewards: Vec<f64> = String::from_utf8(done.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["reward"].as_f64().unwrap())
            .collect();
        assert_eq!(rewards, [0.5, 0.0], "{command}: {}", String::from_utf8_lossy(&done.stderr));
    }
}

#[test]
fn rewards_of_length_and_repetition_are_there_on_request() {
    let record = |tokens: usize, text: &str| json!({"completion": text, "answer": "a b c", "completion_token_ids": vec![7; tokens]});
    let args = [
        "--reward",
        "length=1,soft_overlong=2,repetition=1,similarity=4",
        "--max-completion-tokens",
        "10",
        "--overlong-buffer",
        "4",
    ];
    let records = scored(&args, &[record(5, "a b c"), record(8, "a b c a b c"), record(99, "x")]);
    assert_eq!(
        records[0]["rewards"],
        json!({"length": -0.5, "soft_overlong": 0.0, "repetition": 0.0, "similarity": 1.0})
    );
    assert_eq!(records[1]["rewards"]["soft_overlong"], -0.5);
    assert_eq!(records[1]["rewards"]["repetition"], -0.25);
    assert_eq!(records[2]["reward"], -3.0);
    let without = scored(&["--reward", "length=1", "--max-completion-tokens", "10"], &[rollout("1000")]);
    assert_eq!((&without[0]["rewards"]["length"], &without[0]["reward"]), (&Value::Null, &Value::Null));
    for (args, message) in [
        (&["--reward", "length=1"][..], "length needs --max-completion-tokens"),
        (
            &["--reward", "soft_overlong=1", "--max-completion-tokens", "8"],
            "soft_overlong needs --max-completion-tokens and an --overlong-buffer",
        ),
        (
            &["--reward", "soft_overlong=1", "--max-completion-tokens", "8", "--overlong-buffer", "9"],
            "of at most as many",
        ),
    ] {
        let done = run(SCORE, args, "");
        assert_eq!((done.code, done.stderr.contains(message)), (Some(2), true), "{}", done.stderr);
    }
}
