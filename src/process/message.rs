//! Messages on stderr and in a log, one line each.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// How much of a long error is shown of its beginning, and as much of its end (characters).
const ERROR_CHARS: usize = 1000;

/// The file of [`log_to`].
static LOG: Mutex<Option<File>> = Mutex::new(None);

/// Prints `NAME: message` on stderr, in one write because several commands write there, and in the log. A closed stderr is ignored.
pub fn note(name: &str, message: &str) {
    let _ = io::stderr().write_all(format!("{name}: {message}\n").as_bytes());
    write_log(name, message);
}

/// Prints a message that needs no attention: in the log if there is one, else on stderr.
pub fn detail(name: &str, message: &str) {
    if has_log() { write_log(name, message) } else { note(name, message) }
}

/// Creates the log, or empties it.
///
/// # Errors
/// [`Error::Io`] when it cannot be written.
pub fn log_to(path: &Path) -> Result<()> {
    // Append mode: if a second command is refused, its lines do not overwrite those of the first.
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

/// Writes a line to the log, if there is one. A full disk is ignored here: it ends the work with an error of its own.
pub fn write_log(name: &str, message: &str) {
    if let Some(file) = &mut *LOG.lock().unwrap_or_else(PoisonError::into_inner) {
        let _ = file.write_all(format!("{name}: {message}\n").as_bytes());
    }
}

/// Makes one line of an error: what it quotes of an input may hold line ends, control sequences of a terminal, or megabytes.
#[must_use]
pub fn one_line(error: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().collect::<String>() } else { c.into() };
    let count = error.chars().count();
    if count <= 2 * ERROR_CHARS {
        return error.chars().map(escape).collect();
    }
    let begin = error.chars().take(ERROR_CHARS);
    begin.chain(" ... ".chars()).chain(error.chars().skip(count - ERROR_CHARS)).map(escape).collect()
}
