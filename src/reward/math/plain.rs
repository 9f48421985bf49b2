//! Turns an answer into plain text, without LaTeX, Markdown and the typography of other scripts.
//!
//! `\dfrac{1}{2}` becomes `1/2`, `18\text{ cm}^2` becomes `18 cm^2`, full-width and Arabic digits become ASCII's. Each character is read once,
//! and braces nest to a fixed depth, so that the time is linear in the length.

use std::iter;

use super::typography;

/// Braces nested deeper stay as they are.
const MAX_DEPTH: usize = 16;

/// The text without decoration, with single spaces.
#[must_use]
pub fn plain(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b' ' | b'.' | b',' | b'-' | b'/' | b'%');
    if text.bytes().all(is_plain) && !text.contains("  ") {
        return text.trim().to_owned();
    }
    let mut reader = Reader { rest: text, out: String::with_capacity(text.len()), dollar: dollar(text) };
    while reader.unit(0) {}
    let mut plain = String::with_capacity(reader.out.len());
    for word in reader.out.split_whitespace() {
        if !plain.is_empty() {
            plain.push(' ');
        }
        plain.push_str(word);
    }
    // A degree sign is written as a power.
    if plain.contains("^\u{b0}") { plain.replace("^\u{b0}", "\u{b0}") } else { plain }
}

/// What an unescaped `$` means: pairs enclose formulas, a single one is a currency.
fn dollar(text: &str) -> char {
    let mut escaped = false;
    let mut paired = true;
    for byte in text.bytes() {
        paired ^= byte == b'$' && !escaped;
        escaped = byte == b'\\' && !escaped;
    }
    if paired { ' ' } else { '$' }
}

/// How to write the content of braces.
#[derive(Clone, Copy, PartialEq)]
enum Braces {
    /// As it is: `\text{18 cm}`.
    Text,
    /// In parentheses unless it is a single word or number, signed or not: `^{-1}`.
    Script,
    /// In parentheses unless it is a single word or number: `\frac{a+b}{2}`.
    Operand,
    /// As an operand, or as a set if it has commas: `{1,2}`.
    Bare,
}

struct Reader<'a> {
    rest: &'a str,
    out: String,
    dollar: char,
}

impl Reader<'_> {
    /// Reads the next character, command or group. Returns false at the end.
    fn unit(&mut self, depth: usize) -> bool {
        let Some(c) = self.rest.chars().next() else {
            return false;
        };
        self.rest = &self.rest[c.len_utf8()..];
        match c {
            '\\' => self.command(depth),
            '{' if depth < MAX_DEPTH => self.group(depth + 1, self.braces_here()),
            '$' => self.out.push(self.dollar),
            '*' if self.rest.starts_with('*') => self.stars(),
            '~' | '`' | '&' => self.out.push(' '),
            _ => self.character(c),
        }
        true
    }

    /// What braces without a command are: a script after `^` and `_`, else an invisible group.
    fn braces_here(&self) -> Braces {
        if self.out.ends_with(['^', '_']) { Braces::Script } else { Braces::Bare }
    }

    /// Reads a group after its opening brace.
    fn group(&mut self, depth: usize, braces: Braces) {
        let start = self.out.len();
        while !self.rest.is_empty() && !self.rest.starts_with('}') {
            self.unit(depth);
        }
        let Some(rest) = self.rest.strip_prefix('}') else {
            // Truncated, which must show: `\frac{1}{2` may have been 1/24.
            self.out.insert(start, '{');
            return;
        };
        self.rest = rest;
        let content = &self.out[start..];
        let is_list = braces == Braces::Bare && content.contains(',') && content.trim() != ",";
        if is_list {
            self.enclose(start, '{', '}');
        } else if braces != Braces::Text && !is_atom(content, braces) {
            self.enclose(start, '(', ')');
        }
        if braces == Braces::Script {
            self.part();
        }
    }

    fn enclose(&mut self, start: usize, open: char, close: char) {
        self.out.insert(start, open);
        self.out.push(close);
    }

    /// Reads bold marks, which are dropped, or Python's power operator.
    fn stars(&mut self) {
        let after = self.rest.trim_start_matches('*');
        let is_power = self.rest.len() - after.len() == 1
            && self.out.ends_with(|c: char| c.is_alphanumeric() || c == ')')
            && after.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '(' | '-'));
        self.rest = after;
        self.out.push(if is_power { '^' } else { ' ' });
    }

    /// Reads a command after its backslash.
    fn command(&mut self, depth: usize) {
        let len = self.rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (name, rest) = self.rest.split_at(len);
        self.rest = rest;
        match name {
            "" => self.symbol(),
            "frac" | "dfrac" | "tfrac" | "cfrac" => self.fraction(depth),
            "text" | "textbf" | "textit" | "textrm" | "textsf" | "texttt" | "textnormal" | "mathrm" | "mathbf"
            | "mathit" | "mathsf" | "mathtt" | "mathbb" | "mathcal" | "mbox" | "hbox" | "operatorname"
            | "boldsymbol" | "bm" | "bf" | "rm" | "emph" | "underline" | "boxed" | "fbox" => {
                self.out.push(' ');
                self.argument(depth, Braces::Text);
            }
            "sqrt" => {
                self.out.push('\u{221a}');
                if self.rest.starts_with('{') {
                    self.argument(depth, Braces::Operand);
                }
            }
            "left" | "right" | "big" | "Big" | "bigl" | "bigr" | "Bigl" | "Bigr" | "bigg" | "Bigg" | "displaystyle"
            | "textstyle" | "limits" => {}
            "quad" | "qquad" | "enspace" | "thinspace" | "space" | "hfill" | "newline" => self.out.push(' '),
            _ => self.named(name),
        }
    }

    /// Writes a command that stands for a character, or keeps the command.
    fn named(&mut self, name: &str) {
        match typography::named(name) {
            Some(text) => self.out.push_str(text),
            None => {
                self.out.push('\\');
                self.out.push_str(name);
            }
        }
    }

    /// Reads a command of one non-letter.
    fn symbol(&mut self) {
        let Some(c) = self.rest.chars().next() else {
            return;
        };
        self.rest = &self.rest[c.len_utf8()..];
        match c {
            '!' | '-' => {}
            '$' | '%' | '#' | '&' | '_' | '{' | '}' => self.out.push(c),
            // Spaces, line breaks and formula delimiters.
            _ => self.out.push(' '),
        }
    }

    /// Reads the two arguments of `\frac`, in braces or single characters: `\frac12`.
    fn fraction(&mut self, depth: usize) {
        if self.out.ends_with(char::is_alphanumeric) {
            self.out.push(' ');
        }
        self.argument(depth, Braces::Operand);
        self.out.push('/');
        self.argument(depth, Braces::Operand);
        self.part();
    }

    /// Reads what a command applies to: a group, a command or a character. A font without braces reaches further, which makes no difference.
    fn argument(&mut self, depth: usize, braces: Braces) {
        let rest = self.rest.trim_start();
        match rest.strip_prefix('{') {
            _ if depth >= MAX_DEPTH => {}
            Some(inner) => {
                self.rest = inner;
                self.group(depth + 1, braces);
            }
            None if braces == Braces::Text => {}
            None => {
                self.rest = rest;
                self.unit(depth + 1);
            }
        }
    }

    /// Writes a character that means nothing to LaTeX, in ASCII if it has an equivalent.
    fn character(&mut self, c: char) {
        if c.is_ascii() {
            self.out.push(c);
        } else if let Some(fraction) = typography::fraction(c) {
            if self.out.ends_with(char::is_alphanumeric) {
                self.out.push(' ');
            }
            self.out.push_str(fraction);
            self.part();
        } else if typography::superscript(c).is_some() {
            self.out.push('^');
            let power = self.rest.find(|c| typography::superscript(c).is_none()).unwrap_or(self.rest.len());
            self.out.extend(iter::once(c).chain(self.rest[..power].chars()).filter_map(typography::superscript));
            self.rest = &self.rest[power..];
            self.part();
        } else {
            self.out.extend(typography::ascii(c));
        }
    }

    /// Separates the output from text that would run into it: `x^{2}3` is not `x^23`.
    fn part(&mut self) {
        if self.rest.starts_with(char::is_alphanumeric) {
            self.out.push(' ');
        }
    }
}

/// Whether the content of braces needs no parentheses: a word, a number, a letter under a root.
fn is_atom(content: &str, braces: Braces) -> bool {
    let content = content.trim();
    let content = if braces == Braces::Script { content.strip_prefix('-').unwrap_or(content) } else { content };
    let is_number = content.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b'.'));
    let in_word = |c: char| c.is_alphanumeric() || matches!(c, '.' | '\\' | '\u{221a}' | '\u{b0}' | '\u{221e}');
    is_number || content.chars().all(in_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoration_is_taken_off() {
        let cases = [
            (r"\dfrac{1}{2}", "1/2"),
            (r"\frac12", "1/2"),
            (r"\frac 1 {23}", "1/23"),
            (r"1\frac{1}{2}", "1 1/2"),
            (r"\frac{x+1}{2}", "(x+1)/2"),
            (r"\frac{\sqrt{2}}{2}", "\u{221a}2/2"),
            (r"\frac{1,000}{3}", "1,000/3"),
            (r"\text{18 cm}^{2}", "18 cm^2"),
            (r"18\text{cm}^\circ", "18 cm\u{b0}"),
            (r"$\$18$", "$18"),
            ("$18", "$18"),
            ("$1$$2$", "1 2"),
            (r"10{,}000 = 10,\!000 = 10\,000", "10,000 = 10,000 = 10 000"),
            (r"\{1,2\} {1,2} x^{n+1} x^{-1}", "{1,2} {1,2} x^(n+1) x^-1"),
            ("**18** 2**8 `18`", "18 2^8 18"),
            ("**1****8** `1``8` 1&8", "1 8 1 8 1 8"),
            ("x^{2}3 x\u{b2}3 \u{bd}3", "x^2 3 x^2 3 1/2 3"),
            (r"\left( 18 \right)\quad\\ 5", "( 18 ) 5"),
            ("\u{661}\u{ff12}\u{200b}\u{202f}1\u{bd} 10\u{207b}\u{b2}m", "12 1 1/2 10^-2 m"),
            (r"\frac{1}{2", "1/{2"),
            (r"\[ \theta \leq \gamma \]", "\u{3b8} \u{2264} \\gamma"),
        ];
        for (text, want) in cases {
            assert_eq!(plain(text), want, "{text}");
        }
    }

    #[test]
    fn braces_of_any_number_are_read() {
        for part in ["{", "}", r"\frac{", r"\frac", r"\text{", "^{a+", "{a,", "\\"] {
            let text = part.repeat(10_000);
            assert!(plain(&text).len() <= 4 * text.len(), "{part}");
        }
    }
}
