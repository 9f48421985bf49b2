//! `rollout --text` on a terminal, which `script` makes.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fixtures::directory;

struct Terminal {
    script: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// `None` where there is no `script` as of util-linux.
    fn start(more: &str) -> Option<Self> {
        let known = Command::new("script")
            .arg("--version")
            .output()
            .is_ok_and(|said| said.stdout.starts_with(b"script from util-linux"));
        if !known {
            eprintln!("left out: no script of util-linux");
            return None;
        }
        let model = directory().join("tiny-qwen2");
        let rollout =
            format!("{} --text --model {} --device cpu {more}", env!("CARGO_BIN_EXE_rollout"), model.display());
        let mut command = Command::new("script");
        command.args(["-q", "-e", "-f", "-c", &rollout, "/dev/null"]).env("TERM", "xterm").env_remove("NO_COLOR");
        let mut script = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut output, all) = (script.stdout.take().unwrap(), Arc::clone(&seen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut buffer) {
                all.lock().unwrap().extend_from_slice(&buffer[..read]);
            }
        });
        let terminal = Self { script, seen };
        terminal.wait_for_prompts(1);
        Some(terminal)
    }

    fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    /// The prompt is drawn again with each key, but put into this mode, where pasted text is marked, once per question.
    fn wait_for_prompts(&self, count: usize) {
        let began = Instant::now();
        while self.seen().matches("\x1b[?2004h").count() < count {
            assert!(began.elapsed() < Duration::from_secs(60), "{:?}", self.seen());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn send(&mut self, keys: &str) {
        self.script.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    fn end(mut self) -> Option<i32> {
        self.send("\x04");
        let ended = self.script.wait().unwrap().code();
        drop(self.script.stdin.take());
        ended
    }
}

fn records(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_conversation_has_a_history_that_reset_forgets_and_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("asked.jsonl");
    let Some(mut terminal) = Terminal::start(&format!("--max-completion-tokens 8 --jsonl {}", path.display())) else {
        return;
    };
    for (i, line) in ["1 + 2?", "and 3?", "/reset", "1 + 2?"].into_iter().enumerate() {
        terminal.send(&format!("{line}\r"));
        terminal.wait_for_prompts(i + 2);
    }
    let seen = terminal.seen();
    assert_eq!(terminal.end(), Some(0));
    let records = records(&path);
    assert_eq!(records.len(), 3);
    let roles = |record: &Value| -> Vec<String> {
        record["prompt"].as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap().into()).collect()
    };
    assert_eq!(roles(&records[0]), ["system", "user"]);
    assert_eq!(roles(&records[1]), ["system", "user", "assistant", "user"]);
    assert_eq!(records[1]["prompt"][2]["content"], records[0]["completion"]);
    assert_eq!(records[2], records[0]);
    let shown = |text: &str| text.replace("\x1b[0m", "").replace(|c: char| c.is_control(), "");
    for record in &records {
        let completion = shown(record["completion"].as_str().unwrap());
        assert!(shown(&seen).contains(&completion), "{completion:?} in {seen:?}");
    }
}

#[test]
fn ctrl_c_stops_an_answer_and_not_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("asked.jsonl");
    let Some(mut terminal) = Terminal::start(&format!("--max-completion-tokens 400 --jsonl {}", path.display())) else {
        return;
    };
    let mut asked = 0;
    // An answer may be faster than the key.
    while asked == records(&path).len() {
        asked += 1;
        assert!(asked < 50, "no answer was stopped");
        let prompts = terminal.seen().matches("\x1b[?2004h").count();
        terminal.send("/reset\r1 + 2?\r");
        thread::sleep(Duration::from_millis(3 * asked as u64));
        terminal.send("\x03");
        terminal.wait_for_prompts(prompts + 2);
        thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(records(&path).len(), asked - 1);
    let prompts = terminal.seen().matches("\x1b[?2004h").count();
    terminal.send("5 + 2?\r");
    terminal.wait_for_prompts(prompts + 1);
    assert_eq!(terminal.end(), Some(0));
    let last = &records(&path)[asked - 1];
    assert_eq!(last["prompt"].as_array().unwrap().last().unwrap()["content"], "5 + 2?");
}
