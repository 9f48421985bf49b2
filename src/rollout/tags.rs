//! Tells reasoning and answer apart on a terminal.

use crate::tokenizer::unfinished_mark;

const DIM: &str = "\x1b[2m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

/// Tags, and how what follows them looks.
const TAGS: [(&str, &str); 6] = [
    ("<reasoning>", DIM),
    ("</reasoning>", PLAIN),
    ("<think>", DIM),
    ("</think>", PLAIN),
    ("<answer>", BOLD),
    ("</answer>", PLAIN),
];

/// Shows reasoning dim and the answer bold instead of their tags, in a text that comes piece by piece.
pub struct Painter {
    has_colours: bool,
    /// Came, and is not shown yet: it may be the beginning of a tag.
    held: String,
    /// Whether the last thing that came is a tag, whose line end is left out.
    after_tag: bool,
}

impl Painter {
    /// For standard output: with `NO_COLOR` in the environment, or on a terminal that has no colours, the tags stay.
    #[must_use]
    pub fn of_stdout() -> Self {
        let has = |name| std::env::var_os(name).is_some_and(|value: std::ffi::OsString| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_none_or(|name| name == "dumb");
        Self::new(!has("NO_COLOR") && !is_dumb)
    }

    /// With or without colours.
    #[must_use]
    pub fn new(has_colours: bool) -> Self {
        Self { has_colours, held: String::new(), after_tag: false }
    }

    /// Adds a piece; returns what to show.
    pub fn paint(&mut self, piece: &str) -> String {
        // A model may write anything, control sequences of a terminal among it.
        let harmless = piece.chars().filter(|&c| !c.is_control() || c == '\n' || c == '\t');
        if !self.has_colours {
            return harmless.collect();
        }
        self.held.extend(harmless);
        let mut shown = String::new();
        let found = |text: &str| TAGS.iter().filter_map(|tag| Some((text.find(tag.0)?, tag))).min_by_key(|(at, _)| *at);
        while let Some((at, (tag, look))) = found(&self.held) {
            let before = self.held[..at].to_owned();
            self.held.drain(..at + tag.len());
            self.show(&before, &mut shown);
            shown += PLAIN;
            shown += look;
            self.after_tag = true;
        }
        let rest = self.held.len() - unfinished_mark(&self.held, &TAGS.map(|tag| tag.0));
        let rest: String = self.held.drain(..rest).collect();
        self.show(&rest, &mut shown);
        shown
    }

    /// What is left to show at the end of the text.
    pub fn finish(&mut self) -> String {
        let mut shown = String::new();
        let rest = std::mem::take(&mut self.held);
        self.show(&rest, &mut shown);
        if self.has_colours {
            shown += PLAIN;
        }
        shown
    }

    fn show(&mut self, text: &str, shown: &mut String) {
        if text.is_empty() {
            return;
        }
        let after_tag = std::mem::take(&mut self.after_tag);
        *shown += if after_tag { text.strip_prefix('\n').unwrap_or(text) } else { text };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "<reasoning>\n2 < 3\n</reasoning>\n<answer>\n3\n</answer>\n";

    #[test]
    fn reasoning_and_answer_look_different_however_the_text_is_cut() {
        let whole = format!("{PLAIN}{DIM}2 < 3\n{PLAIN}{PLAIN}{PLAIN}{BOLD}3\n{PLAIN}{PLAIN}{PLAIN}");
        for size in 1..TEXT.len() {
            let mut painter = Painter::new(true);
            let pieces = TEXT.as_bytes().chunks(size).map(|piece| std::str::from_utf8(piece).unwrap());
            let mut shown: String = pieces.map(|piece| painter.paint(piece)).collect();
            shown += &painter.finish();
            assert_eq!(shown, whole, "{size}");
        }
    }

    #[test]
    fn a_tag_that_does_not_come_is_text() {
        let mut painter = Painter::new(true);
        let shown = painter.paint("a <ans") + &painter.finish();
        assert_eq!(shown, format!("a <ans{PLAIN}"));
        let mut painter = Painter::new(false);
        assert_eq!(painter.paint(TEXT) + &painter.finish(), TEXT);
        assert_eq!(painter.paint("a\x1b[31m\tb\r\n"), "a[31m\tb\n");
    }
}
