//! A run that is killed again and again. `make chaos N=100` does it more often than `make test`.

use std::time::{Duration, Instant};

use crate::runs::{Root, Started};

/// Kills of each run, unless the environment says how many.
const KILLS: u64 = 20;

/// What is killed; the first half of the times it is everything at once.
const TARGETS: [Option<&str>; 8] =
    [None, None, None, None, Some("rollout"), Some("score"), Some("grpo-step"), Some("bash")];

#[test]
fn a_run_killed_at_many_moments_makes_the_same_bytes() {
    kill_again_and_again("0");
}

#[test]
fn a_run_that_samples_ahead_killed_at_many_moments_makes_the_same_bytes() {
    kill_again_and_again("2");
}

fn kill_again_and_again(max_staleness: &'static str) {
    let kills = std::env::var("CHAOS").map_or(KILLS, |count| count.parse().unwrap());
    let whole = Root::new(&[("STEPS", "120"), ("SAVE_EVERY", "3"), ("MAX_STALENESS", max_staleness)]);
    whole.train_whole();
    let (mut root, mut moment, mut runs) = (whole.back_to_the_start(), 1, 1);
    for kill in 1..=kills {
        moment = moment * 48_271 % 0x7fff_ffff;
        let target = TARGETS[(moment / 1009) as usize % TARGETS.len()];
        let mut run = root.start();
        let (steps, then) = (moment % 7, Duration::from_millis(moment / 7 % 150));
        wait_for_steps(&mut run, &root, steps);
        std::thread::sleep(then);
        let killed = kill_some(run, target);
        let policy = std::fs::read_link(root.run("policy")).unwrap();
        println!("kill {kill}, run {runs}: {killed} after {steps} steps and {then:?}, at {}", policy.display());
        if root.run("export").exists() {
            root.assert_same_files(&whole);
            (root, runs) = (whole.back_to_the_start(), runs + 1);
        }
    }
    root.train_whole();
    root.assert_same_files(&whole);
    println!("{kills} kills in {runs} runs: every file of each run is that of the run left alone");
}

/// Waits until the run has made some steps more than its policy has, or ended: a machine with other work takes its time.
fn wait_for_steps(run: &mut Started, root: &Root, steps: u64) {
    let policy = std::fs::read_link(root.run("policy")).unwrap().display().to_string();
    let reached: u64 = policy.rsplit('_').next().unwrap().parse().unwrap();
    let youngest = root.run(&format!("rollouts/step_{:06}.jsonl.zst", reached + steps));
    while steps > 0 && !youngest.exists() && run.child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Kills everything, or a stage if it is there, upon which the rest must end by itself.
fn kill_some(mut run: Started, target: Option<&'static str>) -> &'static str {
    match target.filter(|name| run.signal_one("KILL", name)) {
        None => {
            run.kill_all();
            "all"
        }
        Some(name) => {
            let began = Instant::now();
            // Unless it is waited for, it seems to live.
            while run.child.try_wait().unwrap().is_none() || !run.processes().is_empty() {
                assert!(began.elapsed() < Duration::from_secs(60), "left after {name}: {:?}", run.processes());
                std::thread::sleep(Duration::from_millis(10));
            }
            name
        }
    }
}
