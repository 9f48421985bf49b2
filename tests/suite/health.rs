//! Each thing that keeps a run from learning is named, in its metrics and in one line.

use std::fs;

use serde_json::Value;

use crate::grpo_step::{Folder, SCORED};
use crate::runs::{Root, text};

/// The name in the metrics of one step on these records, after the same was told in one line.
fn named(records: &[Value], options: &str) -> Option<String> {
    let done = Folder::new().step("one", options, records);
    let named = done.records()[0].get("health").map(|name| name.as_str().unwrap().to_owned());
    let told: Vec<_> = done.stderr.lines().filter(|line| line.contains(": health: ")).collect();
    match &named {
        Some(name) => {
            assert_eq!(told.len(), 1, "{}", done.stderr);
            assert!(told[0].starts_with(&format!("grpo-step: step 1: health: {name}: ")), "{}", told[0]);
        }
        None => assert_eq!(told, [""; 0]),
    }
    named
}

/// The scored records, each of them changed.
fn all(change: impl Fn(&mut Value)) -> Vec<Value> {
    let mut records = SCORED.clone();
    records.iter_mut().for_each(change);
    records
}

#[test]
fn what_a_step_alone_shows_is_named() {
    assert_eq!(named(&all(|record| record["finish_reason"] = "stop".into()), ""), None);
    let unscored = all(|record| record["reward"] = Value::Null);
    assert_eq!(named(&unscored, "").as_deref(), Some("reward_null"));
    let cut_off = all(|record| record["finish_reason"] = "length".into());
    assert_eq!(named(&cut_off, "").as_deref(), Some("all_truncated"));
    let equal = all(|record| (record["reward"], record["finish_reason"]) = (1.0.into(), "stop".into()));
    assert_eq!(named(&equal, "").as_deref(), Some("no_signal"));
    let off = all(|record| {
        record["finish_reason"] = "stop".into();
        record["logprobs"].as_array_mut().unwrap().iter_mut().for_each(|x| *x = (x.as_f64().unwrap() - 0.03).into());
    });
    assert_eq!(named(&off, "").as_deref(), Some("sampler_mismatch"));
    assert_eq!(named(&off, "--logprob-band 0.07"), None);
    let mut one_scored = unscored;
    (one_scored[0]["reward"], one_scored[0]["finish_reason"]) = (1.0.into(), "stop".into());
    assert_eq!(
        named(&one_scored, "").as_deref(),
        Some("no_signal"),
        "one completion of a group has nothing to be better than"
    );
}

/// A run of this many steps whose stage in the middle gives each record what `fields` prints of its step and sample.
fn run(steps: &str, numbers: &[(&'static str, &str)], fields: &str) -> Root {
    let own = [("STEPS", steps), ("SAVE_EVERY", "20"), ("SCORER", "bash ./scorer.sh")];
    let root = Root::new(&[&own, numbers].concat());
    let scorer = format!(
        r#"while IFS= read -r line; do
    [[ $line =~ \"policy_step\":([0-9]+) ]] && step=${{BASH_REMATCH[1]}}
    [[ $line =~ \"sample_index\":([0-9]+) ]] && sample=${{BASH_REMATCH[1]}}
    printf '%s,%s}}\n' "${{line%\}}}}" "{fields}"
done
"#
    );
    fs::write(root.path("scorer.sh"), scorer).unwrap();
    root
}

/// The names in a run's metrics, each with the first and the last step that has it.
fn causes(root: &Root) -> Vec<(String, u64, u64)> {
    let mut causes: Vec<(String, u64, u64)> = Vec::new();
    for line in fs::read_to_string(root.run("metrics.jsonl")).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let step = line["policy_step"].as_u64().unwrap();
        let Some(name) = line["health"].as_str() else { continue };
        match causes.iter_mut().find(|(known, ..)| known == name) {
            Some(cause) => cause.2 = step,
            None => causes.push((name.into(), step, step)),
        }
    }
    causes
}

#[test]
fn format_that_rises_alone_is_named_by_a_run_that_was_interrupted_too() {
    let fields = r#"\"rewards\":{\"soft_format\":0.$((step + 10)),\"correctness\":0.5},\"reward\":$((sample * 3 % 4))"#;
    let root = run("44", &[], fields);
    let done = root.train(&[]);
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{said}");
    let found = causes(&root).into_iter().find(|(name, ..)| name == "format_only");
    assert_eq!(found, Some(("format_only".into(), 40, 44)), "{said}");
    assert_eq!(
        said.matches("grpo-step: step 40: health: format_only: rewards for format rise and correctness does not")
            .count(),
        1,
        "{said}"
    );
    assert_eq!(said.matches("health: format_only").count(), 1, "{said}");

    let again = root.back_to(20);
    fs::copy(root.path("scorer.sh"), again.path("scorer.sh")).unwrap();
    again.train_whole();
    again.assert_same_files(&root);
}

#[test]
fn a_policy_that_learns_to_say_one_thing_has_collapsed() {
    // The longer a record, the worse: what is left is the shortest answer.
    let numbers = [("LEARNING_RATE", "1e-2"), ("NUM_GENERATIONS", "8"), ("SCHEDULE", "constant")];
    let root = run("60", &numbers, r#"\"reward\":-${#line}"#);
    let done = root.train(&[]);
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{said}");
    let found = causes(&root);
    assert!(found.iter().any(|(name, ..)| name == "entropy_collapse"), "{found:?}");
    assert!(said.contains(": health: entropy_collapse: entropy is below a twentieth of its initial value"), "{said}");
}

#[test]
fn rewards_that_are_always_null_are_named_at_once() {
    let root = run("3", &[], r#"\"reward\":null"#);
    let done = root.train(&[]);
    let said = text(&done.stderr);
    assert_eq!(causes(&root), [("reward_null".into(), 1, 3)], "{said}");
    assert!(said.contains("grpo-step: step 1: health: reward_null: no completion has a reward"), "{said}");
    assert_eq!(said.matches("health: ").count(), 1, "{said}");
}
