//! The rewards of the GRPO demo notebook, bug for bug.
//!
//! Source: <https://gist.github.com/willccbb/4676755236bb08cab5f4e54a0475d6fb>. The patterns are matched by hand,
//! because `\s` and `$` match something else in Rust's `regex` than in Python's `re`.

use super::python;

/// `extract_xml_answer`: the text between the last `<answer>` and the next `</answer>`; without tags, the whole text.
#[must_use]
pub fn extract(completion: &str) -> &str {
    let from = completion.rfind("<answer>").map_or(0, |at| at + "<answer>".len());
    let answer = &completion[from..];
    python::strip(answer.find("</answer>").map_or(answer, |to| &answer[..to]))
}

/// `^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$` without DOTALL: reasoning and answer of one line each.
///
/// `$` also matches before a final newline, so one more newline may follow.
#[must_use]
pub fn is_strict_format(completion: &str) -> bool {
    let rest = completion
        .strip_prefix("<reasoning>\n")
        .and_then(|text| after_line(text, "</reasoning>\n<answer>\n"))
        .and_then(|text| after_line(text, "</answer>\n"));
    matches!(rest, Some("" | "\n"))
}

/// The text after one line of anything followed by `tags`.
fn after_line<'a>(text: &'a str, tags: &str) -> Option<&'a str> {
    text.split_once('\n')?.1.strip_prefix(tags)
}

/// `<reasoning>.*?</reasoning>\s*<answer>.*?</answer>` at the start, without DOTALL: neither part may hold a newline.
#[must_use]
pub fn is_soft_format(completion: &str) -> bool {
    let Some(text) = completion.strip_prefix("<reasoning>") else {
        return false;
    };
    let line_end = text.find('\n').unwrap_or(text.len());
    let last_close = text[..line_end].rfind("</answer>");
    // Any </reasoning> in the first line may end the reasoning; .*? tries them in turn.
    text[..line_end].match_indices("</reasoning>").any(|(at, tag)| {
        let after = &text[at + tag.len()..];
        let Some(answer) = after.trim_start_matches(python::is_space).strip_prefix("<answer>") else {
            return false;
        };
        let from = text.len() - answer.len();
        if from <= line_end {
            return last_close.is_some_and(|close| close >= from);
        }
        answer.split('\n').next().is_some_and(|line| line.contains("</answer>"))
    })
}

/// `count_xml`: 0.125 for each tag that occurs once on its line, minus 0.001 for each code point after the answer, counted twice.
///
/// Adds in the notebook's order, to get its doubles. Without a `\n</answer>\n` the whole text counts as trailing.
#[must_use]
pub fn count_xml(completion: &str) -> f64 {
    let last_len = |tag| completion.split(tag).last().map_or(0, python::len) as f64;
    let mut count = 0.0;
    if stands_once(completion, "<reasoning>\n") {
        count += 0.125;
    }
    if stands_once(completion, "\n</reasoning>\n") {
        count += 0.125;
    }
    if stands_once(completion, "\n<answer>\n") {
        count += 0.125;
        count -= last_len("\n</answer>\n") * 0.001;
    }
    if stands_once(completion, "\n</answer>") {
        count += 0.125;
        count -= (last_len("\n</answer>") - 1.0) * 0.001;
    }
    count
}

/// `text.count(tag) == 1`: occurrences from the left, without overlap.
fn stands_once(text: &str, tag: &str) -> bool {
    let mut found = text.matches(tag);
    found.next().is_some() && found.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_answer_tag_counts_and_without_one_the_whole_text() {
        assert_eq!(extract("<answer>1</answer><answer>\n2 \n</answer>3</answer>"), "2");
        assert_eq!(extract("<answer></answer>"), "");
        assert_eq!(extract(" 72\n"), "72");
        assert_eq!(extract("7</answer>2"), "7");
    }

    #[test]
    fn multi_line_reasoning_has_no_format() {
        assert!(is_strict_format("<reasoning>\nr\n</reasoning>\n<answer>\n72\n</answer>\n\n"));
        assert!(!is_strict_format("<reasoning>\nr\nr\n</reasoning>\n<answer>\n72\n</answer>\n"));
        assert!(!is_strict_format("<reasoning>\nr\n</reasoning>\n<answer>\n72\n</answer>"));
        assert!(is_soft_format("<reasoning>r</reasoning>\u{1c}\n<answer>72</answer> and more"));
        assert!(!is_soft_format("<reasoning>r\n</reasoning><answer>72</answer>"));
    }

    #[test]
    fn a_later_reasoning_end_can_make_the_soft_format() {
        assert!(is_soft_format("<reasoning></reasoning><answer></reasoning>\n<answer>72</answer>"));
        assert!(!is_soft_format("<reasoning></reasoning><answer>\n</reasoning><answer>72</answer>"));
        assert!(!is_soft_format("<reasoning></answer></reasoning><answer>72\n</answer>"));
    }

    #[test]
    fn trailing_text_is_charged_twice() {
        let with = |end: &str| count_xml(&format!("<reasoning>\nr\n</reasoning>\n<answer>\n72\n</answer>\n{end}"));
        assert_eq!(with(""), 0.5);
        assert!((with("1234567890") - 0.48).abs() < 1e-12);
    }
}
