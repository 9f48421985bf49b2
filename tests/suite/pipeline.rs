//! `pipelines/train.sh`, the script behind `make train`, on numbers so small that it ends in seconds.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Numbers of a run that learns nothing, in all of its parts.
const NUMBERS: [(&str, &str); 9] = [
    ("RECIPE", "tiny"),
    ("NAME", "run"),
    ("SUPERVISED_STEPS", "30"),
    ("STEPS", "5"),
    ("SAVE_EVERY", "2"),
    ("PROMPTS_PER_STEP", "2"),
    ("NUM_GENERATIONS", "4"),
    ("TEST_PROMPTS", "12"),
    ("TEST_SAMPLES", "2"),
];

/// A directory that looks like the project's, with `runs/` of its own.
fn root() -> TempDir {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tempfile::tempdir().unwrap();
    symlink(project.join("pipelines"), root.path().join("pipelines")).unwrap();
    std::fs::create_dir(root.path().join("target")).unwrap();
    let commands = Path::new(env!("CARGO_BIN_EXE_rollout")).parent().unwrap();
    symlink(commands, root.path().join("target/release")).unwrap();
    root
}

fn script(root: &TempDir, name: &str, more: &[(&str, &str)]) -> Command {
    let mut command = Command::new("bash");
    command.arg(format!("pipelines/{name}")).current_dir(root.path()).stdin(Stdio::null());
    command.envs(NUMBERS).envs(more.iter().copied());
    command
}

fn train(root: &TempDir, more: &[(&str, &str)]) -> Output {
    script(root, "train.sh", more).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Every file of the run with its hash. Logs tell speeds, which differ.
fn files(root: &TempDir) -> BTreeMap<String, blake3::Hash> {
    fn walk(dir: &Path, found: &mut BTreeMap<String, blake3::Hash>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                walk(&path, found);
            } else if path.is_file() && path.extension().is_none_or(|extension| extension != "log") {
                found.insert(path.display().to_string(), blake3::hash(&std::fs::read(&path).unwrap()));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&root.path().join("runs"), &mut found);
    let strip = |(name, hash): (String, _)| (name[root.path().as_os_str().len()..].to_owned(), hash);
    found.into_iter().map(strip).collect()
}

/// Kills the run and all of its commands as soon as it has come to the given file.
fn train_until(root: &TempDir, file: &str) {
    let mut command = script(root, "train.sh", &[]);
    let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap();
    let began = Instant::now();
    while !root.path().join(file).exists() {
        assert!(
            began.elapsed() < Duration::from_secs(120) && run.try_wait().unwrap().is_none(),
            "never came to {file}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    // The shell's own kill: some programs of that name read a group's number as other options.
    let kill = format!("kill -KILL -- -{}", run.id());
    assert!(Command::new("bash").args(["-c", &kill]).status().unwrap().success());
    run.wait().unwrap();
}

#[test]
fn a_run_trains_evaluates_and_exports_and_gives_the_same_bytes_again_even_when_killed() {
    let whole = root();
    let done = train(&whole, &[]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let table = text(&done.stdout);
    assert!(table.starts_with("12 held-out problems"), "{table}");
    assert_eq!(table.lines().filter(|line| line.matches(" %").count() == 2).count(), 8, "{table}");
    let wanted = files(&whole);
    for name in
        ["metrics.jsonl", "eval/after.greedy.json", "export/model.safetensors", "rollouts/step_000005.jsonl.zst"]
    {
        assert!(wanted.contains_key(&format!("/runs/run/{name}")), "{name}: {wanted:?}");
    }
    let kept = std::fs::read_dir(whole.path().join("runs/run/checkpoints")).unwrap().count();
    assert_eq!(kept, 4, "steps 0, 2, 4 and 5");

    let killed = root();
    for file in [
        "runs/run/prompts.jsonl",
        "runs/run/checkpoints/step_000000",
        "runs/run/rollouts/step_000002.jsonl.zst",
        "runs/run/checkpoints/step_000004",
    ] {
        train_until(&killed, file);
    }
    let done = train(&killed, &[]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let found = files(&killed);
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    let different: Vec<_> = found.iter().filter(|(name, hash)| wanted[*name] != **hash).map(|(name, _)| name).collect();
    assert_eq!(different, Vec::<&String>::new());
}

#[test]
fn a_run_refuses_other_numbers_and_takes_a_stage_of_the_users() {
    let root = root();
    let scorer = "awk {sub(/}$/,\",\\\"reward\\\":\"NR%3\"}\");print}";
    let done = train(&root, &[("SCORER", scorer), ("STEPS", "2")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let metrics = std::fs::read_to_string(root.path().join("runs/run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 2);
    assert!(root.path().join("runs/run/rollouts/step_000002.jsonl").is_file());

    let done = train(&root, &[("SCORER", scorer), ("STEPS", "3")]);
    assert_eq!(done.status.code(), Some(2));
    let said = text(&done.stderr);
    assert!(said.contains("was: STEPS=2") && said.contains("now: STEPS=3"), "{said}");

    let done = script(&root, "step.sh", &[("STEPS", "2")]).output().unwrap();
    assert_eq!(done.status.code(), Some(2), "another scorer");
    assert!(text(&done.stderr).contains("now: SCORER="), "{}", text(&done.stderr));

    let done = script(&root, "step.sh", &[("SCORER", scorer), ("STEPS", "2")]).output().unwrap();
    assert_eq!(done.status.code(), Some(2));
    assert!(text(&done.stderr).contains("has done all of its 2 steps"), "{}", text(&done.stderr));
}

#[test]
fn a_stage_that_fails_stops_the_run_before_it_learns() {
    let root = root();
    let done = train(&root, &[("SCORER", "false")]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("step 1: sampling or scoring failed"), "{}", text(&done.stderr));
    assert!(!root.path().join("runs/run/checkpoints/step_000001").exists());
}
