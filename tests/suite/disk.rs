//! Disks that are really full, in a name space of mounts of the test's own.

use std::fs;
use std::process::Command;

use crate::runs::{Root, news, text};

/// Whether such name spaces can be had here.
fn can_mount() -> bool {
    let can = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]).output();
    let can = can.is_ok_and(|done| done.status.success());
    if !can {
        eprintln!("left out: mounts need root, or user name spaces");
    }
    can
}

/// Runs a shell script in the root of a run, where it may mount.
fn in_own_mounts(root: &Root, script: &str, more: &[(&str, &str)]) -> (Option<i32>, String) {
    let train = root.script("train.sh", more);
    let mut command = Command::new("unshare");
    command.args(["-rm", "bash", "-euc", script]).current_dir(root.path(""));
    command.envs(train.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let done = command.output().unwrap();
    (done.status.code(), text(&done.stderr))
}

#[test]
fn a_full_disk_ends_a_run_in_one_line_and_with_room_it_goes_on_to_the_same_bytes() {
    if !can_mount() {
        return;
    }
    let whole = Root::new(&[("STEPS", "6")]);
    whole.train_whole();
    // Not enough for the first rollouts, for the weights of a checkpoint, for its moments.
    for kilobytes in ["4", "300", "900"] {
        let root = whole.back_to_the_start();
        let script = "
            mv runs begun && mkdir runs && mount -t tmpfs -o size=32m tmpfs runs && cp -a begun/run runs/
            rm -r runs/run/checkpoints/step_00000[2-9] runs/run/metrics.jsonl
            cat /dev/zero >runs/ballast 2>/dev/null || true
            truncate -s -${ROOM}K runs/ballast
            code=0; bash pipelines/train.sh >/dev/null || code=$?
            rm runs/ballast
            ls -A runs/run/checkpoints runs/run/rollouts | grep tmp >&2 || true
            [ $code = 0 ] || bash pipelines/train.sh >/dev/null 2>&1
            cp -a runs result
            exit $code";
        let (code, said) = in_own_mounts(&root, script, &[("ROOM", kilobytes)]);
        assert_eq!(code, Some(1), "{kilobytes}: {said}");
        let lines = news(&said);
        assert!(lines[0].starts_with("grpo-step: runs/run/"), "{said}");
        assert!(lines[0].ends_with(": No space left on device (os error 28)"), "{said}");
        assert!(lines[1].contains(": grpo-step ended with code 1; the same command"), "{said}");
        assert_eq!(lines.len(), 2, "nothing half-written is left: {said}");
        fs::remove_dir_all(root.path("begun")).unwrap();
        fs::remove_dir(root.path("runs")).unwrap();
        fs::rename(root.path("result"), root.path("runs")).unwrap();
        root.assert_same_files(&whole);
    }
}

#[test]
fn without_room_in_memory_the_weights_go_through_the_disk_and_that_is_said() {
    if !can_mount() {
        return;
    }
    let whole = Root::new(&[]);
    whole.train_whole();
    let root = whole.back_to_the_start();
    let script = "mount -t tmpfs -o size=100k tmpfs /dev/shm && exec bash pipelines/train.sh";
    let (code, said) = in_own_mounts(&root, script, &[]);
    assert_eq!(code, Some(0), "{said}");
    let told = "grpo-step: /dev/shm: no room for 1 MiB; the weights of each step go through runs/run/live\n";
    assert!(said.contains(told), "{said}");
    root.assert_same_files(&whole);
}
