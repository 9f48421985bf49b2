//! Numbers that are not finite in the middle of a run: code 4, and nothing of it is published.

use std::fs;

use crate::runs::{Root, text};

/// Rewards that differ within a group, and after so many records ones that have no sum.
fn scorer(sane: u32) -> String {
    format!(
        r#"while IFS= read -r line; do
    at=$((at + 1))
    if [ $at -gt {sane} ] && [ $((at % 4)) != 0 ]; then reward=1.7e308; else reward=$((at % 3)); fi
    printf '%s,"reward":%s}}\n' "${{line%\}}}}" "$reward"
done
"#
    )
}

/// Trains with 8 records a step, and again; what was said when it failed first, what was published then, and how it ended again.
fn broken(numbers: &[(&'static str, &str)], sane: u32) -> (String, String, Option<i32>) {
    let root = Root::new(&[numbers, &[("SCORER", "bash ./scorer.sh"), ("SAVE_EVERY", "3")]].concat());
    fs::write(root.path("scorer.sh"), scorer(sane)).unwrap();
    let done = root.train(&[]);
    assert_eq!(done.status.code(), Some(1));
    let published = fs::read_link(root.run("policy")).unwrap().display().to_string();
    let checkpoints = fs::read_dir(root.run("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    let youngest = checkpoints.max().unwrap().into_string().unwrap();
    assert!(published.ends_with(&youngest), "{published} {youngest}");
    (text(&done.stderr), youngest, root.train(&[]).status.code())
}

#[test]
fn a_loss_that_is_not_finite_publishes_nothing() {
    let (said, policy, again) = broken(&[], 4 * 8);
    assert!(said.contains("grpo-step: the loss is not finite; nothing was published\n"), "{said}");
    assert!(said.contains("grpo-step ended with code 4"), "{said}");
    assert_eq!(policy, "step_000003", "step 4 was finished, but its weights never published");
    assert_eq!(again, Some(0), "the stage counts from where the run goes on, and gives sane rewards");
}

#[test]
fn weights_that_cannot_be_sampled_from_are_not_published() {
    let (said, policy, again) = broken(&[("LEARNING_RATE", "1e30")], 1000);
    assert!(said.contains("logits are not finite"), "{said}");
    let told = "grpo-step: with the weights of step 1 the sampler's numbers are not finite; nothing after step 0 was published";
    assert!(said.contains(told), "{said}");
    assert!(said.contains("rollout ended with code 4, grpo-step ended with code 4"), "{said}");
    assert_eq!((policy.as_str(), again), ("step_000000", Some(1)));
}
