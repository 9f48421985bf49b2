//! What is installed works, from a directory that is neither the project's nor the installed one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::{commands, entries, install};

/// Numbers of a run that ends in seconds.
const NUMBERS: [(&str, &str); 7] = [
    ("RECIPE", "tiny"),
    ("SUPERVISED_STEPS", "30"),
    ("STEPS", "2"),
    ("PROMPTS_PER_STEP", "2"),
    ("NUM_GENERATIONS", "4"),
    ("TEST_PROMPTS", "4"),
    ("TEST_SAMPLES", "2"),
];

pub fn all() {
    let dir = tempfile::tempdir().unwrap();
    let (prefix, elsewhere) = (dir.path().join("a prefix"), dir.path().join("elsewhere"));
    fs::create_dir(&elsewhere).unwrap();
    install(&prefix).unwrap();
    let before = files(&prefix);
    install(&prefix).unwrap();
    assert_eq!(files(&prefix), before, "a second time changes nothing");

    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scripts =
        entries(&project.join("pipelines")).unwrap().into_iter().filter(|path| path.extension() == Some("sh".as_ref()));
    for script in scripts {
        let name = script.file_name().unwrap();
        assert!(prefix.join("share/grpo-pipes/pipelines").join(name).is_file(), "{name:?} is not installed");
    }
    pages_and_completions_tell_of_every_option(&prefix);
    bash_completes(&prefix, &elsewhere);
    a_run_trains_and_resumes(&prefix, &elsewhere);
    assert_eq!(files(&prefix), before, "a run leaves the installed tree alone");
    println!("install: ok");
}

fn pages_and_completions_tell_of_every_option(prefix: &Path) {
    for (command, _) in commands() {
        let name = command.get_name();
        let read = |path: String| fs::read_to_string(prefix.join(&path)).unwrap_or_else(|err| panic!("{path}: {err}"));
        let page = read(format!("share/man/man1/{name}.1")).replace("\\-", "-");
        let bash = read(format!("share/bash-completion/completions/{name}"));
        let zsh = read(format!("share/zsh/site-functions/_{name}"));
        let fish = read(format!("share/fish/vendor_completions.d/{name}.fish"));
        let options: Vec<&str> = command.get_opts().filter_map(|option| option.get_long()).collect();
        assert!(!options.is_empty(), "{name}");
        for option in options {
            let long = format!("--{option}");
            assert!(page.contains(&long) && bash.contains(&long) && zsh.contains(&long), "{name} {long}");
            assert!(fish.contains(&format!("-l {option}")), "{name} {long}");
        }
    }
}

/// The shell itself completes an option.
fn bash_completes(prefix: &Path, elsewhere: &Path) {
    let script = "source \"$0\"; COMP_WORDS=(rollout --max-seq) COMP_CWORD=1; _rollout rollout --max-seq rollout; echo \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).arg(prefix.join("share/bash-completion/completions/rollout")).current_dir(elsewhere);
    let done = bash.output().unwrap();
    assert_eq!(text(&done.stdout), "--max-sequences\n", "{}", text(&done.stderr));
}

fn a_run_trains_and_resumes(prefix: &Path, elsewhere: &Path) {
    let script = |name: &str, more: &[(&str, &str)]| -> Output {
        let mut bash = Command::new("bash");
        bash.arg(prefix.join("share/grpo-pipes/pipelines").join(name)).current_dir(elsewhere).stdin(Stdio::null());
        // Only what is installed: neither this build's commands nor those of an earlier installation.
        bash.env("PATH", "/usr/bin:/bin").envs(NUMBERS).envs(more.iter().copied()).output().unwrap()
    };
    let done = script("train.sh", &[]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stdout).starts_with("4 held-out problems"), "{}", text(&done.stdout));
    assert!(elsewhere.join("runs/tiny-1/export/model.safetensors").is_file());
    let again = script("train.sh", &[]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    let fork = script("fork.sh", &[("RUN", "tiny-1"), ("FROM", "step_000000"), ("NAME", "new"), ("SEED", "1")]);
    assert!(fork.status.success(), "{}", text(&fork.stderr));
    let done = script("evaluate.sh", &[("MODEL", "runs/tiny-1/export")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let questions = elsewhere.join("runs/sums.jsonl");
    fs::write(&questions, "{\"question\": \"1 + 2 = ?\", \"answer\": \"#### 3\"}\n").unwrap();
    let done = script("data.sh", &[("QUESTIONS", "runs/sums.jsonl"), ("MODEL", "runs/tiny-1/export"), ("N", "2")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let names: Vec<String> = entries(elsewhere).unwrap().iter().map(|path| path.display().to_string()).collect();
    assert_eq!(names.len(), 1, "runs/ and nothing else: {names:?}");
}

/// Every file with its content.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(entries(&path).unwrap());
        } else {
            found.insert(path.display().to_string(), fs::read(&path).unwrap());
        }
    }
    found
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
