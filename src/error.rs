//! Errors: one line that a user can act on, and an exit code that a pipeline can act on.

use std::io;
use std::path::{Path, PathBuf};

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a command ends without success.
///
/// The message is one line, lower case, and says where and what to do. [`Error::exit_code`] is the contract with pipelines.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file, or `-` for standard input.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The command's own output could not be written; a closed pipe of a pure filter is no error (see [`crate::command`]).
    #[error("cannot write the output: {0}")]
    Output(#[source] io::Error),
    /// A model directory or checkpoint cannot be used.
    #[error("{}: {what}", path.display())]
    Model {
        /// The directory or the file in it.
        path: PathBuf,
        /// What is wrong with it, and the remedy where there is one.
        what: String,
    },
    /// A run cannot continue because of its directory, or because another command is using it.
    #[error("{}: {what}", dir.display())]
    Run {
        /// The run's directory.
        dir: PathBuf,
        /// What is wrong, and the remedy where there is one.
        what: String,
    },
    /// The Hub, or its cache, does not provide what was asked for.
    #[error("hub: {repo}: {what}")]
    Hub {
        /// `owner/name`.
        repo: String,
        /// What happened, and the remedy where there is one.
        what: String,
    },
    /// A server of completions cannot be used.
    #[error("server: {address}: {what}")]
    Server {
        /// Its address.
        address: String,
        /// What happened, and the remedy where there is one.
        what: String,
    },
    /// The machine cannot do what was asked: its device, memory or threads.
    #[error("{0}")]
    Device(String),
    /// Options that contradict each other or the input as a whole.
    #[error("{0}")]
    Usage(String),
    /// A line of input that is not what the command takes.
    #[error("{path}:{line}: {what}")]
    Record {
        /// The file as named on the command line; `-` is standard input.
        path: String,
        /// Its line, counted from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// The handlers of signals could not be installed.
    #[error("cannot handle signals: {0}")]
    Signals(#[source] io::Error),
    /// A thread panicked: a bug, or a dependency that cannot take its input.
    #[error("{0} panicked; the message above says where")]
    Panicked(&'static str),
    /// A signal asked the command to end.
    #[error("ended by {}", signal_hook::low_level::signal_name(*signal).unwrap_or("a signal"))]
    Interrupted {
        /// Its number.
        signal: i32,
    },
    /// Another of the processes that train together cannot go on.
    #[error("rank {rank}: {what}")]
    Rank {
        /// Which one, from 0.
        rank: usize,
        /// The exit code of its error.
        code: u8,
        /// Its message.
        what: String,
    },
    /// Another command of the pipe ended before the work was done.
    #[error("another command of the pipe ended first; its message says why")]
    Abandoned,
    /// The input is wrong as a whole, not in one line.
    #[error("{0}")]
    Data(String),
    /// Loss, gradient or probabilities are not finite, or sampler and trainer disagree; nothing was published.
    #[error("{0}")]
    Numerics(String),
}

impl Error {
    /// Wraps an I/O error with the path it happened at; made for `map_err(Error::io(path))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// An unusable model directory or checkpoint.
    pub fn model(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::Model { path: path.as_ref().to_path_buf(), what: what.into() }
    }

    /// A run that cannot go on.
    pub fn run(dir: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::Run { dir: dir.as_ref().to_path_buf(), what: what.into() }
    }

    /// Whether the cause is a signal or another command of the pipe. The exit code says so, and the user needs no message.
    #[must_use]
    pub fn is_consequence(&self) -> bool {
        matches!(self, Self::Interrupted { .. } | Self::Abandoned)
    }

    /// The process exit code: 1 could not run, 2 usage, 3 bad input data, 4 numerics, 5 another command of the pipe ended first,
    /// 128 plus the number of a signal.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { .. } | Self::Output(_) | Self::Model { .. } | Self::Run { .. } => 1,
            Self::Hub { .. } | Self::Server { .. } | Self::Device(_) | Self::Signals(_) | Self::Panicked(_) => 1,
            Self::Usage(_) => 2,
            Self::Record { .. } | Self::Data(_) => 3,
            Self::Numerics(_) => 4,
            Self::Rank { code, .. } => *code,
            Self::Abandoned => 5,
            Self::Interrupted { signal } => 128 + *signal as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_contract() {
        let bad_line = Error::Record { path: "-".into(), line: 17, what: "not JSON".into() };
        assert_eq!(bad_line.to_string(), "-:17: not JSON");
        assert_eq!(bad_line.exit_code(), 3);
        assert_eq!(Error::io("x")(io::ErrorKind::NotFound.into()).exit_code(), 1);
        assert_eq!(Error::Usage(String::new()).exit_code(), 2);
        assert_eq!(Error::Numerics(String::new()).exit_code(), 4);
        assert_eq!(Error::Abandoned.exit_code(), 5);
    }
}
