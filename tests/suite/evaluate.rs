//! `evaluate` as a process, behind `score` and alone.

use serde_json::{Value, json};

use crate::process::{Finished, check_closed_pipe, check_full_disk, check_help, check_missing_file, run};

const EVALUATE: &str = env!("CARGO_BIN_EXE_evaluate");
const SCORE: &str = env!("CARGO_BIN_EXE_score");

fn rollout(group: &str, sample: usize, completion: &str) -> Value {
    json!({
        "group_id": group, "sample_index": sample, "policy_step": 3, "temperature": 1.0, "answer": "1,000",
        "completion_token_ids": vec![7; 10 + sample], "finish_reason": if sample == 3 { "length" } else { "stop" },
        "completion": completion,
    })
}

/// Two prompts of four completions: 3 and 1 right in their tags, one more right by its last number.
fn rollouts() -> String {
    let right = "<reasoning>\nr\nr\n</reasoning>\n<answer>\n$1000\n</answer>\n";
    let loose = "It is 1000.0.";
    let wrong = "<reasoning>\nr\n</reasoning>\n<answer>\n999\n</answer>\n";
    let of = |group: &str, texts: [&str; 4]| -> String {
        texts.iter().enumerate().map(|(sample, text)| format!("{}\n", rollout(group, sample, text))).collect()
    };
    of("3:a", [right, right, right, wrong]) + &of("3:b", [wrong, loose, wrong, right])
}

fn scored() -> String {
    let done = run(SCORE, &[], &rollouts());
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    done.stdout
}

fn summary(args: &[&str], input: &str) -> Value {
    let done = run(EVALUATE, args, input);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    serde_json::from_str(&done.stdout).unwrap()
}

#[test]
fn json_holds_rates_means_and_pass_at_k() {
    let got = summary(&["--json", "-"], &scored());
    assert_eq!(
        (got["num_prompts"].as_u64(), got["num_completions"].as_u64(), got["num_judged"].as_u64()),
        (Some(2), Some(8), Some(8))
    );
    assert_eq!((&got["policy_step"], &got["temperature"], &got["policy_id"]), (&json!(3), &json!(1.0), &Value::Null));
    for (name, value) in [("strict", 0.5), ("flexible", 0.625)] {
        assert_eq!(got[format!("accuracy_{name}")]["value"], value, "{name}");
    }
    assert_eq!(
        (got["format_rate"]["value"].as_f64(), got["truncation_rate"]["value"].as_f64()),
        (Some(0.875), Some(0.25))
    );
    assert_eq!(got["mean_length_tokens"], 11.5);
    assert_eq!(got["rewards"]["correctness"], 1.0);
    assert_eq!(got["rewards"]["int"], 0.4375);
    // k = 2: of the six pairs, prompt a has six with a right one and prompt b three.
    let pass = |k: &str| got["pass_at_k"][k].as_f64().unwrap();
    assert!((pass("1") - 0.5).abs() < 1e-12 && (pass("2") - 0.75).abs() < 1e-12 && (pass("4") - 1.0).abs() < 1e-12);
    assert_eq!(got["pass_at_k"].as_object().unwrap().len(), 3);
    let interval = &got["accuracy_strict"];
    assert!(
        interval["low"].as_f64() > Some(0.0)
            && interval["low"].as_f64() < Some(0.2)
            && interval["high"].as_f64() > Some(0.8)
    );
}

/// Equal numbers are one vote, however they are written; what extracts nothing has none.
#[test]
fn the_answer_of_most_completions_is_right_or_wrong_for_the_prompt() {
    let answer = |text: &str| format!("<reasoning>\nr\n</reasoning>\n<answer>\n{text}\n</answer>\n");
    let of = |group: &str, texts: [&str; 4]| -> String {
        texts.iter().enumerate().map(|(i, text)| format!("{}\n", rollout(group, i, &answer(text)))).collect()
    };
    let rollouts = of("a", ["999", "1,000", "1000", "5"]) + &of("b", ["1000", "7", "8", "7.0"]);
    let scored = run(SCORE, &[], &rollouts).stdout;
    let got = &summary(&["--json"], &scored)["maj_at_k"];
    assert_eq!(*got, json!({"1": 0.5, "2": 0.5, "4": 0.5}));
    let scored = run(SCORE, &[], &of("a", ["999", "1,000", "1000", "5"])).stdout;
    assert_eq!(summary(&["--json"], &scored)["maj_at_k"], json!({"1": 0.0, "2": 0.0, "4": 1.0}));
}

#[test]
fn two_models_are_compared_prompt_by_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let scored = |name: &str, policy: u64, right: &dyn Fn(usize) -> bool, prompts: std::ops::Range<usize>| {
        let record = |prompt: usize| {
            let correctness = if right(prompt) { 2.0 } else { 0.0 };
            json!({"group_id": format!("{policy}:{prompt}"), "prompt_id": prompt.to_string(), "completion": "x",
                   "rewards": {"correctness": correctness}})
            .to_string()
                + "\n"
        };
        let path = folder.path().join(name);
        std::fs::write(&path, prompts.map(record).collect::<String>()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let before = scored("before.jsonl", 0, &|prompt| prompt % 2 == 0, 0..100);
    let after = scored("after.jsonl", 9, &|prompt| prompt % 2 == 0 && prompt > 3 || prompt % 8 == 1, 0..90);
    let got = summary(&["--json", &after, "--baseline", &before], "");
    let paired = &got["paired"];
    assert_eq!((&paired["num_prompts"], &paired["num_unpaired"]), (&json!(90), &json!(10)));
    assert_eq!((&paired["better"], &paired["worse"]), (&json!(12), &json!(2)));
    // python3: from scipy.stats import binomtest; binomtest(2, 14).pvalue
    assert!((paired["p_value"].as_f64().unwrap() - 0.012_939_453).abs() < 1e-8);
    let difference = |name: &str| paired["difference"][name].as_f64().unwrap();
    assert!((difference("value") - 10.0 / 90.0).abs() < 1e-12);
    assert!(
        difference("low") > 0.02 && difference("low") < 0.06 && difference("high") > 0.16 && difference("high") < 0.2
    );
    assert_eq!(got["accuracy_strict"]["value"], paired["accuracy"]);
    let table = run(EVALUATE, &[&after, "--baseline", &before], "");
    assert!(
        table.stdout.contains("prompts better            12   2 worse; p = 1.29e-2 (exact test)"),
        "{}",
        table.stdout
    );
    let got = summary(&["--json", &after, "--baseline", &before, "--power", "0.05"], "");
    assert_eq!(got["paired"]["prompts_to_show"], json!([[0.05, 487]]));
    let pooled = summary(&["--json", &after, &after, "--baseline", &before], "");
    assert_eq!(pooled["paired"]["better"], 12, "files of one model are pooled by prompt");
    let none = scored("none.jsonl", 0, &|_| true, 200..201);
    let done = run(EVALUATE, &[&after, "--baseline", &none], "");
    assert_eq!(done.code, Some(3));
    assert!(done.stderr.contains("no problem of --baseline is among those evaluated"), "{}", done.stderr);
}

/// Half of the completions are right, so of two such models that are right independently, half of the answers disagree.
#[test]
fn how_many_prompts_a_difference_takes_is_said_of_one_model_too() {
    // python3: from math import ceil; f = lambda d, p: ceil((1.959963984540054*p**.5 + 0.8416212335729142*(p-d*d)**.5)**2/d**2)
    // print(f(.05, .5), f(.1, .5), f(.05, 14/90))
    let needed = [1568, 391];
    let got = summary(&["--json", "--power", "0.05,0.1"], &scored());
    assert_eq!(got["prompts_to_show"], json!([[0.05, needed[0]], [0.1, needed[1]]]));
    let table = run(EVALUATE, &["--power", "0.05,0.1"], &scored()).stdout;
    let line = format!("\nwould show          5 in {}, 10 in {}   points, among so many prompts", needed[0], needed[1]);
    assert!(table.contains(&line), "{table}");
    for wrong in ["0", "1.5", "-1", "x", "nan"] {
        let done = run(EVALUATE, &[&format!("--power={wrong}")], &scored());
        assert!(done.code == Some(2) && done.stderr.contains("not a number above 0"), "{}", done.stderr);
    }
}

#[test]
fn a_study_is_ranked_and_compared_seed_by_seed() {
    let folder = tempfile::tempdir().unwrap();
    let made = summary(&["--json"], &scored());
    let run_of = |name: &str, sampled: f64, greedy: f64| {
        let dir = folder.path().join(name);
        std::fs::create_dir_all(dir.join("eval")).unwrap();
        for (kind, value) in [("sampled", sampled), ("greedy", greedy)] {
            let mut summary = made.clone();
            summary["accuracy_strict"]["value"] = json!(value);
            std::fs::write(dir.join(format!("eval/after.{kind}.json")), summary.to_string()).unwrap();
        }
        dir.to_str().unwrap().to_owned()
    };
    let runs = [
        run_of("base-line-1", 0.5, 0.6),
        run_of("base-line-2", 0.7, 0.8),
        run_of("alone-2", 0.1, 0.2),
        run_of("better-1", 0.62, 0.7),
        run_of("better-2", 0.8, 0.7),
    ];
    let args: Vec<&str> = std::iter::once("--study").chain(runs.iter().map(String::as_str)).collect();
    let done = run(EVALUATE, &args, "");
    // python3: from scipy.stats import t; t.ppf(0.975, 1) * 0.1; t.ppf(0.975, 1) * 0.01; t.ppf(0.975, 1) * 0.09
    let want = [
        "strict accuracy on 2 held-out problems, 8 completions; 95 % intervals over seeds",
        "variant    seeds     sampled [%]   against base-line      greedy [%]      format [%]",
        "better         2   71.0 +- 114.4       +11.0 +- 12.7     70.0 +- 0.0     87.5 +- 0.0",
        "base-line      2   60.0 +- 127.1                   -   70.0 +- 127.1     87.5 +- 0.0",
        "alone          1            10.0               -60.0            20.0            87.5",
    ];
    assert_eq!((done.code, done.stdout.lines().collect::<Vec<_>>()), (Some(0), want.to_vec()), "{}", done.stderr);

    let other = run_of("other-1", 0.5, 0.5);
    let path = format!("{other}/eval/after.sampled.json");
    std::fs::write(&path, made.to_string().replace("\"num_prompts\":2", "\"num_prompts\":3")).unwrap();
    let refused = |run_dir: &str, code: i32, what: &str| {
        let done = run(EVALUATE, &["--study", &runs[0], run_dir], "");
        assert_eq!((done.code, &*done.stdout), (Some(code), ""), "{}", done.stderr);
        assert!(done.stderr.contains(what), "{}", done.stderr);
    };
    refused(&other, 3, "other-1: was not evaluated on as many problems and completions as the runs before it");
    std::fs::remove_file(&path).unwrap();
    refused(&other, 1, "other-1/eval/after.sampled.json: No such file");
    refused(folder.path().join("x").to_str().unwrap(), 2, "the directory of a run of a study is named VARIANT-SEED");
}

#[test]
fn files_add_up_to_one_total() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a.jsonl", "b.jsonl"].map(|name| folder.path().join(name));
    let scored = scored();
    let (first, second) = scored.split_at(scored.lines().take(3).map(|line| line.len() + 1).sum());
    std::fs::write(&paths[0], first).unwrap();
    std::fs::write(&paths[1], second).unwrap();
    let [a, b] = paths.each_ref().map(|path| path.to_str().unwrap());
    assert_eq!(summary(&["--json", a, b], ""), summary(&["--json"], &scored));
}

#[test]
fn the_table_reads_as_it_always_did() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/evaluate_table.txt");
    let table = run(EVALUATE, &[], &scored()).stdout;
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    assert_eq!(table, std::fs::read_to_string(&path).unwrap());
}

#[test]
fn evaluations_before_and_after_are_compared_pair_by_pair() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (before, after, greedy) = (path("before.json"), path("after.json"), path("greedy.json"));
    let made = summary(&["--json"], &scored());
    std::fs::write(&before, made.to_string()).unwrap();
    let mut better = made.clone();
    better["accuracy_strict"]["value"] = json!(1.0);
    better["truncation_rate"] = Value::Null;
    std::fs::write(&after, better.to_string()).unwrap();
    let mut cold = made;
    cold["temperature"] = json!(0.0);
    std::fs::write(&greedy, cold.to_string()).unwrap();

    let done = run(EVALUATE, &["--compare", &greedy, &greedy, "--compare", &before, &after], "");
    let want = [
        "2 held-out problems                    before      after",
        "greedy: accuracy strict                50.0 %     50.0 %",
        "greedy: accuracy flexible              62.5 %     62.5 %",
        "greedy: format rate                    87.5 %     87.5 %",
        "greedy: truncation rate                25.0 %     25.0 %",
        "sampled: accuracy strict               50.0 %    100.0 %",
        "sampled: accuracy flexible             62.5 %     62.5 %",
        "sampled: format rate                   87.5 %     87.5 %",
        "sampled: truncation rate               25.0 %          -",
    ];
    assert_eq!((done.code, done.stdout.lines().collect::<Vec<_>>()), (Some(0), want.to_vec()), "{}", done.stderr);

    let done = run(EVALUATE, &["--compare", &greedy, &after], "");
    assert_eq!(done.code, Some(3));
    assert!(done.stderr.contains("compare evaluations that were made alike"), "{}", done.stderr);
    std::fs::write(&after, "{}").unwrap();
    let done = run(EVALUATE, &["--compare", &before, &after], "");
    assert_eq!(done.code, Some(3));
    assert!(done.stderr.contains("after.json: not what `evaluate --json` writes: "), "{}", done.stderr);
    assert_eq!(run(EVALUATE, &["--compare", &before], "").code, Some(2));
}

#[test]
fn what_cannot_be_judged_counts_nowhere() {
    let records = [
        json!({"group_id": "a", "completion": "7", "rewards": {"mine": 1}, "reward": null}),
        json!({"group_id": "b", "completion": "7", "answer": "7", "rewards": {"mine": null, "correctness": null}, "policy_step": 1}),
    ];
    let got = summary(&["--json"], &records.map(|record| format!("{record}\n")).concat());
    assert_eq!((&got["num_completions"], &got["num_judged"]), (&json!(2), &json!(0)));
    for name in ["accuracy_strict", "format_rate", "truncation_rate", "mean_length_tokens", "reward"] {
        assert!(got[name].is_null(), "{name}");
    }
    assert_eq!(got["accuracy_flexible"]["value"], 1.0);
    assert_eq!((&got["rewards"]["mine"], &got["rewards"]["correctness"]), (&json!(1.0), &Value::Null));
    assert_eq!((&got["policy_step"], &got["pass_at_k"]), (&json!("mixed"), &json!({})));
}

#[test]
fn records_that_are_not_scored_are_refused() {
    let cases = [
        (r#"{"group_id":"a","completion":""}"#, "-:1: no field \"rewards\" and no \"reward\": run score first"),
        (r#"{"completion":"","rewards":{}}"#, "-:1: no field \"group_id\", \"prompt_id\" or \"prompt\" says"),
        (r#"{"prompt_id":[7],"completion":"","rewards":{}}"#, "-:1: field \"prompt_id\" is neither"),
        (r#"{"group_id":"a","completion":"","rewards":{"int":"x"}}"#, "-:1: field \"rewards\": \"int\" is neither"),
        ("[]", "-:1: not a JSON object"),
        ("", "no completions to evaluate"),
    ];
    for (line, want) in cases {
        let Finished { code, stdout, stderr } = run(EVALUATE, &[], line);
        assert_eq!((code, stdout.as_str()), (Some(3), ""), "{line}");
        assert!(stderr.starts_with(&format!("evaluate: {want}")), "{stderr}");
    }
}

#[test]
fn evaluate_has_the_ends_of_a_filter() {
    check_help(EVALUATE, "evaluate");
    check_missing_file(EVALUATE);
    check_closed_pipe(EVALUATE, &scored());
    check_full_disk(EVALUATE, &scored());
}
