//! `rollout --text` on a terminal: a conversation with the model.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::grown::GrownFile;
use super::tags::Painter;
use super::{NAME, Ready, RolloutJob, Source};
use crate::checkpoint::hub;
use crate::engine::{Completion, Heard, Listener, OwnSettings, Request, Sink, Work};
use crate::error::{Error, Result};
use crate::lines::jsonl::Output;
use crate::lines::record::{Line, Message};
use crate::process::cancel::Interrupt;
use crate::process::message::note;
use crate::process::read_ahead::ReadAhead;
use crate::tokenizer::{TextStream, Tokenizer};

/// Forgets what was said.
const RESET: &str = "/reset";

/// Asks for questions and answers them, until the input ends. Each answer is sampled after all questions and answers before it. The
/// records of all answers are appended to [`RolloutJob::jsonl`].
///
/// # Errors
/// Those of [`super::sample`], and of the terminal.
pub fn converse(spec: &str, file: Option<&str>, mut job: RolloutJob) -> Result<()> {
    let source = Source::open(&hub::model(spec, file, &Source::other_types())?, &job.backend.device)?;
    job.sizes.sequences = Some(1);
    job.sizes = job.sizes.for_chats();
    let kept = match &job.jsonl {
        Some(path) => Some(Output::growing(path, GrownFile::open(path)?.into_parts().0)),
        None => None,
    };
    let (sampling, seed) = (job.sampling, job.seed);
    let ready = Ready::new(job, &source, None)?;
    let max_completion_tokens = ready.settings.max_completion_tokens;
    let begun: Vec<Message> = ready.requests.system_message().into_iter().collect();
    let interrupt = Interrupt::on_sigint()?;
    let said = begun.clone();
    let own = Own { max_completion_tokens, sampling, seed };
    let mut talk = Conversation { ready, begun, said, own, interrupt, kept };
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    note(NAME, &format!("ask a question; {RESET} begins anew, Ctrl-C stops an answer, Ctrl-D ends"));
    loop {
        match editor.readline("> ") {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) if line.trim() == RESET => talk.said.clone_from(&talk.begun),
            Ok(line) => {
                let _ = editor.add_history_entry(line.trim());
                talk.answer(line.trim())?;
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => return talk.kept.map_or(Ok(()), Output::finish),
            Err(err) => return Err(terminal(err)),
        }
    }
}

struct Conversation {
    ready: Ready,
    /// What every conversation begins with: the system prompt, if there is one.
    begun: Vec<Message>,
    said: Vec<Message>,
    own: Own,
    interrupt: Interrupt,
    kept: Option<Output>,
}

struct Own {
    max_completion_tokens: usize,
    sampling: crate::model::Sampling,
    seed: u64,
}

impl Conversation {
    /// Answers a question. One that is too long, or whose answer is stopped, is forgotten.
    fn answer(&mut self, question: &str) -> Result<()> {
        self.said.push(Message::new("user", question));
        let answer = self.sample()?;
        match answer {
            Some(answer) => self.said.push(Message::new("assistant", answer)),
            None => drop(self.said.pop()),
        }
        Ok(())
    }

    fn sample(&mut self) -> Result<Option<String>> {
        let messages = serde_json::json!(self.said);
        let (prompt_id, prompt, tokens) = match self.ready.requests.chat(messages) {
            Ok(built) => built,
            Err(Error::Data(what)) => {
                note(NAME, &format!("{what}; {RESET} begins anew"));
                return Ok(None);
            }
            Err(other) => return Err(other),
        };
        self.interrupt.lower();
        let tokenizer = Arc::clone(&self.ready.tokenizer);
        let listener = Arc::new(Screen {
            interrupt: self.interrupt.clone(),
            shown: Mutex::new((TextStream::new(&tokenizer), Painter::of_stdout())),
        });
        let text = serde_json::json!({ "prompt_id": prompt_id, "prompt": prompt.messages }).to_string();
        let payload = Line { path: "-".into(), number: self.said.len(), text };
        let Own { max_completion_tokens, sampling, seed } = self.own;
        let own = OwnSettings { group_size: 1, max_completion_tokens, sampling, seed, listener };
        let request = Request { prompt_id, tokens, payload, own: Some(own) };
        let ready = (&self.ready.origin, &*tokenizer);
        let mut sink = Answer { ready, kept: self.kept.as_mut(), interrupt: &self.interrupt, text: None };
        self.ready.backend.sample(&self.ready.settings, ReadAhead::ready(vec![request]), &mut sink)?;
        let answer = sink.text;
        io::stdout().write_all(b"\n").map_err(Error::Output)?;
        self.interrupt.lower();
        Ok(answer)
    }
}

/// Shows an answer as it is sampled.
struct Screen {
    interrupt: Interrupt,
    shown: Mutex<(TextStream, Painter)>,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Screen")
    }
}

impl Listener for Screen {
    fn hear(&self, heard: Heard) -> bool {
        let (text, painter) = &mut *self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let is_stopped = self.interrupt.is_raised();
        let mut painted = String::new();
        if heard.end != Some(true) {
            painted += &painter.paint(&text.push(heard.token).unwrap_or_default());
        }
        if heard.end.is_some() || is_stopped {
            painted += &painter.paint(&text.finish().unwrap_or_default());
            painted += &painter.finish();
        }
        let mut out = io::stdout().lock();
        let is_shown = out.write_all(painted.as_bytes()).and_then(|()| out.flush()).is_ok();
        is_shown && !is_stopped
    }
}

/// Takes the answer as a whole, unless it was stopped.
struct Answer<'a> {
    ready: (&'a super::Origin, &'a Tokenizer),
    kept: Option<&'a mut Output>,
    interrupt: &'a Interrupt,
    text: Option<String>,
}

impl Sink<Line> for Answer<'_> {
    fn group(&mut self, request: Request<Line>, completions: Vec<Completion>) -> Result<()> {
        if self.interrupt.is_raised() {
            return Ok(());
        }
        let (origin, tokenizer) = self.ready;
        let Completion { tokens, stopped, .. } = &completions[0];
        self.text = Some(tokenizer.decode(&tokens[..tokens.len() - usize::from(*stopped)])?);
        match &mut self.kept {
            Some(kept) => origin.write_group(tokenizer, &request, &completions, kept),
            None => Ok(()),
        }
    }

    fn progress(&mut self, _: Work) -> Result<()> {
        Ok(())
    }
}

fn terminal(err: ReadlineError) -> Error {
    match err {
        ReadlineError::Io(err) => Error::io("-")(err),
        other => Error::io("-")(io::Error::other(other)),
    }
}
