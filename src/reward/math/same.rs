//! Compares two answers in plain text: as numbers, as lists, or as text.

use super::quantity::Quantity;
use super::words::is_no_unit;

/// Whether two answers in plain text are equal.
///
/// Lists are equal if their brackets and their parts are, in order. A number never equals something that is not a number.
#[must_use]
pub fn same(left: &str, right: &str) -> bool {
    let (left, right) = (bare(left), bare(right));
    same_part(left, right) || same_list(left, right)
}

fn same_part(left: &str, right: &str) -> bool {
    match (Quantity::parse(left), Quantity::parse(right)) {
        (Some(left), Some(right)) => left.equals(&right),
        (None, None) => letters(left).eq(letters(right)),
        _ => false,
    }
}

/// The answer without its surroundings: one final punctuation mark, quotes, emphasis, parentheses around a single item, `####`,
/// and the name or calculation that it is the value of.
#[must_use]
pub fn bare(text: &str) -> &str {
    let mut text = text.trim().trim_start_matches('#').trim_start();
    if text.ends_with(['.', ',', ';', ':']) && !text.ends_with("..") {
        text = text[..text.len() - 1].trim_end();
    }
    // Each round strips two characters; nobody writes more layers than this.
    for _ in 0..4 {
        let inner = enclosed(text);
        let inner = result(inner);
        if inner.len() == text.len() {
            break;
        }
        text = inner;
    }
    text
}

/// The text inside a pair of decorative marks.
fn enclosed(text: &str) -> &str {
    for (open, close) in [("__", "__"), ("*", "*"), ("_", "_"), ("\"", "\""), ("'", "'"), ("(", ")"), ("", ")")] {
        let inner = text.strip_prefix(open).and_then(|text| text.strip_suffix(close));
        if let Some(inner) = inner.filter(|inner| !inner.contains(['*', '_', '"', '\'', '(', ')'])) {
            let is_list = close == ")" && inner.contains([',', ';']);
            return if is_list { text } else { inner.trim() };
        }
    }
    text
}

/// The value given to a name (`x`, `Total cost`, `f(3)`) or a calculation (`9 * 2`): the last side of an equation, the text after a
/// colon, or the set that contains the name.
fn result(text: &str) -> &str {
    let Some((before, last)) = text.rsplit_once(['=', '\u{2208}']).or_else(|| text.split_once(": ")) else {
        return text;
    };
    if before.split('=').all(|side| is_name(side.trim()) || is_calculation(side)) { last.trim() } else { text }
}

fn is_name(side: &str) -> bool {
    let (name, argument) = side.split_once('(').unwrap_or((side, ")"));
    let is_letter = |c: char| c.is_alphabetic() || matches!(c, ' ' | '\\' | '\'');
    let (name, index) = name.split_once('_').unwrap_or((name, ""));
    let is_index = |text: &str| text.chars().all(char::is_alphanumeric);
    name.chars().all(is_letter)
        && is_index(index)
        && argument.strip_suffix(')').is_some_and(is_index)
        && !name.to_lowercase().split(' ').any(is_no_unit)
}

fn is_calculation(side: &str) -> bool {
    let signs = ['+', '-', '*', '/', '^'];
    side.contains(signs) && side.chars().all(|c| c.is_ascii_digit() || signs.contains(&c) || " .,()$%".contains(c))
}

/// Whether both are lists with equal brackets, or none, and equal parts.
fn same_list(left: &str, right: &str) -> bool {
    let (left_brackets, left) = brackets(left);
    let (right_brackets, right) = brackets(right);
    if left_brackets != right_brackets || !left.contains([',', ';']) {
        return false;
    }
    let (mut left, mut right) = (parts(left), parts(right));
    loop {
        match (left.next(), right.next()) {
            (Some(left), Some(right)) if same_part(left.trim(), right.trim()) => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

/// The brackets around a list, and its content.
fn brackets(text: &str) -> (&str, &str) {
    for pair in ["()", "[]", "{}", "[)", "(]"] {
        let inner = text.strip_prefix(&pair[..1]).and_then(|text| text.strip_suffix(&pair[1..]));
        if let Some(inner) = inner {
            return (pair, inner);
        }
    }
    ("", text)
}

/// The parts between commas outside brackets.
fn parts(list: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_i64;
    list.split(move |c| {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        depth == 0 && matches!(c, ',' | ';')
    })
}

/// The characters that decide whether texts are equal: lower case, without full stops that touch no digit, and with spaces only
/// between two letters or two digits.
fn letters(text: &str) -> impl Iterator<Item = char> + '_ {
    let mut before = ' ';
    let mut rest = text.chars().peekable();
    std::iter::from_fn(move || {
        loop {
            let c = rest.next()?;
            let after = rest.peek().copied().unwrap_or(' ');
            let digit = |c: char| c.is_ascii_digit();
            let is_kept = match c {
                ' ' => (before.is_alphabetic() && after.is_alphabetic()) || (digit(before) && digit(after)),
                '.' => digit(before) || digit(after),
                _ => true,
            };
            if is_kept {
                before = c;
                return Some(c);
            }
        }
    })
    .flat_map(char::to_lowercase)
}
