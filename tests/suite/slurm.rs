//! The jobs of `pipelines/slurm/` on a Slurm of two nodes, which `tests/slurm/with.sh` starts on this machine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::runs::{Root, text};

const PACKAGES: &str = "slurmctld slurmd slurm-client munge";

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(120);

/// What this machine lacks for a Slurm of its own.
fn missing() -> Option<String> {
    let is_so = |test: &str| Command::new("sh").args(["-c", test]).status().unwrap().success();
    if !is_so("[ $(id -u) = 0 ]") {
        return Some("this is not root".into());
    }
    let needed = ["slurmctld", "slurmd", "munged", "sbatch", "unshare"];
    let lacking = needed.into_iter().find(|program| !is_so(&format!("command -v {program} >/dev/null")))?;
    Some(format!("there is no {lacking} (Debian's packages: {PACKAGES})"))
}

/// Slurm, for jobs in a directory; it ends when dropped.
struct Slurm<'a> {
    root: &'a Root,
    child: Child,
}

impl<'a> Slurm<'a> {
    fn start(root: &'a Root) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/slurm/with.sh");
        let mut command = Command::new("bash");
        command.arg(script).arg(root.path("slurm")).args(["sh", "-c", "echo ready && cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{}", root.path("slurm").display());
        Self { root, child }
    }

    /// Runs a command of Slurm's in the root's directory, and returns what it wrote.
    fn run(&self, command: &str) -> String {
        let done = self.root.shell(command).env("SLURM_CONF", self.root.path("slurm/slurm.conf")).output().unwrap();
        assert!(done.status.success(), "{command}: {}", text(&done.stderr));
        text(&done.stdout)
    }

    fn wait_until(&self, what: &str, is_so: impl Fn() -> bool) {
        let began = Instant::now();
        while !is_so() {
            assert!(began.elapsed() < LONG, "not so: {what}\n{}{}", self.run("squeue"), self.run("cat *.log"));
            sleep(Duration::from_millis(20));
        }
    }

    fn wait_for_file(&self, file: &Path) {
        self.wait_until(&file.display().to_string(), || file.exists());
    }

    fn wait_for_state(&self, job: &str, state: &str) {
        let is_so = || self.run(&format!("squeue --states=all --noheader --format=%T --jobs={job}")).trim() == state;
        self.wait_until(state, is_so);
    }

    /// Spares a job that is queued again most of the two minutes that Slurm lets it wait. In the second of its end its new credentials would be
    /// taken for the old ones.
    fn start_soon(&self, job: &str) {
        self.wait_for_state(job, "PENDING");
        self.run(&format!("scontrol update JobId={job} StartTime=now+2"));
    }
}

impl Drop for Slurm<'_> {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

#[test]
fn a_job_array_samples_and_a_job_trains_the_bytes_of_one_machine_also_when_killed() {
    if let Some(what) = missing() {
        println!("skipped, because {what}");
        return;
    }
    let numbers = [("STEPS", "120"), ("SAVE_EVERY", "7")];
    let (whole, root) = (Root::new(&numbers), Root::new(&numbers));
    whole.train_whole();
    let slurm = Slurm::start(&root);
    samples(&slurm, &whole);
    trains(&slurm, &whole);
}

fn samples(slurm: &Slurm<'_>, whole: &Root) {
    let (prompts, model) = (whole.run("eval/after.prompts.jsonl"), whole.run("export"));
    let arguments = format!("{} --model {} -n 2", prompts.display(), model.display());
    let sbatch = |array: &str| {
        let (sampling, script) = (arguments.replacen(' ', " samples ", 1), "pipelines/slurm/sample.sbatch");
        slurm.run(&format!("SHARDS=3 sbatch --array={array} {script} {sampling}"));
    };
    let part = |number: u64| slurm.root.path(&format!("samples/part-{number}-of-3.jsonl"));
    let merge = || slurm.root.shell("bash pipelines/merge-shards.sh 3 samples").output().unwrap();

    sbatch("1-3");
    (1..=3).for_each(|number| slurm.wait_for_file(&part(number)));
    let all = slurm.run(&format!("target/release/rollout {arguments}"));
    assert!(text(&merge().stdout) == all && all.lines().count() == 24);

    fs::remove_file(part(2)).unwrap();
    let lost = merge();
    assert_eq!((lost.status.code(), text(&lost.stdout).as_str()), (Some(1), ""));
    assert_eq!(text(&lost.stderr), "merge-shards.sh: of the 3 parts, samples lacks 2\n");
    sbatch("2");
    slurm.wait_for_file(&part(2));
    assert_eq!(text(&merge().stdout), all);
}

fn trains(slurm: &Slurm<'_>, whole: &Root) {
    let root = slurm.root;
    let job = slurm.run("sbatch --parsable --time=9 pipelines/slurm/train.sbatch").trim().to_owned();
    // As a minute before the time limit: it ends at a checkpoint, and queues itself.
    slurm.wait_for_file(&root.run("rollouts/step_000009.jsonl.zst"));
    slurm.run(&format!("scancel --signal=TERM {job}"));
    slurm.start_soon(&job);
    let reached = fs::read_link(root.run("policy")).unwrap();
    assert!(reached.as_path() > Path::new("checkpoints/step_000007"), "{reached:?}: no checkpoint of the step reached");
    // As when a machine goes down.
    slurm.wait_for_file(&root.run("rollouts/step_000040.jsonl.zst"));
    let tasks = format!("squeue --steps --noheader --format=%i --jobs={job} | grep -v '[a-z]'");
    slurm.run(&format!("scancel --signal=KILL $({tasks}) || true")); // which fails for the second if the first has ended the job
    slurm.wait_for_state(&job, "FAILED");
    assert!(!root.run("export").exists());
    slurm.run(&format!("scontrol requeue {job}"));
    slurm.start_soon(&job);
    slurm.wait_for_state(&job, "COMPLETED");
    root.assert_same_files(whole);
    let said = fs::read_to_string(root.path(&format!("train-{job}.log"))).unwrap();
    let told = said.matches("grpo-step: the sampler is on n2; the weights of each step go through runs/run/live");
    assert_eq!(told.count(), 3, "{said}");
}
