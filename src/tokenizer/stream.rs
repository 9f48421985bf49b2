//! Decodes tokens one at a time.

use std::sync::Arc;

use super::Tokenizer;
use crate::error::Result;

/// The longest end of `text` with which one of `marks`, longer than it, begins (bytes): what is held back of a text that goes on.
#[must_use]
pub fn unfinished_mark(text: &str, marks: &[impl AsRef<str>]) -> usize {
    let beginnings = marks.iter().flat_map(|mark| {
        let mark = mark.as_ref();
        mark.char_indices().skip(1).map(|(at, _)| &mark[..at])
    });
    beginnings.filter(|beginning| text.ends_with(beginning)).map(str::len).max().unwrap_or(0)
}

/// What an incomplete character is decoded to.
const INCOMPLETE: char = '\u{fffd}';

/// The text of tokens that come one at a time: the pieces, one after the other, are what [`Tokenizer::decode`] makes of all tokens.
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    ids: Vec<u32>,
    /// Tokens whose text was returned.
    returned: usize,
    /// The first of the tokens that were decoded with the last piece. Their text decides on spaces at the start of the next one.
    context: usize,
}

impl TextStream {
    /// Starts with no token.
    #[must_use]
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Self {
        Self { tokenizer: Arc::clone(tokenizer), ids: Vec::new(), returned: 0, context: 0 }
    }

    /// Adds a token. Returns the text that is new; none while a character is incomplete.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let piece = self.rest()?;
        if piece.is_empty() || piece.ends_with(INCOMPLETE) {
            return Ok(String::new());
        }
        (self.context, self.returned) = (self.returned, self.ids.len());
        Ok(piece)
    }

    /// Returns the text that is left when no more tokens come.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let rest = self.rest()?;
        self.returned = self.ids.len();
        Ok(rest)
    }

    fn rest(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.returned])?;
        let all = self.tokenizer.decode(&self.ids[self.context..])?;
        Ok(all.strip_prefix(&before).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_become_a_mark_is_held_back() {
        let marks = ["</answer>", "\n\n", "é!"];
        let cases = [("3 <", 1), ("3 </ans", 5), ("x</answer", 8), ("x\n", 1), ("café", 2), ("plain", 0), ("</b", 0)];
        for (text, held) in cases {
            assert_eq!(unfinished_mark(text, &marks), held, "{text}");
        }
    }
}
