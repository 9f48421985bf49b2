//! `export-hf --push`: what arrives on the Hub, whatever happens on the way.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use serde_json::json;

use super::server::{COMMIT, Hub};
use super::{model, stderr};
use crate::fixtures::directory;

const EXPORT_HF: &str = env!("CARGO_BIN_EXE_export-hf");

struct Done {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Pushes the tiny model, or what `args` begin with, with the token that may.
fn push(hub: &Hub, args: &[&str]) -> Done {
    push_as(hub, "sesame", args)
}

fn push_as(hub: &Hub, token: &str, args: &[&str]) -> Done {
    let mut command = hub.command(EXPORT_HF);
    command.env("HF_TOKEN", token).args(args);
    if args[0].starts_with("--") {
        command.arg(tiny());
    }
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout.clone()).unwrap(), stderr(&output));
    assert!(!stdout.contains("sesame") && !stderr.contains("sesame"), "the token is told: {stdout} {stderr}");
    assert!(!stderr.contains("secret="), "an address to upload to is told: {stderr}");
    assert_eq!(*hub.state.writes.wrong.lock().unwrap(), [""; 0]);
    Done { code: output.status.code(), stdout, stderr }
}

fn tiny() -> PathBuf {
    directory().join("tiny-qwen2")
}

fn files(hub: &Hub, repo: &str, branch: &str) -> BTreeMap<String, Vec<u8>> {
    hub.state.writes.repos.lock().unwrap()[repo].branches[branch].clone()
}

fn stored(hub: &Hub) -> usize {
    hub.state.writes.stored.load(Ordering::SeqCst)
}

/// Requests whose line contains a text.
fn asked(hub: &Hub, text: &str) -> usize {
    hub.state.log.lock().unwrap().iter().filter(|line| line.contains(text)).count()
}

fn weights() -> usize {
    fs::metadata(tiny().join("model.safetensors")).unwrap().len() as usize
}

#[test]
fn a_model_is_pushed_and_read_back_and_only_what_changed_is_pushed_again() {
    for part_size in [0, 100_000] {
        let hub = Hub::start(&[]);
        hub.state.writes.part_size.store(part_size, Ordering::SeqCst);
        let done = push(&hub, &["--push", "own/er", "--create", "private", "--message", "First"]);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        assert_eq!(done.stdout, format!("{}/own/er/commit/{COMMIT}\n", hub.endpoint));
        assert!(done.stderr.contains("export-hf: made own/er, private\n"), "{}", done.stderr);
        let sent = stored(&hub);
        assert!(sent >= weights() - 1000 && sent < weights() + 1000, "{sent}");
        {
            let repos = hub.state.writes.repos.lock().unwrap();
            assert_eq!(
                (repos["models/own/er"].visibility.as_str(), &repos["models/own/er"].messages[..]),
                ("private", &["First".to_owned()][..])
            );
        }
        let local = hub.home.path().join("local");
        let done = hub.command(EXPORT_HF).arg(tiny()).arg(&local).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        let pushed = files(&hub, "models/own/er", "main");
        for entry in fs::read_dir(&local).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            assert!(name == "README.md" || fs::read(entry.path()).unwrap() == pushed[&name], "{name}");
        }
        assert!(String::from_utf8_lossy(&pushed["README.md"]).contains("\n# er\n"));

        let dir = model(&hub, "own/er", &[]).unwrap();
        assert_eq!(fs::read(Path::new(&dir).join("model.safetensors")).unwrap(), pushed["model.safetensors"]);

        let again = push(&hub, &["--push", "own/er"]);
        assert!(again.stderr.contains("model.safetensors: is there already\n"), "{}", again.stderr);
        assert!(again.stderr.contains("nothing has changed"), "{}", again.stderr);
        assert_eq!((again.code, again.stdout), (Some(0), format!("{}/own/er/tree/main\n", hub.endpoint)));
        let halved = push(&hub, &["--push", "own/er", "--dtype", "bf16", "--license", "mit"]);
        assert_eq!(halved.code, Some(0), "{}", halved.stderr);
        assert_eq!(hub.state.writes.repos.lock().unwrap()["models/own/er"].messages[1], "Upload er with export-hf");
        assert!(
            String::from_utf8_lossy(&files(&hub, "models/own/er", "main")["README.md"])
                .contains("\nlicense: \"mit\"\n")
        );
        let lines = hub.state.writes.repos.lock().unwrap()["models/own/er"].messages.len();
        assert_eq!(lines, 2, "one commit each, none where nothing changed");
    }
}

#[test]
fn an_upload_that_is_cut_goes_on_and_what_arrived_is_not_sent_again() {
    let hub = Hub::start(&[]);
    hub.state.writes.part_size.store(100_000, Ordering::SeqCst);
    hub.state.writes.cut.store(2, Ordering::SeqCst);
    *hub.state.writes.answers.lock().unwrap() =
        vec![(".3?", "500 Internal Server Error", "X: y"), (".complete", "503 Slow Down", "X: y")];
    let done = push(&hub, &["--push", "own/er", "--create", "public"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(stored(&hub), files(&hub, "models/own/er", "main")["model.safetensors"].len(), "each part arrived once");
    assert_eq!(asked(&hub, "PUT /storage/"), stored(&hub).div_ceil(100_000) + 3);

    // The weights arrive, and the commit does not: the next push sends the commit alone.
    let hub = Hub::start(&[]);
    *hub.state.writes.answers.lock().unwrap() = vec![("/commit/", "413 Payload Too Large", "X: y")];
    let done = push(&hub, &["--push", "own/er", "--create", "public"]);
    let refused = format!("export-hf: hub: own/er: {} refuses it with status 413\n", hub.endpoint);
    assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""));
    assert!(done.stderr.ends_with(&refused), "a refusal that repeats the token is not repeated: {}", done.stderr);
    let sent = stored(&hub);
    assert_eq!(push(&hub, &["--push", "own/er", "--create", "public"]).code, Some(0));
    assert_eq!(stored(&hub), sent);
    assert_eq!(hub.state.writes.repos.lock().unwrap()["models/own/er"].messages.len(), 1);
}

#[test]
fn a_hub_that_is_busy_or_unheard_is_asked_again_after_the_pause_it_asks_for() {
    let hub = Hub::start(&[]);
    *hub.state.writes.answers.lock().unwrap() = vec![
        ("/repos/create", "429 Too Many Requests", "Retry-After: 1"),
        ("/preupload/", "503 Service Unavailable", "X: y"),
        ("/batch", "429 Too Many Requests", "RateLimit: \"api\";r=0;t=1"),
        ("/verify", "cut", ""),
        ("/commit/", "cut", ""),
    ];
    let began = std::time::Instant::now();
    let done = push(&hub, &["--push", "own/er", "--create", "public"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(began.elapsed().as_secs_f64() >= 2.0, "{:?}", began.elapsed());
    assert!(hub.state.writes.answers.lock().unwrap().is_empty());
    for (address, times) in
        [("/repos/create", 2), ("/preupload/", 2), ("/batch", 2), ("/verify", 2), ("/commit/", 2), ("PUT ", 1)]
    {
        assert_eq!(asked(&hub, address), times, "{address}");
    }
    // Links can expire while a long upload goes on: new ones are asked for, once.
    let hub = Hub::start(&[]);
    *hub.state.writes.answers.lock().unwrap() = vec![("/storage/", "403 Forbidden", "X: y")];
    assert_eq!(push(&hub, &["--push", "own/er", "--create", "public"]).code, Some(0));
    assert_eq!(asked(&hub, "/batch"), 2);
}

#[test]
fn what_the_hub_refuses_is_said_in_one_line_with_the_remedy() {
    let hub = Hub::start(&[]);
    let cases = [
        (
            "nobody",
            vec!["--push", "own/er"],
            1,
            "hub: own/er: the token is not valid: set HF_TOKEN to a token that may write to own/er (Invalid username or password.)",
        ),
        (
            "reader",
            vec!["--push", "own/er"],
            1,
            "hub: own/er: HF_TOKEN may not write to own/er (the token has no write access)",
        ),
        (
            "sesame",
            vec!["--push", "other/s", "--create", "public"],
            1,
            "hub: other/s: HF_TOKEN may not write to other/s (you may not create a repository in this namespace)",
        ),
        (
            "sesame",
            vec!["--push", "own/er"],
            1,
            "hub: own/er: there is no such repository, or no branch main: --create private makes it",
        ),
        ("", vec!["--push", "own/er"], 1, "hub: own/er: set HF_TOKEN to a token that may write to it"),
        ("sesame", vec!["--push", "er"], 2, "er: not a Hub id owner/name"),
        ("sesame", vec!["--push", "own/er", "--revision", "a b"], 2, "--revision \"a b\": not a branch"),
    ];
    for (token, args, code, message) in cases {
        let done = push_as(&hub, token, &args);
        assert_eq!((done.code, done.stdout.as_str()), (Some(code), ""), "{message}: {}", done.stderr);
        assert_eq!(done.stderr, format!("export-hf: {message}\n"));
    }
    assert_eq!(stored(&hub), 0);
    let offline = hub
        .command(EXPORT_HF)
        .arg(tiny())
        .args(["--push", "own/er"])
        .env("HF_TOKEN", "sesame")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert_eq!(stderr(&offline), "export-hf: hub: own/er: HF_HUB_OFFLINE is set\n");
    for wrong in [&["out", "--push", "own/er"][..], &["--revision", "x", "out"], &["--push", "own/er", "--zip"], &[]] {
        let done = hub.command(EXPORT_HF).arg(tiny()).args(wrong).output().unwrap();
        assert_eq!(done.status.code(), Some(2), "{wrong:?}: {}", stderr(&done));
    }
}

#[test]
fn a_dry_run_tells_what_would_go_where_and_asks_nobody() {
    let hub = Hub::start(&[]);
    let done = push_as(&hub, "", &["--push", "own/er", "--dry-run", "--create", "private", "--revision", "v2"]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(lines[0], format!("{}/own/er/tree/v2, made private if there is none", hub.endpoint));
    assert!(lines.iter().any(|line| line.ends_with("  model.safetensors")) && lines.len() == 7, "{lines:?}");
    assert_eq!(hub.state.log.lock().unwrap().len(), 0);
}

#[test]
fn the_rollouts_of_a_run_are_a_data_set_on_a_branch_with_a_card() {
    let hub = Hub::start(&[]);
    let run = hub.home.path().join("run");
    fs::create_dir_all(run.join("rollouts")).unwrap();
    let recipe = "# numbers\nSEED=1\nSCORER=judge --key abc\nMODEL=Qwen/Qwen2.5-0.5B-Instruct\nSYSTEM_PROMPT=/home/me/prompt.txt\nDATA=openai/gsm8k\n";
    fs::write(run.join("recipe.env"), recipe).unwrap();
    let record = format!("{}\n", json!({"prompt_id": "a", "completion": "4", "reward": 1.0}));
    for step in 1..=2 {
        let packed = zstd::encode_all(record.as_bytes(), 1).unwrap();
        fs::write(run.join(format!("rollouts/step_{step:06}.jsonl.zst")), packed).unwrap();
    }
    fs::write(run.join("rollouts/.step_000003.jsonl.zst.tmp"), "").unwrap();
    let rollouts = run.join("rollouts").display().to_string();
    let args =
        [&rollouts, "--push-dataset", "own/rollouts", "--create", "public", "--revision", "v1", "--license", "mit"];
    let done = push(&hub, &args);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(done.stdout, format!("{}/datasets/own/rollouts/commit/{COMMIT}\n", hub.endpoint));
    let pushed = files(&hub, "datasets/own/rollouts", "v1");
    let names: Vec<&String> = pushed.keys().collect();
    assert_eq!(names, ["README.md", "data/step_000001.jsonl.zst", "data/step_000002.jsonl.zst"]);
    assert!(files(&hub, "datasets/own/rollouts", "main").is_empty());
    assert_eq!(asked(&hub, "PUT "), 1, "the same content is sent once");
    let card = String::from_utf8(pushed["README.md"].clone()).unwrap();
    for words in [
        "license: \"mit\"\n",
        "# rollouts\n",
        "`prompt_id`, `completion`, `reward`",
        "| SYSTEM_PROMPT | prompt.txt |",
        "openai/gsm8k",
    ] {
        assert!(card.contains(words), "{words}: {card}");
    }
    assert!(!card.contains("abc") && !card.contains("/home"), "{card}");
    let none = push(&hub, &[hub.home.path().to_str().unwrap(), "--push-dataset", "own/rollouts"]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.ends_with(": no file of records (.jsonl, .jsonl.zst, .jsonl.gz)\n"), "{}", none.stderr);
}

#[test]
fn a_data_set_that_was_made_is_pushed_with_its_own_card() {
    let hub = Hub::start(&[]);
    let made = hub.home.path().join("made");
    let record = json!({"prompt_id": "a", "prompt": "2 + 2?", "completion": "4", "rewards": {"correctness": 2.0}});
    fs::create_dir(&made).unwrap();
    fs::write(made.join("rollouts.jsonl"), format!("{record}\n")).unwrap();
    let exported = hub.command(EXPORT_HF).arg(made.join("rollouts.jsonl")).arg(&made).output().unwrap();
    assert!(exported.status.success(), "{}", stderr(&exported));
    let args = [made.to_str().unwrap(), "--push-dataset", "own/made", "--create", "private"];
    let done = push(&hub, &args);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let pushed = files(&hub, "datasets/own/made", "main");
    assert_eq!(pushed.keys().collect::<Vec<_>>(), ["README.md", "messages.jsonl", "sharegpt.jsonl"]);
    assert!(pushed.iter().all(|(name, bytes)| fs::read(made.join(name)).unwrap() == *bytes));
    let licensed = push(&hub, &[&args[..], &["--license", "mit"]].concat());
    assert_eq!(licensed.code, Some(2), "{}", licensed.stderr);
}

/// Python's own client pushes the same files to the same server and reads what was pushed: the server speaks the Hub's protocol.
#[test]
fn pythons_client_writes_and_reads_the_same_repository() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has_client =
        Command::new(&python).args(["-c", "import huggingface_hub"]).output().is_ok_and(|done| done.status.success());
    if !has_client {
        println!("skipped: {python} has no huggingface_hub; PYTHON names one that has");
        return;
    }
    for part_size in ["0", "100000"] {
        let hub = Hub::start(&[]);
        hub.state.writes.part_size.store(part_size.parse().unwrap(), Ordering::SeqCst);
        let local = hub.home.path().join("local");
        let done = hub.command(EXPORT_HF).arg(tiny()).arg(&local).output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        let script = "import sys, huggingface_hub as h\n\
            h.create_repo('own/theirs', private=True)\n\
            h.create_branch('own/theirs', branch='v1')\n\
            h.upload_folder(repo_id='own/theirs', folder_path=sys.argv[1], revision='v1', commit_message='theirs')\n";
        let mut client = hub.command(&python);
        client.args(["-c", script, local.to_str().unwrap()]).env("HF_TOKEN", "sesame").env("HF_HUB_DISABLE_XET", "1");
        let done = client.output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        assert_eq!(*hub.state.writes.wrong.lock().unwrap(), [""; 0]);
        let ours = push(&hub, &["--push", "own/er", "--create", "private"]);
        assert!(ours.stderr.contains("model.safetensors: is there already"), "the same content: {}", ours.stderr);
        let (mut ours, mut theirs) = (files(&hub, "models/own/er", "main"), files(&hub, "models/own/theirs", "v1"));
        assert!(ours.remove("README.md").is_some() && theirs.remove("README.md").is_some());
        assert!(ours == theirs, "{:?} {:?}", ours.keys(), theirs.keys());
        assert_eq!(hub.state.writes.repos.lock().unwrap()["models/own/theirs"].visibility, "private");
    }
}
