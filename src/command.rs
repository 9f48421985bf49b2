//! The parts every command is made of: shared options, the way from a result to an exit code, and what becomes of output lines.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::error::{Error, Result};
use crate::lines::jsonl::Output;
use crate::process::message::{note, one_line, write_log};

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
    /// Write to FILE instead of standard output; it appears when it is complete (`.zst` is compressed)
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

/// Returns the exit code of a finished command, after printing its error, if any, as one line on stderr. An error whose cause is a signal
/// or another command goes to the log only: the exit code says enough.
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

/// Output lines of a command that also changes the disk. A line that cannot be written does not stop the work: it is an error,
/// reported once, at the end.
pub struct Report {
    output: Option<Output>,
    lost: Option<Error>,
}

impl Report {
    /// Opens standard output, or the file that `args` names.
    ///
    /// # Errors
    /// See [`Output::create`].
    pub fn create(args: &OutputArgs) -> Result<Self> {
        Ok(Self { output: Some(Output::create(args.output.as_deref())?), lost: None })
    }

    /// Writes and flushes a line. After a failure, later lines are dropped and [`Report::finish`] returns the error.
    pub fn write(&mut self, line: &[u8]) {
        if let Some(output) = &mut self.output
            && let Err(err) = output.write_line(line).and_then(|()| output.flush())
        {
            self.lost = Some(err);
            // Dropping would try, and fail, again; the text that was not taken is gone either way.
            let _ = self.output.take().map(Output::flush_after_error);
        }
    }

    /// Returns the error of the first line that was lost, if there is one.
    ///
    /// # Errors
    /// See [`Report::finish`].
    pub fn check(&mut self) -> Result<()> {
        self.lost.take().map_or(Ok(()), Err)
    }

    /// Flushes and publishes the output.
    ///
    /// # Errors
    /// [`Error::Output`] or [`Error::Io`] when a line was lost, also when the reader of a pipe went away.
    pub fn finish(mut self) -> Result<()> {
        self.check()?;
        self.output.map_or(Ok(()), Output::finish)
    }
}
