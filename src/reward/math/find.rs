//! Where the answer stands in a text: the rules of the first table in `math.md`, in their order.

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

/// The answer of a reference, which is the whole text when nothing in it says where the answer is.
#[must_use]
pub fn in_reference(text: &str) -> &str {
    let tagged = tagged(text).unwrap_or(text);
    stated(tagged).unwrap_or(tagged).trim()
}

/// What stands in the last `<answer>` that is closed.
fn tagged(text: &str) -> Option<&str> {
    let before = &text[..text.rfind("</answer>")?];
    let tagged = &before[before.rfind("<answer>")? + "<answer>".len()..];
    tagged.split("</answer>").next()
}

/// What follows the reasoning, where tags say how far that goes.
fn after_thoughts(text: &str) -> &str {
    let ends = ["</think>", "</reasoning>"].map(|tag| text.rfind(tag).map_or(0, |at| at + tag.len()));
    &text[ends[0].max(ends[1])..]
}

/// The answer that the text marks as such.
fn stated(text: &str) -> Option<&str> {
    boxed(text).or_else(|| after_hashes(text)).or_else(|| after_words(text))
}

/// The content of the last `\boxed{}`; the whole list where it ends one: `\boxed{1}, \boxed{2}`.
pub(super) fn boxed(text: &str) -> Option<&str> {
    let mut found: Option<Boxed> = None;
    let mut at = 0;
    while let Some((start, inner)) = next_box(text, at) {
        let Some(end) = closing_brace(text, inner) else {
            // Cut off: what stands in it is not the whole answer.
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

/// Places of a box, or of several that are one list.
#[derive(Clone, Copy)]
struct Boxed {
    start: usize,
    end: usize,
    /// From where to where the answer goes.
    answer: (usize, usize),
}

/// Where the next box starts, and where its content does.
fn next_box(text: &str, from: usize) -> Option<(usize, usize)> {
    let (at, command) = text[from..].match_indices('\\').find_map(|(at, _)| {
        let command = ["\\boxed", "\\fbox"].into_iter().find(|command| text[from + at..].starts_with(command))?;
        Some((from + at, command))
    })?;
    let inner = at + command.len();
    let rest = &text[inner..];
    Some((at, inner + rest.len() - rest.trim_start().len()))
}

/// Where a box ends: behind the brace that closes it, or without one behind its word.
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

/// Whether a short text only joins two parts of one answer.
fn is_between_items(text: &str) -> bool {
    text.len() <= 40
        && !text.contains("\n\n")
        && text.split(|c: char| !c.is_alphanumeric()).all(|word| matches!(word, "" | "and" | "or" | "text" | "quad"))
}

/// The number behind the last `####` that has one, as GSM8K marks its answers; other lines so begun are headings.
fn after_hashes(text: &str) -> Option<&str> {
    let first = text.find("####")?;
    text[first..].lines().rev().find_map(|line| {
        let (_, answer) = line.rsplit_once("####")?;
        Quantity::parse(bare(&super::plain::plain(answer))).map(|_| answer)
    })
}

/// The sentence behind the last `answer is` or `answer:`.
fn after_words(text: &str) -> Option<&str> {
    const WORD: &[u8] = b"answer";
    let found = text.as_bytes().windows(WORD.len()).enumerate().rev();
    let mut found = found.filter(|(_, word)| word.eq_ignore_ascii_case(WORD));
    let rest = found.find_map(|(at, _)| after_verb(&text[at + WORD.len()..]))?;
    let line = rest.lines().find(|line| line.contains(char::is_alphanumeric))?;
    let end = line.find(". ").or_else(|| line.find('\u{3002}')).unwrap_or(line.len());
    Some(&line[..end])
}

fn after_verb(text: &str) -> Option<&str> {
    let decoration = |c: char| matches!(c, ' ' | '*' | '_' | '"');
    let text = text.trim_start_matches(decoration);
    let after_is = text.strip_prefix("is").or_else(|| text.strip_prefix("IS"));
    let rest = match after_is {
        Some(rest) if rest.starts_with(char::is_alphanumeric) => return None,
        Some(rest) => rest,
        None => text.strip_prefix([':', '=', '\u{ff1a}'])?,
    };
    Some(rest.trim_start_matches([' ', ':']))
}

/// The last line that holds more than punctuation; none where an answer was begun and cut off.
fn last_line(text: &str) -> Option<&str> {
    let line = text.lines().rev().find(|line| line.contains(char::is_alphanumeric))?;
    (!text.contains("<answer>")).then_some(line)
}
