//! What the six commands share at their edges: option groups, and the way from a result to an exit code.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::lines::jsonl::Output;

/// Where records come from.
#[derive(Debug, clap::Args)]
pub struct InputArgs {
    /// File of JSONL records (`.zst` is decompressed); `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    pub file: PathBuf,
}

/// Where records go.
#[derive(Debug, clap::Args)]
pub struct OutputArgs {
    /// Write to FILE instead of standard output: beside it first, then renamed (`.zst` is compressed)
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Runs a pure filter: a command whose only effect is what it writes to its output.
///
/// Whole records written before an error are flushed before the message. A reader that went away (`head`) ends the command
/// quietly with 0: Rust ignores SIGPIPE, so it arrives here as [`Error::Output`].
pub fn run_filter(name: &str, args: &OutputArgs, body: impl FnOnce(&mut Output) -> Result<()>) -> ExitCode {
    let outcome = Output::create(args.output.as_deref()).and_then(|mut out| match body(&mut out) {
        Ok(()) => out.finish(),
        Err(err) => out.flush_after_error().and(Err(err)),
    });
    match outcome {
        Err(Error::Output(err)) if err.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        outcome => report(name, outcome),
    }
}

/// The exit code of a finished command, with the error's one line on stderr. What is only the consequence of a signal, or of the end
/// of another command, is left to the exit code and the log.
pub fn report(name: &str, outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            let line = one_line(&err.to_string());
            if err.is_consequence() {
                write_log(name, &line)
            } else {
                note(name, &line)
            }
            ExitCode::from(err.exit_code())
        }
    }
}

/// Characters of an error that are told of its beginning, and of its end.
const ERROR_CHARS: usize = 1000;

/// An error as one line: what it quotes of an input may hold line ends, or a terminal's commands, or megabytes.
fn one_line(error: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().collect::<String>() } else { c.into() };
    let count = error.chars().count();
    if count <= 2 * ERROR_CHARS {
        return error.chars().map(escape).collect();
    }
    let begin = error.chars().take(ERROR_CHARS);
    begin.chain(" ... ".chars()).chain(error.chars().skip(count - ERROR_CHARS)).map(escape).collect()
}

/// One line on stderr, `NAME: message`, and in the log. In one piece, because several commands write to stderr; one that is closed is
/// no error.
pub fn note(name: &str, message: &str) {
    let _ = io::stderr().write_all(format!("{name}: {message}\n").as_bytes());
    write_log(name, message);
}

/// One line in the log, or where there is none on stderr: how far a command is, and where it computes.
pub fn detail(name: &str, message: &str) {
    if has_log() { write_log(name, message) } else { note(name, message) }
}

/// The file of [`log_to`].
static LOG: Mutex<Option<File>> = Mutex::new(None);

/// Makes the file that messages and progress go to from now on.
///
/// # Errors
/// [`Error::Io`] when it cannot be made.
pub fn log_to(path: &Path) -> Result<()> {
    // Appended to, so that lines of a second command that is refused do not stand in the middle of those of the first.
    let opened = OpenOptions::new().create(true).append(true).open(path);
    let file = opened.and_then(|file| file.set_len(0).map(|()| file)).map_err(Error::io(path))?;
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    Ok(())
}

/// Whether there is a log.
#[must_use]
pub fn has_log() -> bool {
    LOG.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// A full disk ends the work with an error of its own, not here.
fn write_log(name: &str, message: &str) {
    if let Some(file) = &mut *LOG.lock().unwrap_or_else(PoisonError::into_inner) {
        let _ = file.write_all(format!("{name}: {message}\n").as_bytes());
    }
}

/// Output lines of a command whose effect is on the disk: a line that nobody takes is an error, but the last one.
pub struct Report {
    output: Option<Output>,
    lost: Option<Error>,
}

impl Report {
    /// Lines to standard output, or to the file of `args`.
    ///
    /// # Errors
    /// As [`Output::create`].
    pub fn create(args: &OutputArgs) -> Result<Self> {
        Ok(Self { output: Some(Output::create(args.output.as_deref())?), lost: None })
    }

    /// Writes a line at once. After a failure, the rest goes nowhere until [`Report::finish`] tells of it.
    pub fn write(&mut self, line: &[u8]) {
        if let Some(output) = &mut self.output
            && let Err(err) = output.write_line(line).and_then(|()| output.flush())
        {
            self.lost = Some(err);
            // Dropping would try, and fail, again; the text that was not taken is gone either way.
            let _ = self.output.take().map(Output::flush_after_error);
        }
    }

    /// Says whether a line was lost so far.
    ///
    /// # Errors
    /// As [`Report::finish`].
    pub fn check(&mut self) -> Result<()> {
        self.lost.take().map_or(Ok(()), Err)
    }

    /// Flushes, and says whether a line was lost.
    ///
    /// # Errors
    /// [`Error::Output`] or [`Error::Io`], also when the reader of a pipe went away.
    pub fn finish(mut self) -> Result<()> {
        self.check()?;
        self.output.map_or(Ok(()), Output::finish)
    }
}
