//! Commands as processes: what goes in, what comes out, and the ends that every filter shares.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// A finished process.
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// What was said besides where it is computed, which is said first where anything is.
    pub fn said(&self) -> &str {
        match self.stderr.split_once('\n') {
            Some((place, rest)) if place.contains(": computing on the CPU (") => rest,
            _ => &self.stderr,
        }
    }

    /// Standard output as records.
    pub fn records(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Records as JSONL.
pub fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

/// Runs a command to its end with `input` on its standard input.
pub fn run(program: &str, args: &[&str], input: &str) -> Finished {
    run_into(program, args, input, Stdio::piped())
}

/// As [`run`], with its standard output somewhere.
pub fn run_into(program: &str, args: &[&str], input: &str, stdout: Stdio) -> Finished {
    let mut command = Command::new(program);
    command.args(args).env_remove("COLUMNS").stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    // A command that ends early closes its input; that is not this side's failure.
    let writer = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Finished { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// `--help` is what `tests/golden/help_NAME.txt` holds; run with `UPDATE_GOLDEN=1` to write it.
pub fn check_help(program: &str, name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/help_{name}.txt"));
    let help = run(program, &["--help"], "").stdout;
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &help).unwrap();
    }
    assert_eq!(help, std::fs::read_to_string(&path).unwrap(), "{}", path.display());
}

/// A reader that went away before `input` was written out: quiet success.
pub fn check_closed_pipe(program: &str, input: &str) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let done = run_into(program, &[], input, writer.into());
    assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""));
}

/// A full disk: code 1 and one line.
pub fn check_full_disk(program: &str, input: &str) {
    let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else {
        return;
    };
    let done = run_into(program, &[], input, full.into());
    assert_eq!(done.code, Some(1), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
}

/// A file that is not there: code 1, and its name.
pub fn check_missing_file(program: &str) {
    let done = run(program, &["no/such/file.jsonl"], "");
    assert_eq!(done.code, Some(1));
    assert!(done.stderr.contains("no/such/file.jsonl: "), "{}", done.stderr);
}
