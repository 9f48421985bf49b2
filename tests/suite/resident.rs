//! The pipe that trains a run: the same bytes as by files, whatever is killed, and words for what goes wrong in it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use crate::runs::{Root, Started, news, text};

/// From a stage's end to that of the last one; the promise is 2 s, on a machine that does nothing else.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn one_pipe_and_steps_by_files_make_the_same_bytes() {
    let resident = Root::new(&[("STEPS", "20"), ("SAVE_EVERY", "7")]);
    resident.train_whole();
    let by_files = resident.back_to_the_start();
    for step in 1..=20 {
        let done = by_files.script("step.sh", &[]).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert_eq!(fs::read_dir(by_files.run("rollouts")).unwrap().count(), step, "nothing of later steps is left");
    }
    by_files.train_whole(); // no step is left, but what comes after them
    by_files.assert_same_files(&resident);
    let steps = fs::read_dir(by_files.run("checkpoints")).unwrap().count();
    assert_eq!(steps, 4, "steps 0, 7, 14 and 20");
}

#[test]
fn a_stage_that_is_killed_ends_the_others_and_the_run_goes_on_from_there() {
    let whole = Root::new(&[("STEPS", "60"), ("SAVE_EVERY", "25")]);
    whole.train_whole();
    for stage in ["rollout", "score", "grpo-step"] {
        let root = whole.back_to_the_start();
        let mut run = root.start();
        run.wait_for(&root.run("rollouts/step_000002.jsonl.zst"));
        assert!(run.signal_one("KILL", stage));
        let killed = Instant::now();
        let status = run.child.wait().unwrap();
        assert!(killed.elapsed() < SOON, "{stage}: {:?}", killed.elapsed());
        assert_eq!(status.code(), Some(1), "{stage}");
        assert_eq!(Started::left_of(run.child.id()), [], "{stage}");
        let (_, said) = run.end_of_it();
        let told = news(&said);
        assert!(told.len() == 1 && told[0].starts_with("error: runs/run stopped at step "), "{said}");
        assert!(
            told[0].ends_with(&format!(": {stage} was killed by signal 9; the same command goes on from there")),
            "{said}"
        );
        root.train_whole();
        root.assert_same_files(&whole);
    }
}

#[test]
fn a_pipe_ends_when_nobody_is_left_to_tell() {
    let root = Root::new(&[("STEPS", "200")]);
    let mut run = root.start();
    run.wait_for(&root.run("rollouts/step_000002.jsonl.zst"));
    run.child.kill().unwrap(); // the script alone
    run.child.wait().unwrap();
    let killed = Instant::now();
    while !run.processes().is_empty() {
        assert!(killed.elapsed() < SOON, "{:?}", run.processes());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_second_run_on_the_same_directory_is_refused_with_the_numbers_of_the_first() {
    // The stage between holds everything back, so that the first run lasts.
    let root = Root::new(&[("SCORER", "bash ./scorer.sh")]);
    fs::write(root.path("scorer.sh"), "cat >/dev/null\n").unwrap();
    let mut first = root.start();
    first.wait_for(&root.run("live"));
    let began = Instant::now();
    for (script, refused) in [("train.sh", &["lock", "sampler.lock"][..]), ("step.sh", &["lock"])] {
        let done = root.script(script, &[]).output().unwrap();
        assert_eq!(done.status.code(), Some(if script == "train.sh" { 1 } else { 2 }));
        let said = text(&done.stderr);
        // Either stage may be refused first, and takes the other along before it can say so.
        let told = refused.iter().zip(["trains", "samples for"]).any(|(lock, does)| {
            let owner = fs::read_to_string(root.run(lock)).unwrap();
            said.contains(&format!("process {} {does} this run already", owner.trim()))
        });
        assert!(told, "{said}");
    }
    assert!(began.elapsed() < 2 * SOON && first.child.try_wait().unwrap().is_none());
    first.kill_all();
}

#[test]
fn a_stage_that_changes_the_order_of_records_is_found_out_and_the_run_goes_on_when_it_is_mended() {
    let honest = "score\n";
    let whole = Root::new(&[("STEPS", "8"), ("SCORER", "bash ./scorer.sh")]);
    fs::write(whole.path("scorer.sh"), honest).unwrap();
    whole.train_whole();
    // Of 8 records a step, those of step 3 are 17 to 24.
    let cases = [
        ("drops", "[ $at = 18 ] || echo \"$line\"", "sample 2, where prompt ", ", sample 1 comes next; "),
        ("repeats", "echo \"$line\"; [ $at != 24 ] || echo \"$line\"", "-:25: prompt ", ", sample 0 comes next; "),
        (
            "reorders",
            "if [ $at = 19 ]; then held=$line; else echo \"$line\"; fi; [ $at != 20 ] || echo \"$held\"",
            "sample 3, where prompt ",
            ", sample 2 comes next; ",
        ),
    ];
    for (name, body, came, due) in cases {
        let root = whole.back_to_the_start();
        let stage = format!("score | while IFS= read -r line; do at=$((at + 1)); {body}; done\n");
        fs::write(root.path("scorer.sh"), stage).unwrap();
        let done = root.train(&[]);
        assert_eq!(done.status.code(), Some(1), "{name}");
        let said = text(&done.stderr);
        assert!(said.contains(came) && said.contains(due), "{name}: {said}");
        assert!(said.contains("grpo-step ended with code 3"), "{name}: {said}");
        fs::write(root.path("scorer.sh"), honest).unwrap();
        root.train_whole();
        root.assert_same_files(&whole);
    }
}

/// Takes the 10 s after which a wait is explained: nothing shorter would show that they are real ones.
#[test]
fn a_stage_that_buffers_is_explained() {
    let root = Root::new(&[("SCORER", "bash ./scorer.sh")]);
    fs::write(root.path("scorer.sh"), "all=$(score); echo \"$all\"\n").unwrap();
    let mut run = root.start();
    let said = BufReader::new(run.child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let explained = said.into_iter().find(|line| line.starts_with("rollout: waiting ")).unwrap();
    assert!(explained.contains("the weights of step 1: "), "{explained}");
    assert!(explained.contains("a stage between is buffering its output or lost records"), "{explained}");
    run.kill_all();
}
