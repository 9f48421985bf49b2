//! Checkpoints that are not what was written: named, and an older one is taken, with the same bytes at the end.

use std::fs;
use std::path::Path;

use crate::runs::{Root, text};

/// Does something bad to a file.
type Harm = fn(&Path);

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn shorten(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_taken() {
    let whole = Root::new(&[("STEPS", "6"), ("MAX_STALENESS", "1")]);
    whole.train_whole();
    let weights = "model.safetensors: damaged: not the bytes that were written";
    let older = "older/step_000003/model.safetensors";
    let cases: [(&str, Harm, &str); 8] = [
        (older, flip, weights),
        (older, remove, "step_000003/model.safetensors: missing"),
        ("model.safetensors", flip, weights),
        ("model.safetensors", shorten, weights),
        ("optimizer.safetensors", flip, "optimizer.safetensors: damaged: not the bytes that were written"),
        ("tokenizer.json", remove, "tokenizer.json: missing"),
        ("state.json", flip, "state.json: damaged: "),
        ("state.json", remove, "state.json: missing"),
    ];
    for (name, harm, what) in cases {
        let root = whole.back_to(4);
        harm(&root.run("checkpoints/step_000004").join(name));
        let done = root.train(&[]);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(0), "{said}");
        let told = said.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{name}: {said}"));
        assert!(told.starts_with("grpo-step: runs/run/checkpoints/step_000004/"), "{told}");
        assert!(told.ends_with("; going on from runs/run/checkpoints/step_000002"), "{told}");
        root.assert_same_files(&whole);
    }
}

#[test]
fn a_finished_run_makes_its_damaged_end_again_before_it_is_exported() {
    let whole = Root::new(&[("STEPS", "6")]);
    whole.train_whole();
    let root = whole.back_to(6);
    for step in [6, 4, 2] {
        flip(&root.run(&format!("checkpoints/step_{step:06}/model.safetensors")));
    }
    let done = root.train(&[]);
    let said = text(&done.stderr);
    assert!(
        said.contains("step_000002/model.safetensors: damaged: not the bytes that were written; going on from "),
        "{said}"
    );
    assert!(said.contains("; going on from runs/run/checkpoints/step_000000\n"), "{said}");
    root.assert_same_files(&whole);
}

#[test]
fn without_a_whole_checkpoint_a_run_ends_with_what_is_wrong() {
    let root = Root::new(&[("STEPS", "6")]);
    root.train_whole();
    fs::remove_dir_all(root.run("export")).unwrap();
    for step in [6, 4, 2, 0] {
        flip(&root.run(&format!("checkpoints/step_{step:06}/model.safetensors")));
    }
    let before = root.files();
    let done = root.train(&[]);
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("step_000000/model.safetensors: damaged: not the weights that step 1 was sampled from; no older checkpoint is intact\n"), "{said}");
    assert!(said.contains("runs/run stopped at step 6: "), "{said}");
    assert_eq!(root.files(), before, "nothing is removed");
}
