//! `make verify`: the recorded rollouts of a run train the same weights again.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::runs::{Root, text};

/// Verifies steps 3 and 4; returns the exit code and what was said.
fn verify(root: &Root) -> (Option<i32>, String) {
    let done =
        root.script("verify.sh", &[("RUN", "run"), ("FROM", "step_000002"), ("TO", "step_000004")]).output().unwrap();
    (done.status.code(), text(&done.stdout) + &text(&done.stderr))
}

/// Changes one record of a compressed file.
fn change(path: &Path, change: impl Fn(&mut Value)) {
    let plain = zstd::decode_all(fs::File::open(path).unwrap()).unwrap();
    let mut records: Vec<Value> = text(&plain).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    change(&mut records[1]);
    let plain: String = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(path, zstd::encode_all(plain.as_bytes(), 3).unwrap()).unwrap();
}

#[test]
fn a_run_is_proved_by_its_records_and_a_change_of_any_is_named() {
    let whole = Root::new(&[("STEPS", "4"), ("SEED", "3")]);
    whole.train_whole();
    let before = whole.files();
    let (code, said) = verify(&whole);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("the recorded rollouts of steps 3 to 4 train step_000002 to step_000004, byte for byte"),
        "{said}"
    );
    assert_eq!(whole.files(), before, "nothing is left behind");

    let records = |step: u64| whole.run(&format!("rollouts/step_{step:06}.jsonl.zst"));
    let changed = |step: u64, by: &dyn Fn(&mut Value), message: &str| {
        let kept = fs::read(records(step)).unwrap();
        change(&records(step), by);
        let (code, said) = verify(&whole);
        assert!(matches!(code, Some(3 | 4)) && said.contains(message), "{code:?} {said}");
        fs::write(records(step), kept).unwrap();
    };
    changed(
        3,
        &|record| record["completion_token_ids"][0] = json!(5),
        "is not what the weights of runs/run/checkpoints/step_000002 sample",
    );
    changed(3, &|record| record["reward"] = json!(-7.5), "but the weights held are");
    changed(
        4,
        &|record| record["reward"] = json!(-7.5),
        "step_000004/model.safetensors is not what the recorded rollouts train",
    );

    let weights = whole.run("checkpoints/step_000004/optimizer.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let (code, said) = verify(&whole);
    assert_eq!((code, said.contains("step_000004/optimizer.safetensors is not what")), (Some(4), true), "{said}");
}

#[test]
fn what_cannot_be_verified_is_refused() {
    let root = Root::new(&[("STEPS", "2")]);
    let of = |more: &[(&str, &str)]| {
        let done = root.script("verify.sh", more).output().unwrap();
        (done.status.code(), text(&done.stderr))
    };
    let (code, said) = of(&[("RUN", "run")]);
    assert_eq!((code, said.contains("usage: make verify RUN=name FROM=step_000100")), (Some(2), true), "{said}");
    let (code, said) = of(&[("RUN", "none"), ("FROM", "step_000000"), ("TO", "step_000002")]);
    assert_eq!((code, said.contains("no run runs/none")), (Some(2), true), "{said}");
}
