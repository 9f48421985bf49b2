//! `make fork`: a new run from a checkpoint of an old one.

use std::fs;

use crate::runs::{Root, text};

#[test]
fn a_fork_without_changes_ends_as_the_original_and_one_with_a_change_keeps_to_it() {
    // The next step is sampled from weights of before the checkpoint: these come along, too.
    let whole = Root::new(&[("STEPS", "6"), ("MAX_STALENESS", "1")]);
    whole.train_whole();
    let has_recipe = |name: &str| name.ends_with("recipe.env") || name.ends_with("export/README.md");
    let fork = |more: &[(&str, &str)]| {
        let root = whole.back_to(6);
        fs::rename(root.run(""), root.path("runs/old")).unwrap();
        let all = [&[("RUN", "old"), ("FROM", "step_000004")], more].concat();
        let done = root.script("fork.sh", &all).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert_eq!(fs::read_dir(root.run("rollouts")).unwrap().count(), 4);
        assert_eq!(fs::read_to_string(root.run("metrics.jsonl")).unwrap().lines().count(), 4);
        assert!(!root.run("checkpoints/step_000006").exists());
        root.train_whole();
        let mut files = root.files();
        files.retain(|name, _| name.starts_with("runs/run/") && !has_recipe(name));
        (root, files)
    };
    let mut original = whole.files();
    original.retain(|name, _| !has_recipe(name));
    let (root, same) = fork(&[]);
    assert_eq!(same, original);
    let recipe = fs::read_to_string(root.run("recipe.env")).unwrap();
    assert!(recipe.starts_with("FORK=old/step_000004\n"), "{recipe}");

    // The change is not named again: the run knows it.
    let (root, other) = fork(&[("LEARNING_RATE", "1e-5")]);
    let recipe = fs::read_to_string(root.run("recipe.env")).unwrap();
    assert!(recipe.contains("\nLEARNING_RATE=1e-5\n"), "{recipe}");
    for (name, same) in [("rollouts/step_000005.jsonl.zst", true), ("checkpoints/step_000006/model.safetensors", false)]
    {
        let name = format!("runs/run/{name}");
        assert_eq!(original[&name] == other[&name], same, "{name}");
    }
    let done = root.train(&[("LEARNING_RATE", "2e-5")]);
    assert_eq!(done.status.code(), Some(2));
    let said = text(&done.stderr);
    assert!(said.contains("now: LEARNING_RATE=2e-5") && said.contains("make fork RUN=run FROM=step_000006"), "{said}");
}

#[test]
fn a_fork_of_what_is_not_there_is_refused() {
    let root = Root::new(&[("STEPS", "4")]);
    root.train_whole();
    let cases = [
        (&[("RUN", "run")][..], "usage: make fork"),
        (&[("RUN", "none"), ("FROM", "step_000002")], "no run runs/none"),
        (
            &[("RUN", "run"), ("FROM", "step_000003"), ("NAME", "b")],
            "runs/run has no checkpoint step_000003; there are: step_000000 ",
        ),
        (&[("RUN", "run"), ("FROM", "step_000002")], "runs/run exists already"),
        (&[("RUN", "run"), ("FROM", "step_000004"), ("NAME", "b")], "nothing is left to do after step_000004"),
        (
            &[("RUN", "run"), ("FROM", "step_000002"), ("NAME", "b"), ("STEPS", "9")],
            "STEPS=9 take 18 prompts, and runs/run has 8",
        ),
    ];
    for (numbers, what) in cases {
        let done = root.script("fork.sh", numbers).output().unwrap();
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{said}");
        assert!(said.contains(what), "{said}");
        assert_eq!(fs::read_dir(root.path("runs")).unwrap().count(), 1);
    }
}
