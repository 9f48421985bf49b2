//! A disk that takes its time over a checkpoint, by way of a library that is loaded before the system's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::runs::{Root, text};

/// `None` where there is no way to load it.
fn library(dir: &Path) -> Option<PathBuf> {
    if !cfg!(all(target_os = "linux", target_env = "gnu")) {
        eprintln!("left out: needs Linux with glibc");
        return None;
    }
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let (source, out) = (concat!(env!("CARGO_MANIFEST_DIR"), "/tests/suite/slow_disk.c"), dir.join("slow_disk.so"));
    let done = Command::new(compiler).args(["-shared", "-fPIC", "-O1", "-o"]).arg(&out).arg(source).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    Some(out)
}

#[test]
fn training_goes_on_while_a_checkpoint_is_written() {
    let whole = Root::new(&[("STEPS", "5"), ("SAVE_EVERY", "2")]);
    let Some(library) = library(&whole.path("")) else { return };
    whole.train_whole();
    let root = whole.back_to_the_start();
    let hold = root.path("hold");
    fs::write(&hold, "").unwrap();
    let slow = [("LD_PRELOAD", library.to_str().unwrap()), ("HELD", "step_000002"), ("HOLD", hold.to_str().unwrap())];
    let mut run = root.start_with(&slow);
    // The next checkpoint waits for this one, and step 4 is its last.
    run.wait_for(&root.run("rollouts/step_000004.jsonl.zst"));
    assert_eq!(fs::read_link(root.run("policy")).unwrap(), Path::new("checkpoints/step_000000"));
    fs::remove_file(&hold).unwrap();
    let (code, said) = run.end_of_it();
    assert_eq!(code, Some(0), "{said}");
    root.assert_same_files(&whole);
}
