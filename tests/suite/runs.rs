//! Runs of `pipelines/train.sh` on numbers so small that they end in seconds.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
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

/// A directory that looks like the project's, with `runs/` of its own, and numbers that differ from [`NUMBERS`].
pub struct Root {
    dir: TempDir,
    numbers: Vec<(&'static str, String)>,
}

impl Drop for Root {
    /// A run that was killed and never goes on leaves its weights in memory.
    fn drop(&mut self) {
        if let Ok(live) = std::fs::read_link(self.run("live")) {
            let _ = std::fs::remove_dir_all(live);
        }
    }
}

impl Root {
    pub fn new(numbers: &[(&'static str, &str)]) -> Self {
        let project = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = tempfile::tempdir().unwrap();
        symlink(project.join("pipelines"), dir.path().join("pipelines")).unwrap();
        std::fs::create_dir(dir.path().join("target")).unwrap();
        let commands = Path::new(env!("CARGO_BIN_EXE_rollout")).parent().unwrap();
        symlink(commands, dir.path().join("target/release")).unwrap();
        Self { dir, numbers: numbers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run(&self, name: &str) -> PathBuf {
        self.path("runs/run").join(name)
    }

    pub fn script(&self, name: &str, more: &[(&str, &str)]) -> Command {
        let mut command = self.bash();
        command.arg(format!("pipelines/{name}")).envs(more.iter().copied());
        command
    }

    /// Commands in the root's directory, with its numbers.
    pub fn shell(&self, commands: &str) -> Command {
        let mut command = self.bash();
        command.args(["-c", commands]);
        command
    }

    fn bash(&self) -> Command {
        let mut command = Command::new("bash");
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command.envs(NUMBERS).envs(self.numbers.iter().cloned());
        command
    }

    pub fn train(&self, more: &[(&str, &str)]) -> Output {
        self.script("train.sh", more).output().unwrap()
    }

    /// Trains, and it must succeed.
    pub fn train_whole(&self) {
        let done = self.train(&[]);
        assert!(done.status.success(), "{}", text(&done.stderr));
    }

    /// A copy of a run that is done, taken back to its start.
    pub fn back_to_the_start(&self) -> Self {
        self.back_to(0)
    }

    /// A copy of a run that is done, its policy taken back to a step. Of what came after, checkpoints and metrics are still there.
    pub fn back_to(&self, step: u64) -> Self {
        let numbers: Vec<_> = self.numbers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let copy = Self::new(&numbers);
        let copied = Command::new("cp").arg("-a").arg(self.path("runs")).arg(copy.path("runs")).status().unwrap();
        assert!(copied.success());
        std::fs::remove_file(copy.run("policy")).unwrap();
        symlink(format!("checkpoints/step_{step:06}"), copy.run("policy")).unwrap();
        std::fs::remove_dir_all(copy.run("export")).unwrap();
        for dir in ["eval", "rollouts"] {
            for entry in std::fs::read_dir(copy.run(dir)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let later = name.strip_prefix("step_").is_some_and(|number| number[..6].parse::<u64>().unwrap() > step);
                if later || name.starts_with("after.") {
                    std::fs::remove_file(copy.run(dir).join(name)).unwrap();
                }
            }
        }
        copy
    }

    /// Every file of the run with its hash. Logs tell speeds and events times, which differ, and the lock the last trainer's process.
    pub fn files(&self) -> BTreeMap<String, blake3::Hash> {
        let mut found = BTreeMap::new();
        walk(&self.path("runs"), &mut found);
        let strip =
            |(path, hash): (PathBuf, _)| (path.strip_prefix(self.dir.path()).unwrap().display().to_string(), hash);
        found.into_iter().map(strip).collect()
    }

    /// Fails with the names of files that are not the same in both runs.
    pub fn assert_same_files(&self, other: &Self) {
        let (ours, theirs) = (self.files(), other.files());
        let names: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
        let different: Vec<_> = names.into_iter().filter(|name| ours.get(*name) != theirs.get(*name)).collect();
        assert_eq!(different, Vec::<&String>::new());
    }

    /// Starts training in a session of its own.
    pub fn start(&self) -> Started {
        self.start_with(&[])
    }

    pub fn start_with(&self, more: &[(&str, &str)]) -> Started {
        let script = self.script("train.sh", more);
        let mut command = Command::new("setsid");
        // A shell cannot take signals that were ignored where it began, as SIGINT is in the background of another.
        command
            .args(["env", "--default-signal=INT"])
            .arg(script.get_program())
            .args(script.get_args())
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command.envs(script.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        Started { child }
    }
}

fn walk(dir: &Path, found: &mut BTreeMap<PathBuf, blake3::Hash>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let own = path.extension().is_some_and(|extension| extension == "log" || extension == "tfevents")
            || path.ends_with("lock")
            || path.extension().is_some_and(|extension| extension == "lock");
        if path.is_dir() && !path.is_symlink() {
            walk(&path, found);
        } else if path.is_file() && !own {
            found.insert(path.clone(), blake3::hash(&std::fs::read(&path).unwrap()));
        }
    }
}

/// A run under way; killed, with all of its commands, when dropped.
pub struct Started {
    pub child: Child,
}

impl Started {
    /// Waits until the run has come to a file, or ended.
    pub fn wait_for(&mut self, file: &Path) {
        let began = Instant::now();
        while !file.exists() {
            let running = self.child.try_wait().unwrap().is_none();
            let in_time = began.elapsed() < Duration::from_secs(120);
            assert!(running && in_time, "never came to {}", file.display());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The processes of the session, by number and name.
    pub fn processes(&self) -> Vec<(String, String)> {
        Self::processes_of(self.child.id())
    }

    /// Those that are left of a session soon after its end: who has just been killed takes a moment to go.
    pub fn left_of(session: u32) -> Vec<(String, String)> {
        for _ in 0..20 {
            if Self::processes_of(session).is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Self::processes_of(session)
    }

    /// Those of a session, by number and name.
    fn processes_of(session: u32) -> Vec<(String, String)> {
        let ps = Command::new("ps").args(["-A", "-o", "pid=,sess=,stat=,comm="]).output().unwrap();
        let session = session.to_string();
        let listed = text(&ps.stdout);
        let fields = listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = fields.filter(|fields| fields.len() > 3 && fields[1] == session && !fields[2].starts_with('Z'));
        ours.map(|fields| (fields[0].to_owned(), fields[3].to_owned())).collect()
    }

    /// Sends a signal to one of the processes, if it is there.
    pub fn signal_one(&self, signal: &str, name: &str) -> bool {
        let processes = self.processes();
        let found = processes.iter().find(|(_, other)| other == name);
        found.inspect(|(id, _)| send(signal, id)).is_some()
    }

    /// Waits for the end: the code, and what was said.
    pub fn end_of_it(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }

    /// Kills all of them at once.
    pub fn kill_all(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // Some may be born while others are being listed.
        loop {
            let ids: Vec<String> = self.processes().into_iter().map(|(id, _)| id).collect();
            if ids.is_empty() {
                break;
            }
            send("KILL", &ids.join(" "));
        }
        self.child.wait().unwrap();
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.end();
    }
}

/// The shell's own kill: some programs of that name read a group's number as other options.
pub fn send(signal: &str, ids: &str) {
    // What has ended by itself meanwhile is no failure.
    Command::new("bash").args(["-c", &format!("kill -{signal} -- {ids}")]).stderr(Stdio::null()).status().unwrap();
}

/// What was said besides how far a run is, where it computes, and that it learns nothing.
pub fn news(said: &str) -> Vec<&str> {
    let usual =
        ["run: ", "grpo-step: step ", "rollout: computing on ", "grpo-step: computing on ", "grpo-step: spent "];
    let is_usual = |line: &str| usual.iter().any(|begin| line.starts_with(begin)) || line.contains(": health: ");
    said.lines().filter(|line| !is_usual(line)).collect()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
