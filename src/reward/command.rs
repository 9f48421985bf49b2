//! Rewards from a program of the user's: it reads a record per line and answers each with a line.
//!
//! Some copies of the program run side by side, each on a record of its own. Threads carry lines to and from each copy, so that one that
//! neither reads nor answers can be given up.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::lines::record::Line;

/// The name under which a lone number is recorded.
pub const NAME: &str = "command";
/// How long a copy may take to end once its input has (seconds), before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// The most that an error quotes of an answer (characters).
const QUOTED: usize = 80;

/// Rewards by name; `None` where the program says null.
pub type Answer = Vec<(String, Option<f64>)>;

/// The copies of a program.
#[derive(Debug)]
pub struct Workers {
    command: String,
    limit: Duration,
    idle: Mutex<Vec<Worker>>,
}

/// A running copy.
#[derive(Debug)]
struct Worker {
    child: Child,
    to: Option<Sender<String>>,
    from: Receiver<std::io::Result<String>>,
}

impl Workers {
    /// Will start `command` in a shell whenever a record finds no idle copy. A copy has `limit` for each record.
    #[must_use]
    pub fn new(command: &str, limit: Duration) -> Self {
        Self { command: command.to_owned(), limit, idle: Mutex::default() }
    }

    /// What the program gives the completion of a record.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when the program cannot be started, does not answer in time, ends, answers more than once, or with anything
    /// but a number, null or an object of these.
    pub fn ask(&self, line: &Line) -> Result<Answer> {
        let wrong = |what: String| line.error(format!("the command {what}"));
        let idle = self.lock().pop();
        let mut worker = match idle {
            Some(worker) => worker,
            None => Worker::start(&self.command).map_err(|err| wrong(format!("cannot be started: {err}")))?,
        };
        let text = worker.ask(&line.text, self.limit).map_err(wrong)?;
        let answer = parse(&text).map_err(wrong)?;
        self.lock().push(worker);
        Ok(answer)
    }

    /// Ends the copies that are there. What one still says belongs to no record, so that answers before may have gone to the wrong ones.
    ///
    /// # Errors
    /// [`Error::Data`] when one says something.
    pub fn finish(&self) -> Result<()> {
        let mut workers = std::mem::take(&mut *self.lock());
        workers.iter_mut().for_each(|worker| worker.to = None); // the end of their inputs, for all before waiting for one
        let said = workers.into_iter().find_map(Worker::last_words);
        said.map_or(Ok(()), |line| Err(Error::Data(format!("the command {}", one_too_many(&line)))))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Worker>> {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Worker {
    fn start(command: &str) -> std::io::Result<Self> {
        let mut child =
            Command::new("sh").args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (mut input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let ((to, lines), (answers, from)) = (channel::<String>(), channel());
        thread::spawn(move || {
            // An error is that the program is gone, which its output says too.
            lines.into_iter().try_for_each(|line| input.write_all(line.as_bytes()).and_then(|()| input.flush()))
        });
        thread::spawn(move || BufReader::new(output).lines().try_for_each(|line| answers.send(line)));
        Ok(Self { child, to: Some(to), from })
    }

    fn ask(&mut self, record: &str, limit: Duration) -> std::result::Result<String, String> {
        if let Ok(Ok(line)) = self.from.try_recv() {
            return Err(one_too_many(&line));
        }
        // If nobody takes it, there will be no answer either.
        let _ = self.to.as_ref().expect("taken when it is dropped").send(format!("{record}\n"));
        match self.from.recv_timeout(limit) {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(err)) => Err(format!("answers with what is no text: {err}")),
            Err(RecvTimeoutError::Timeout) => Err(format!("gives no answer within {} s", limit.as_secs_f64())),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait().map_err(|err| err.to_string())?;
                Err(format!("ended before it answered ({status}); it must answer each line of its input with a line"))
            }
        }
    }
}

impl Worker {
    /// What it says after the end of its input.
    fn last_words(self) -> Option<String> {
        self.from.recv_timeout(GRACE).ok()?.ok()
    }
}

fn one_too_many(line: &str) -> String {
    let quoted: String = line.chars().take(QUOTED).collect();
    format!("answered an earlier record with a second line, \"{quoted}\": it must write one per record")
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.to = None; // the end of its input
        let began = Instant::now();
        while began.elapsed() < GRACE {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(5)),
                _ => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads an answer: a number, null, or an object of these.
fn parse(text: &str) -> std::result::Result<Answer, String> {
    let quoted = || text.chars().take(QUOTED).collect::<String>();
    let wrong = || format!("answers \"{}\", which is no number, null, or object of these", quoted());
    let number = |value: &Value| match value {
        Value::Null => Ok(None),
        Value::Number(number) => number.as_f64().filter(|number| number.is_finite()).map(Some).ok_or_else(wrong),
        _ => Err(wrong()),
    };
    match serde_json::from_str(text.trim()).map_err(|_| wrong())? {
        Value::Object(parts) if !parts.is_empty() => {
            parts.iter().map(|(name, value)| Ok((name.clone(), number(value)?))).collect()
        }
        Value::Object(_) => Err(wrong()),
        value => Ok(vec![(NAME.to_owned(), number(&value)?)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_number_null_or_an_object_of_these() {
        assert_eq!(parse(" 0.5 \r").unwrap(), [("command".to_owned(), Some(0.5))]);
        assert_eq!(parse("null").unwrap(), [("command".to_owned(), None)]);
        let parts = parse(r#"{"brief": 1, "kind": null}"#).unwrap();
        assert_eq!(parts, [("brief".to_owned(), Some(1.0)), ("kind".to_owned(), None)]);
        for wrong in ["", "yes", "[1]", "true", "{}", r#"{"a": "b"}"#, "1e999", "NaN", "1 2"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
