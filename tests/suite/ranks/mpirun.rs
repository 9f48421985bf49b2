//! Ranks as processes of `mpirun`, where there is one and the commands were built with MPI.

use std::path::Path;
use std::process::{Command, Stdio};

use grpo_pipes::checkpoint;
use grpo_pipes::numbers::tensors::TensorFile;

use super::AFTER_MORE;
use crate::fixtures::distance;
use crate::grpo::tiny;
use crate::grpo_step::SCORED;
use crate::process::{Finished, lines, run};
use crate::runs::{Root, Started, news, send};

const GRPO_STEP: &str = env!("CARGO_BIN_EXE_grpo-step");

/// Lets mpirun start any number of processes on any machine, as any user, and keep its own words about an end to itself.
const ANYWHERE: [(&str, &str); 4] = [
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
    ("OMPI_MCA_orte_execute_quiet", "1"),
];

/// Whether processes can be started together; says why not.
fn can_start() -> bool {
    let missing = match Command::new("mpirun").arg("--version").stdout(Stdio::null()).status() {
        _ if cfg!(not(feature = "mpi")) => "the commands were built without MPI: cargo test --features mpi",
        Err(_) => "there is no mpirun",
        Ok(_) => return true,
    };
    println!("skipped: {missing}");
    false
}

/// Runs `grpo-step` as so many processes, with `input` on standard input.
fn step_on(count: usize, options: &str, input: &str) -> Finished {
    let options = format!("-n {count} --bind-to none {GRPO_STEP} --device cpu {options}");
    let variables = ANYWHERE.map(|(name, value)| format!("{name}={value}"));
    let args: Vec<&str> = variables.iter().map(String::as_str).chain(["mpirun"]).chain(options.split(' ')).collect();
    run("env", &args, input)
}

fn assert_close(got: &Path, want: &Path) {
    for (file, bound) in [checkpoint::WEIGHTS, checkpoint::OPTIMIZER].into_iter().zip(AFTER_MORE) {
        let [got, want] = [got, want].map(|dir| TensorFile::open(&dir.join(file)).unwrap());
        let all = |file: &TensorFile| -> Vec<f32> {
            file.names().iter().flat_map(|name| file.read::<f32>(name).unwrap().to_vec()).collect()
        };
        let off = distance(&all(&got), &all(&want));
        assert!(off <= bound, "{file}: {off:e}");
    }
}

#[test]
fn processes_train_as_one_to_the_same_bytes_each_time() {
    if !can_start() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let train = |count: usize, name: &str| {
        let (policy, out) = (tiny(), path(name));
        let numbers = "--learning-rate 1e-4 --num-iterations 2 --groups-per-step 2 --max-staleness any";
        let options = format!("--policy {} --out {} {numbers}", policy.display(), out.display());
        let done = step_on(count, &options, &lines(&SCORED));
        assert_eq!((done.code, done.records().len()), (Some(0), 4), "{}", done.stderr);
    };
    train(1, "one");
    for count in [2, 4] {
        let [first, again] = ["first", "again"].map(|name| format!("{name}-{count}"));
        train(count, &first);
        train(count, &again);
        assert_close(&path(&first), &path("one"));
        for file in [checkpoint::WEIGHTS, checkpoint::OPTIMIZER] {
            let [first, again] = [&first, &again].map(|name| std::fs::read(path(name).join(file)).unwrap());
            assert!(first == again, "{count} processes: {file}");
        }
    }
}

#[test]
fn what_is_wrong_is_said_once_and_the_code_is_the_usual_one() {
    if !can_start() {
        return;
    }
    let [policy, nowhere] = [tiny(), tiny().join("nowhere")].map(|path| path.display().to_string());
    let mut stale = SCORED.clone();
    stale[4]["policy_id"] = "another".into();
    let cases = [
        (format!("--policy {policy} --dry-run"), "no JSON", 3),
        (format!("--policy {policy} --dry-run"), &lines(&stale), 3),
        (format!("--policy {policy} --dry-run --beta 1"), &lines(&SCORED), 2),
        (format!("--policy {nowhere} --dry-run"), &lines(&SCORED), 1),
        ("--no-such-option".into(), "", 2),
    ];
    for (options, input, code) in cases {
        let done = step_on(3, &options, input);
        assert_eq!(done.code, Some(code), "{options}: {}", done.stderr);
        let said = done.stderr.lines().filter(|line| line.contains("grpo-step: ") || line.starts_with("error: "));
        let said: Vec<_> = said.filter(|line| !line.contains("computing on the CPU")).collect();
        assert_eq!(said.len(), 1, "{options}: {}", done.stderr);
    }
}

/// A run of `make train` with RANKS=2.
fn run_on_two() -> Root {
    let numbers = [("RANKS", "2"), ("STEPS", "60"), ("SAVE_EVERY", "20")];
    Root::new(&numbers.into_iter().chain(ANYWHERE).collect::<Vec<_>>())
}

#[test]
fn a_rank_that_is_killed_ends_the_run_with_one_message_and_it_goes_on_from_the_last_checkpoint() {
    if !can_start() {
        return;
    }
    let whole = run_on_two();
    whole.train_whole();
    for (signal, rank) in [("KILL", 0), ("KILL", 1), ("TERM", 1)] {
        let root = whole.back_to_the_start();
        let mut run = root.start();
        run.wait_for(&root.run("rollouts/step_000030.jsonl.zst"));
        let (ranks, id) = (ranks_of(&run), run.child.id());
        assert_eq!(ranks.len(), 2);
        send(signal, &ranks[rank]);
        let (code, said) = run.end_of_it();
        let want = if signal == "KILL" { "was killed by signal 9" } else { "was ended by signal 15" };
        assert_eq!((code, news(&said).len()), (Some(if signal == "KILL" { 1 } else { 143 }), 1), "{said}");
        assert!(news(&said)[0].contains(want), "{said}");
        assert_eq!(Started::left_of(id), [], "{signal} {rank}");
        checkpoint::verify(&root.run("policy")).unwrap();
        root.train_whole();
        root.assert_same_files(&whole);
    }
}

/// The trainer's processes, by their numbers.
fn ranks_of(run: &Started) -> Vec<String> {
    run.processes().into_iter().filter(|(_, name)| name == "grpo-step").map(|(id, _)| id).collect()
}

/// Each of several processes would train the policy for itself, and write the same files.
#[cfg(not(feature = "mpi"))]
#[test]
fn processes_that_cannot_reach_one_another_are_refused_once() {
    for (rank, said) in [("0", 1), ("1", 0)] {
        let of_rank = format!("PMI_RANK={rank}");
        let done = run("env", &["PMI_SIZE=2", &of_rank, GRPO_STEP, "--policy", "x", "--dry-run"], "");
        assert_eq!((done.code, done.stderr.lines().count()), (Some(2), said), "{}", done.stderr);
        assert!(done.stderr.is_empty() || done.stderr.contains("cargo build --release --features mpi"));
    }
}
