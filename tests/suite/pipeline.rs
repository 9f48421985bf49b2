//! `pipelines/train.sh`, the script behind `make train`, from its first part to its last.

use crate::runs::{Root, text};

#[test]
fn a_run_trains_evaluates_and_exports_and_gives_the_same_bytes_again_even_when_killed() {
    let whole = Root::new(&[]);
    let done = whole.train(&[]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let table = text(&done.stdout);
    assert!(table.starts_with("12 held-out problems"), "{table}");
    assert_eq!(table.lines().filter(|line| line.matches(" %").count() == 2).count(), 8, "{table}");
    assert!(text(&done.stderr).contains("step 5/5: reward "), "{}", text(&done.stderr));
    let files = whole.files();
    for name in
        ["metrics.jsonl", "eval/after.greedy.json", "export/model.safetensors", "rollouts/step_000005.jsonl.zst"]
    {
        assert!(files.contains_key(&format!("runs/run/{name}")), "{name}: {files:?}");
    }
    let kept = std::fs::read_dir(whole.run("checkpoints")).unwrap().count();
    assert_eq!(kept, 4, "steps 0, 2, 4 and 5");
    assert!(!whole.run("live").exists());

    let killed = Root::new(&[]);
    for file in
        ["prompts.jsonl", "checkpoints/step_000000", "rollouts/step_000002.jsonl.zst", "checkpoints/step_000004"]
    {
        let mut run = killed.start();
        run.wait_for(&killed.run(file));
        run.kill_all();
    }
    killed.train_whole();
    killed.assert_same_files(&whole);
}

#[test]
fn a_run_on_one_thread_ends_with_the_bytes_of_one_on_two() {
    let [one, two] = ["1", "2"].map(|threads| Root::new(&[("RAYON_NUM_THREADS", threads), ("STEPS", "4")]));
    two.train_whole();
    let mut run = one.start();
    run.wait_for(&one.run("export/model.safetensors"));
    let (code, said) = run.end_of_it();
    assert_eq!(code, Some(0), "{said}");
    one.assert_same_files(&two);
}

#[test]
fn a_run_refuses_other_numbers_and_takes_a_stage_of_the_users() {
    let root = Root::new(&[]);
    std::fs::write(root.path("scorer.sh"), SCORER).unwrap();
    let scorer = "bash scorer.sh";
    let done = root.train(&[("SCORER", scorer), ("STEPS", "2")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let metrics = std::fs::read_to_string(root.run("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 2);
    assert!(root.run("rollouts/step_000002.jsonl.zst").is_file());

    let done = root.train(&[("SCORER", scorer), ("STEPS", "3")]);
    assert_eq!(done.status.code(), Some(2));
    let said = text(&done.stderr);
    assert!(said.contains("was: STEPS=2") && said.contains("now: STEPS=3"), "{said}");

    let done = root.script("step.sh", &[("STEPS", "2")]).output().unwrap();
    assert_eq!(done.status.code(), Some(2), "another scorer");
    assert!(text(&done.stderr).contains("now: SCORER="), "{}", text(&done.stderr));

    let done = root.script("step.sh", &[("SCORER", scorer), ("STEPS", "2")]).output().unwrap();
    assert_eq!(done.status.code(), Some(2));
    assert!(text(&done.stderr).contains("has done all of its 2 steps"), "{}", text(&done.stderr));
}

/// Rewards that differ within a group, record by record.
const SCORER: &str = r#"while IFS= read -r line; do
    at=$((at + 1))
    printf '%s,"reward":%d}\n' "${line%\}}" $((at % 3))
done
"#;

#[test]
fn a_stage_that_fails_stops_the_run_before_it_learns() {
    let root = Root::new(&[("SCORER", "false")]);
    let done = root.train(&[]);
    assert_eq!(done.status.code(), Some(1));
    let said = text(&done.stderr);
    assert!(said.contains("runs/run stopped at step 0: ") && said.contains("false ended with code 1"), "{said}");
    assert!(!root.run("checkpoints/step_000001").exists());

    let done = root.script("step.sh", &[]).output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("false ended with code 1"), "{}", text(&done.stderr));
}

#[test]
fn the_report_of_a_gpu_tells_what_runs_learned_also_without_one() {
    let root = Root::new(&[]);
    std::fs::create_dir(root.path("runs")).unwrap();
    let numbers =
        [("PARTS", "precision learn"), ("PRECISIONS", "f32"), ("LEARN", "tiny"), ("NUMBERS", "STEPS=2"), ("MODEL", "")];
    let done = root.script("bench/gpu.sh", &numbers).output().unwrap();
    let (report, said) = (text(&done.stdout), text(&done.stderr));
    assert!(done.status.success(), "{said}");
    let rows = |start: &str| report.lines().filter(|line| line.starts_with(start)).collect::<Vec<_>>();
    let intervals = |row: &str| row.matches(" % (").count();
    for seed in ["| 1 | f32 | ", "| 2 | f32 | ", "| 3 | f32 | "] {
        let found = rows(seed);
        assert!(found.len() == 1 && intervals(found[0]) == 1 && found[0].contains(" +- "), "{report}");
    }
    let rates = [rows("| greedy: "), rows("| sampled: ")].concat();
    assert!(rates.len() == 6 && rates.iter().all(|row| intervals(row) == 2), "{report}");
    assert_eq!(rows("| reward, 20 steps | ").len(), 1, "{report}");
    assert_eq!(std::fs::read_dir(root.path("runs")).unwrap().count(), 0, "its runs are gone");
}
