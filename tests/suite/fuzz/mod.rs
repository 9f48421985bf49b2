//! Inputs that are damaged, absurd or hostile: each is done or refused, without a panic, a hang, or memory that it does not need.
//!
//! `make test` tries 20,000 of them, `make fuzz` a million, in a process of its own whose address space is bounded.

mod cases;
mod lines;
mod mutate;
mod recipe;
mod targets;
mod template;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mutate::Dice;
use targets::{Place, TARGETS};

/// Inputs, unless the environment says how many.
const INPUTS: u64 = 20_000;

/// What may be allocated, and mapped, in all; that includes the memory of the threads [KiB].
const ADDRESS_SPACE: &str = "3000000";

/// No input may take longer on a machine that others use, too; one that does not end is waited for so long.
const LONGEST: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(120);

/// How many inputs are tried in all.
pub fn inputs() -> u64 {
    std::env::var("FUZZ").map_or(INPUTS, |count| count.parse().unwrap())
}

#[test]
fn no_input_ends_in_a_panic_a_hang_or_out_of_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (at, said) = (dir.path().join("at"), dir.path().join("said"));
    let mut command = Command::new("bash");
    command
        .args(["-c", &format!("ulimit -c 0 -v {ADDRESS_SPACE}; exec \"$@\"")])
        .arg("fuzz")
        .arg(std::env::current_exe().unwrap());
    command.args(["--exact", "fuzz::tries_inputs", "--ignored", "--nocapture"]).env("FUZZ", inputs().to_string());
    // A million files are soon written in memory, and take a quarter of an hour on a disk that others write to.
    if Path::new("/dev/shm").is_dir() {
        command.env("TMPDIR", "/dev/shm");
    }
    let log = File::create(&said).unwrap();
    command.env("FUZZ_AT", &at).stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null());
    let mut child = command.spawn().unwrap();
    let (mut moved, mut place) = (Instant::now(), Vec::new());
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        let now = fs::read(&at).unwrap_or_default();
        if now != place {
            (moved, place) = (Instant::now(), now);
        } else if moved.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let said = String::from_utf8_lossy(&fs::read(&said).unwrap()).into_owned();
    let place = String::from_utf8_lossy(&fs::read(&at).unwrap_or_default()).into_owned();
    assert!(status.is_some_and(|status| status.success()), "{status:?} at\n{place}\n{said}");
    println!("{}", said.lines().filter(|line| line.starts_with("fuzz: ")).collect::<Vec<_>>().join("\n"));
}

#[test]
#[ignore = "a part of the other test, run by it in a process of its own"]
fn tries_inputs() {
    let Ok(at) = std::env::var("FUZZ_AT") else { return };
    let at = File::create(Path::new(&at)).unwrap();
    let failures = AtomicU64::new(0);
    for target in &TARGETS {
        let (count, began, next) = (inputs() * target.share / 10_000, Instant::now(), AtomicU64::new(0));
        let slowest = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (at, next, slowest, failures) = (&at, &next, &slowest, &failures);
                scope.spawn(move || {
                    let mut place = Place::new();
                    loop {
                        let input = next.fetch_add(1, Ordering::Relaxed);
                        if input >= count {
                            break;
                        }
                        let name = format!("{:<12} input {input:>10}\n", target.name);
                        at.write_all_at(name.as_bytes(), thread * name.len() as u64).unwrap();
                        let took = Instant::now();
                        let ended = catch_unwind(AssertUnwindSafe(|| {
                            (target.take)(&mut place, &mut Dice::of(target.name, input))
                        }));
                        slowest.fetch_max(took.elapsed().as_millis() as u64, Ordering::Relaxed);
                        if ended.is_err() || took.elapsed() > LONGEST {
                            println!("failed: {name}");
                            place = Place::new();
                            assert!(failures.fetch_add(1, Ordering::Relaxed) < 10, "enough");
                        }
                    }
                });
            }
        });
        let (seconds, slowest) = (began.elapsed().as_secs_f64(), slowest.into_inner());
        println!("fuzz: {}: {count} inputs in {seconds:.1} s, the slowest {slowest} ms", target.name);
    }
    let memory = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let most = memory.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("unknown").trim();
    println!("fuzz: at most {most} of memory");
    assert_eq!(failures.into_inner(), 0);
}
