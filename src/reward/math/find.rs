//! Finds the answer in a text: the rules of the first table in `math.md`, in order.

use std::sync::LazyLock;

use regex::Regex;

use super::quantity::Quantity;
use super::same::bare;

/// The answer of a completion.
#[must_use]
pub fn in_completion(text: &str) -> Option<&str> {
    let answer = match tagged(text) {
        Some(tagged) => stated(tagged).unwrap_or(tagged),
        None => {
            let text = after_thoughts(text);
            stated(text).or_else(|| last_line(text))?
        }
    };
    Some(answer.trim()).filter(|answer| !answer.is_empty())
}

/// The answer of a reference: the whole text if nothing in it marks the answer.
#[must_use]
pub fn in_reference(text: &str) -> &str {
    let tagged = tagged(text).unwrap_or(text);
    stated(tagged).unwrap_or(tagged).trim()
}

/// The content of the last closed `<answer>`.
fn tagged(text: &str) -> Option<&str> {
    let before = &text[..text.rfind("</answer>")?];
    let tagged = &before[before.rfind("<answer>")? + "<answer>".len()..];
    tagged.split("</answer>").next()
}

/// The text after the reasoning, if a tag ends it.
fn after_thoughts(text: &str) -> &str {
    let ends = ["</think>", "</reasoning>"].map(|tag| text.rfind(tag).map_or(0, |at| at + tag.len()));
    &text[ends[0].max(ends[1])..]
}

/// The answer that the text marks as its answer.
fn stated(text: &str) -> Option<&str> {
    boxed(text).or_else(|| after_hashes(text)).or_else(|| after_words(text))
}

/// The content of the last `\boxed{}`, or the whole list that it ends: `\boxed{1}, \boxed{2}`.
pub(super) fn boxed(text: &str) -> Option<&str> {
    let mut found: Option<Boxed> = None;
    let mut at = 0;
    while let Some((start, inner)) = next_box(text, at) {
        let Some(end) = closing_brace(text, inner) else {
            // Truncated: its content is not the whole answer.
            break;
        };
        let list = found.filter(|last| is_between_items(&text[last.end..start]));
        let content = text[inner..end].strip_prefix('{').map_or(inner..end, |_| inner + 1..end - 1);
        found = Some(match list {
            Some(last) => Boxed { start: last.start, end, answer: (last.start, end) },
            None => Boxed { start, end, answer: (content.start, content.end) },
        });
        at = end;
    }
    found.map(|last| &text[last.answer.0..last.answer.1])
}

/// The position of a box, or of a list of boxes (bytes).
#[derive(Clone, Copy)]
struct Boxed {
    start: usize,
    end: usize,
    /// Start and end of the answer.
    answer: (usize, usize),
}

/// Where the next box starts, and where its content starts.
fn next_box(text: &str, from: usize) -> Option<(usize, usize)> {
    let (at, command) = text[from..].match_indices('\\').find_map(|(at, _)| {
        let command = ["\\boxed", "\\fbox"].into_iter().find(|command| text[from + at..].starts_with(command))?;
        Some((from + at, command))
    })?;
    let inner = at + command.len();
    let rest = &text[inner..];
    Some((at, inner + rest.len() - rest.trim_start().len()))
}

/// Where a box ends: after its closing brace or, without braces, after its word.
fn closing_brace(text: &str, from: usize) -> Option<usize> {
    if !text[from..].starts_with('{') {
        let word = text[from..].find(|c: char| c.is_whitespace() || c == '$').map_or(text.len(), |len| from + len);
        return Some(word);
    }
    let mut depth = 0_usize;
    let mut escaped = false;
    for (at, byte) in text.as_bytes()[from..].iter().enumerate() {
        match byte {
            b'{' if !escaped => depth += 1,
            b'}' if !escaped => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(from + at + 1);
        }
        escaped = *byte == b'\\' && !escaped;
    }
    None
}

/// Whether a text merely joins two parts of one answer.
fn is_between_items(text: &str) -> bool {
    text.len() <= 40
        && !text.contains("\n\n")
        && text.split(|c: char| !c.is_alphanumeric()).all(|word| matches!(word, "" | "and" | "or" | "text" | "quad"))
}

/// The number after the last `####` that has one, GSM8K's mark of an answer. Other such lines are headings.
fn after_hashes(text: &str) -> Option<&str> {
    let first = text.find("####")?;
    text[first..].lines().rev().find_map(|line| {
        let (_, answer) = line.rsplit_once("####")?;
        Quantity::parse(bare(&super::plain::plain(answer))).map(|_| answer)
    })
}

/// `answer is`, `Answer:`, `**answer** = ` and the like, up to where the answer begins.
static ANSWER_IS: LazyLock<Regex> =
    LazyLock::new(|| Regex::new("(?i:answer)[ *_\"]*(?:(?:is|IS)(?:\\b|_)|[:=\u{ff1a}])[ :]*").expect("a constant"));

/// The sentence after the last `answer is` or `answer:`.
fn after_words(text: &str) -> Option<&str> {
    let rest = &text[ANSWER_IS.find_iter(text).last()?.end()..];
    let line = rest.lines().find(|line| line.contains(char::is_alphanumeric))?;
    let end = line.find(". ").or_else(|| line.find('\u{3002}')).unwrap_or(line.len());
    Some(&line[..end])
}

/// The last line with more than punctuation; `None` if an `<answer>` is not closed.
fn last_line(text: &str) -> Option<&str> {
    let line = text.lines().rev().find(|line| line.contains(char::is_alphanumeric))?;
    (!text.contains("<answer>")).then_some(line)
}
