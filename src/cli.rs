//! What the six commands share at their edges: option groups, and the way from a result to an exit code.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::error::{Error, Result};
use crate::jsonl::Output;

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

/// The exit code of a finished command, with the error's one line on stderr.
pub fn report(name: &str, outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            note(name, &err.to_string());
            ExitCode::from(err.exit_code())
        }
    }
}

/// One line on stderr, `NAME: message`. A stderr that is gone is nobody's error.
pub fn note(name: &str, message: &str) {
    let _ = writeln!(io::stderr(), "{name}: {message}");
}
