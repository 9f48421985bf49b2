//! The pipe that trains a run: the same bytes as by files, whatever is killed, and words for what goes wrong in it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::runs::{Root, Started, news, text};
use crate::signals::long_step;

/// From a stage's end to that of the last one; the promise is 2 s, on a machine that does nothing else.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn one_pipe_and_steps_one_by_one_and_by_files_make_the_same_bytes() {
    let resident = Root::new(&[("STEPS", "20"), ("SAVE_EVERY", "7")]);
    resident.train_whole();
    let one_by_one = resident.back_to_the_start();
    for step in 1..=20 {
        let done = one_by_one.script("step.sh", &[]).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert_eq!(fs::read_dir(one_by_one.run("rollouts")).unwrap().count(), step, "nothing of later steps is left");
    }
    one_by_one.train_whole(); // no step is left, but what comes after them
    one_by_one.assert_same_files(&resident);
    let steps = fs::read_dir(one_by_one.run("checkpoints")).unwrap().count();
    assert_eq!(steps, 4, "steps 0, 7, 14 and 20");

    // Without a pipe: each command when the one before is done.
    let by_files = resident.back_to_the_start();
    let commands = ". pipelines/common.sh
        begin_run
        for step in {1..20}; do
            (sample_steps --steps 1) >rollouts.jsonl
            (reward) <rollouts.jsonl >scored.jsonl
            (learn) <scored.jsonl >metrics.jsonl
        done
        rm rollouts.jsonl scored.jsonl metrics.jsonl";
    let done = by_files.shell(commands).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    by_files.train_whole();
    by_files.assert_same_files(&resident);
}

/// For each step, the steps of the weights that its samples came from.
fn sampled_from(root: &Root, steps: u64) -> Vec<Vec<u64>> {
    let of = |step: u64| {
        let path = root.run(&format!("rollouts/step_{step:06}.jsonl.zst"));
        let text = zstd::decode_all(fs::File::open(path).unwrap()).unwrap();
        let record = |line: &[u8]| serde_json::from_slice::<serde_json::Value>(line).unwrap();
        let mut found: Vec<u64> =
            text.lines().map(|line| record(line.unwrap().as_bytes())["policy_step"].as_u64().unwrap()).collect();
        found.dedup();
        found
    };
    (1..=steps).map(of).collect()
}

#[test]
fn a_run_that_samples_ahead_is_the_same_again_and_step_by_step() {
    for (ahead, want) in [("1", [0, 0, 1, 2, 3, 4, 5]), ("2", [0, 0, 0, 1, 2, 3, 4])] {
        let numbers =
            [("STEPS", "7"), ("SAVE_EVERY", "3"), ("MAX_STALENESS", ahead), ("IMPORTANCE_SAMPLING_CLIP_MAX", "2")];
        let resident = Root::new(&numbers);
        resident.train_whole();
        assert_eq!(sampled_from(&resident, 7), want.map(|step| vec![step]));
        let metrics = fs::read_to_string(resident.run("metrics.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        assert_eq!(last["sampling/staleness/max"].to_string(), format!("{ahead}.0"));
        let again = resident.back_to_the_start();
        again.train_whole();
        again.assert_same_files(&resident);
        let by_steps = resident.back_to_the_start();
        for step in 1..=7 {
            let done = by_steps.script("step.sh", &[]).output().unwrap();
            assert!(done.status.success(), "{}", text(&done.stderr));
            assert_eq!(fs::read_dir(by_steps.run("rollouts")).unwrap().count(), step);
        }
        by_steps.train_whole();
        by_steps.assert_same_files(&resident);
    }
}

#[test]
fn a_run_that_tops_its_steps_up_is_the_same_again_step_by_step_and_after_a_kill() {
    let numbers = [("STEPS", "8"), ("SAVE_EVERY", "3"), ("DYNAMIC_SAMPLING", "4"), ("REWARDS", "xmlcount=1")];
    let resident = Root::new(&numbers);
    resident.train_whole();
    let metrics = fs::read_to_string(resident.run("metrics.jsonl")).unwrap();
    let sampled = |line: &str| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()["dynamic_sampling/groups_sampled"].as_u64().unwrap()
    };
    let sampled: Vec<u64> = metrics.lines().map(sampled).collect();
    assert!(sampled.iter().any(|groups| *groups > 2) && sampled.iter().any(|groups| *groups < 8), "{sampled:?}");
    let state = fs::read_to_string(resident.run("policy/state.json")).unwrap();
    assert!(state.contains("\"prompts_consumed\": 64"), "{state}");

    let by_steps = resident.back_to_the_start();
    for _ in 1..=8 {
        let done = by_steps.script("step.sh", &[]).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
    }
    by_steps.train_whole();
    by_steps.assert_same_files(&resident);

    let killed = resident.back_to_the_start();
    let mut run = killed.start();
    run.wait_for(&killed.run("rollouts/step_000002.jsonl.zst"));
    run.kill_all();
    killed.train_whole();
    killed.assert_same_files(&resident);

    let mut verified = resident.script("verify.sh", &[("RUN", "run"), ("FROM", "step_000003"), ("TO", "step_000006")]);
    let done = verified.output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
}

/// Step 1 is handed on when step 2 is whole, and so on: no run whose sampling waits for training would come to an end.
#[test]
fn sampling_ahead_begins_a_step_before_the_one_before_it_is_trained() {
    let whole = Root::new(&[("STEPS", "6"), ("MAX_STALENESS", "1"), ("SCORER", "bash ./scorer.sh")]);
    fs::write(whole.path("scorer.sh"), "score\n").unwrap();
    whole.train_whole();
    let root = whole.back_to_the_start();
    let a_step_later = "score | {
        held=()
        while IFS= read -r line; do
            held+=(\"$line\")
            [ ${#held[@]} -le 8 ] || { echo \"${held[0]}\"; held=(\"${held[@]:1}\"); }
        done
        printf '%s\\n' \"${held[@]}\"
    }";
    fs::write(root.path("scorer.sh"), a_step_later).unwrap();
    root.train_whole();
    root.assert_same_files(&whole);
}

/// Otherwise what a sampler ahead writes would fill the pipe, and it would wait for the trainer after all.
#[test]
fn the_records_of_the_next_steps_are_taken_while_one_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let (run, records) = long_step(dir.path(), &[(0, 2, 4), (1, 120, 500), (2, 120, 500), (3, 120, 500)]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_grpo-step"));
    command.arg("--follow").arg(dir.path()).args(["--groups-per-step", "1", "--max-staleness", "2"]);
    command.args(["--logprob-band", "1e9"]).stdin(Stdio::piped()).stderr(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(records.as_bytes()).map(|()| stdin));
    let began = Instant::now();
    while !writer.is_finished() && !run.rollouts(2).exists() && began.elapsed() < 20 * SOON {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (taken, trained) = (writer.is_finished(), run.rollouts(2).exists());
    child.kill().unwrap();
    child.wait().unwrap();
    drop(writer.join());
    assert!(taken && !trained, "taken: {taken}, trained: {trained}");
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
    for script in ["train.sh", "step.sh"] {
        let done = root.script(script, &[]).output().unwrap();
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{script}: {said}");
        // Either stage may be refused first, and takes the other along before it can say so.
        let told = ["lock", "sampler.lock"].iter().zip(["trains", "samples for"]).any(|(lock, does)| {
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
    assert!(explained.contains("a stage in between buffers its output or lost records"), "{explained}");
    run.kill_all();
}

/// No more memory from one moment on: whatever a stage then asks for it is refused.
#[test]
fn a_stage_without_memory_ends_the_run_which_goes_on_when_there_is_some() {
    let whole = Root::new(&[("STEPS", "40"), ("SAVE_EVERY", "20")]);
    whole.train_whole();
    for stage in ["rollout", "grpo-step"] {
        let root = whole.back_to_the_start();
        let mut run = root.start();
        run.wait_for(&root.run("rollouts/step_000002.jsonl.zst"));
        let (id, _) = run.processes().into_iter().find(|(_, name)| name == stage).unwrap();
        assert!(Command::new("prlimit").args(["--as=1", "--pid", &id]).status().unwrap().success());
        let (code, said) = run.end_of_it();
        assert_eq!(code, Some(1), "{said}");
        let told = news(&said);
        assert!(told[0].starts_with(&format!("{stage}: ")), "{said}");
        assert!(told[0].ends_with("/model.safetensors: Cannot allocate memory (os error 12)"), "{said}");
        assert!(told[1].starts_with("error: runs/run stopped at step "), "{said}");
        assert_eq!(told.len(), 2, "{said}");
        root.train_whole();
        root.assert_same_files(&whole);
    }
}
