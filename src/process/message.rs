//! Messages on stderr, one line each.

use std::io::{self, Write};

/// How much of a long error is shown of its beginning, and as much of its end (characters).
const ERROR_CHARS: usize = 1000;

/// Prints `NAME: message` on stderr in one write, because several commands write there. A closed stderr is ignored.
pub fn note(name: &str, message: &str) {
    let _ = io::stderr().write_all(format!("{name}: {message}\n").as_bytes());
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
