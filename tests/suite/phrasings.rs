//! What the tiny recipe's model makes of questions in the words of somebody who has not seen the templates.

use std::process::Stdio;

use grpo_pipes::reward::number::Number;

use crate::process::run;
use crate::runs::{Root, text};

/// A question and its answer a line, written by hand. No template was made from one.
const PHRASINGS: &str = include_str!("../fixtures/phrasings.tsv");

#[test]
fn half_of_fifty_fresh_phrasings_are_answered_rightly() {
    let root = Root::new(&[]);
    let mut train = root.script("train.sh", &[("TEST_PROMPTS", "16"), ("TEST_SAMPLES", "1")]);
    for number in ["SUPERVISED_STEPS", "STEPS", "SAVE_EVERY", "PROMPTS_PER_STEP", "NUM_GENERATIONS"] {
        train.env_remove(number); // as the recipe has them
    }
    let done = train.stdout(Stdio::null()).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));

    let rows: Vec<_> = PHRASINGS.lines().map(|line| line.split_once('\t').unwrap()).collect();
    assert_eq!(rows.len(), 50);
    let questions: String = rows.iter().map(|(question, _)| format!("{question}\n")).collect();
    let model = root.run("export");
    let arguments = ["--text", "--model", model.to_str().unwrap(), "--temperature", "0"];
    let done = run(env!("CARGO_BIN_EXE_rollout"), &arguments, &questions);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let records = done.records();
    let is_right = |(record, (_, answer)): &(&serde_json::Value, &(&str, &str))| {
        Number::last_in(record["completion"].as_str().unwrap()) == Number::parse(answer)
    };
    let right = records.iter().zip(&rows).filter(is_right).count();
    assert!(right >= 25, "{right} of 50");
}
