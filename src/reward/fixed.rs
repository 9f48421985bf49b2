//! The five rewards without the notebook's faults: what our recipes train on.
//!
//! Reasoning may have many lines, each tag must occur exactly once, answers compare by value, trailing text costs once.

use super::number::{self, Number};

const TAGS: [&str; 4] = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"];

/// A completion with the positions of its tags.
#[derive(Debug)]
pub struct Tagged<'a> {
    text: &'a str,
    /// Where each of `TAGS` starts, if it occurs exactly once (bytes).
    at: [Option<usize>; 4],
}

impl<'a> Tagged<'a> {
    /// Finds the tags.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        let mut at = [None; 4];
        let mut twice = [false; 4];
        for (start, _) in text.match_indices('<') {
            if let Some(tag) = TAGS.iter().position(|tag| text[start..].starts_with(tag)) {
                twice[tag] |= at[tag].replace(start).is_some();
            }
        }
        for tag in 0..TAGS.len() {
            at[tag] = at[tag].filter(|_| !twice[tag]);
        }
        Self { text, at }
    }

    /// The text between `<answer>` and `</answer>`, trimmed, if both occur once and in order.
    #[must_use]
    pub fn extract(&self) -> Option<&'a str> {
        self.between(2).map(str::trim)
    }

    /// Whether the text is reasoning and answer, each tag on a line of its own, followed by at most one newline.
    #[must_use]
    pub fn is_strict_format(&self) -> bool {
        let in_lines = |part: Option<&str>| {
            part.is_some_and(|part| part.len() >= 2 && part.starts_with('\n') && part.ends_with('\n'))
        };
        self.at[0] == Some(0)
            && in_lines(self.between(0))
            && self.between(1) == Some("\n")
            && in_lines(self.between(2))
            && matches!(self.after_answer(), Some("" | "\n"))
    }

    /// Whether the text starts with reasoning and an answer, separated by white space at most; anything may follow.
    #[must_use]
    pub fn is_soft_format(&self) -> bool {
        let blank = |part: &str| part.trim().is_empty();
        self.at[0].is_some_and(|start| blank(&self.text[..start]))
            && self.between(0).is_some()
            && self.between(1).is_some_and(blank)
            && self.between(2).is_some()
    }

    /// 0.125 for each tag that occurs once and with its newlines, minus 0.001 for each code point after the answer's line.
    #[must_use]
    pub fn count_xml(&self) -> f64 {
        let newlines_after = (0..3).filter(|&tag| self.rest(tag).is_some_and(|rest| rest.starts_with('\n')));
        let starts_line = |tag: usize| self.at[tag].is_some_and(|at| self.text[..at].ends_with('\n'));
        let opened = newlines_after.filter(|&tag| tag == 0 || starts_line(tag)).count();
        let trailing = self.after_answer().filter(|_| starts_line(3));
        let trailing = trailing.map(|rest| rest.strip_prefix('\n').unwrap_or(rest).chars().count());
        opened as f64 * 0.125 + trailing.map_or(0.0, |len| 0.125 - len as f64 * 0.001)
    }

    /// The text after a tag.
    fn rest(&self, tag: usize) -> Option<&'a str> {
        self.at[tag].map(|at| &self.text[at + TAGS[tag].len()..])
    }

    fn after_answer(&self) -> Option<&'a str> {
        self.rest(3)
    }

    /// The text between a tag and the next of `TAGS`, if they are in that order.
    fn between(&self, tag: usize) -> Option<&'a str> {
        self.text.get(self.at[tag]? + TAGS[tag].len()..self.at[tag + 1]?)
    }
}

/// Whether the extracted answer equals the reference: by value for numbers, else as text.
#[must_use]
pub fn is_correct(extracted: Option<&str>, answer: &str) -> bool {
    extracted.is_some_and(|extracted| number::same_answer(extracted, answer))
}

/// Whether the extracted answer is a whole number, negative or not, however it is written.
#[must_use]
pub fn is_integer(extracted: Option<&str>) -> bool {
    extracted.and_then(Number::parse).is_some_and(|number| number.is_integer())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "<reasoning>\nOne.\nTwo.\n</reasoning>\n<answer>\n72\n</answer>";

    #[test]
    fn reasoning_may_have_many_lines() {
        for end in ["", "\n"] {
            let text = format!("{GOOD}{end}");
            let tagged = Tagged::new(&text);
            assert!(tagged.is_strict_format() && tagged.is_soft_format(), "{text:?}");
            assert_eq!((tagged.extract(), tagged.count_xml()), (Some("72"), 0.5));
        }
    }

    #[test]
    fn a_tag_that_stands_twice_is_no_tag() {
        for tag in TAGS {
            let text = format!("{GOOD}{tag}");
            let tagged = Tagged::new(&text);
            assert!(!tagged.is_strict_format() && !tagged.is_soft_format(), "{tag}");
            assert_eq!(tagged.extract().is_none(), tag.contains("answer"), "{tag}");
            assert!(tagged.count_xml() < 0.38, "{tag}");
        }
        assert_eq!(Tagged::new(&GOOD.repeat(3)).count_xml(), 0.0);
    }

    #[test]
    fn tags_out_of_order_have_no_answer_and_no_format() {
        let tagged = Tagged::new("</answer>72<answer><reasoning></reasoning>");
        assert_eq!(tagged.extract(), None);
        assert!(!tagged.is_soft_format());
        let swapped = Tagged::new("<answer>72</answer><reasoning>r</reasoning>");
        assert_eq!(swapped.extract(), Some("72"));
        assert!(!swapped.is_soft_format());
    }

    #[test]
    fn strict_wants_lines_and_soft_only_order() {
        let one_line = Tagged::new(" <reasoning>r</reasoning> <answer>72</answer> so 72");
        assert!(one_line.is_soft_format() && !one_line.is_strict_format());
        for text in [format!("{GOOD}\n\n"), format!("\n{GOOD}"), format!("{GOOD} x"), GOOD.replace("\n72\n", "\n72")] {
            assert!(!Tagged::new(&text).is_strict_format(), "{text:?}");
        }
        assert!(!Tagged::new(&format!("So: {GOOD}")).is_soft_format());
        assert!(!Tagged::new(&GOOD.replace("</reasoning>", "</reasoning> so")).is_soft_format());
    }

    #[test]
    fn trailing_text_is_charged_once() {
        let text = format!("{GOOD}\n12345678\u{65e5}0");
        assert_eq!(Tagged::new(&text).count_xml(), 0.375 + (0.125 - 0.01));
        assert_eq!(Tagged::new("\n</answer>").count_xml(), 0.125);
        assert_eq!(Tagged::new("<reasoning>\n").count_xml(), 0.125);
        assert_eq!(Tagged::new("<reasoning></reasoning><answer></answer>").count_xml(), 0.0);
    }

    #[test]
    fn answers_compare_by_value() {
        assert!(is_correct(Some("$1,000.00"), "1000"));
        assert!(!is_correct(Some("1000 clips"), "1000"));
        assert!(!is_correct(None, "1000"));
        assert!(is_integer(Some("-5")) && is_integer(Some("1,000")));
        assert!(!is_integer(Some("5.5")) && !is_integer(Some("five")) && !is_integer(None));
    }
}
