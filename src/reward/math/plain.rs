//! An answer as plain text: without LaTeX, Markdown and the typography of other scripts.
//!
//! `\dfrac{1}{2}` becomes `1/2`, `18\text{ cm}^2` becomes `18 cm^2`, full-width and Arabic digits become ASCII's. Each character is read once,
//! and braces are followed to a fixed depth, so that the time grows with the length alone.

use super::super::python;

/// Braces nested deeper are left as they stand.
const MAX_DEPTH: usize = 16;

/// The text without decoration, each run of white space one space.
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

/// What a `$` without a backslash is: in pairs they stand around formulas, else it is a currency.
fn dollar(text: &str) -> char {
    let mut escaped = false;
    let mut paired = true;
    for byte in text.bytes() {
        paired ^= byte == b'$' && !escaped;
        escaped = byte == b'\\' && !escaped;
    }
    if paired { ' ' } else { '$' }
}

/// How the content of braces is written.
#[derive(Clone, Copy, PartialEq)]
enum Braces {
    /// As it is: `\text{18 cm}`.
    Text,
    /// In parentheses unless it is a single word or number, with a sign or not: `^{-1}`.
    Script,
    /// In parentheses unless it is a single word or number: `\frac{a+b}{2}`.
    Operand,
    /// As an operand, or as a set when commas are in it: `{1,2}`.
    Bare,
}

struct Reader<'a> {
    rest: &'a str,
    out: String,
    dollar: char,
}

impl Reader<'_> {
    /// Reads what stands next: a character, a command, a group. False at the end.
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
            '~' => self.out.push(' '),
            '`' | '&' => {}
            _ => self.character(c),
        }
        true
    }

    /// What braces that no command precedes are: after `^` and `_` a script, else a group that does not show.
    fn braces_here(&self) -> Braces {
        if self.out.ends_with(['^', '_']) { Braces::Script } else { Braces::Bare }
    }

    /// Reads a group whose brace is behind.
    fn group(&mut self, depth: usize, braces: Braces) {
        let start = self.out.len();
        while !self.rest.is_empty() && !self.rest.starts_with('}') {
            self.unit(depth);
        }
        let Some(rest) = self.rest.strip_prefix('}') else {
            // Cut off, which must show: `\frac{1}{2` may have been 1/24.
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
    }

    fn enclose(&mut self, start: usize, open: char, close: char) {
        self.out.insert(start, open);
        self.out.push(close);
    }

    /// Bold, which is dropped, or a power as Python writes it.
    fn stars(&mut self) {
        let after = self.rest.trim_start_matches('*');
        let is_power = self.rest.len() - after.len() == 1
            && self.out.ends_with(|c: char| c.is_alphanumeric() || c == ')')
            && after.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '(' | '-'));
        self.rest = after;
        if is_power {
            self.out.push('^');
        }
    }

    /// A command whose backslash is behind.
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

    /// A command that stands for a character, or one that is kept.
    fn named(&mut self, name: &str) {
        let named = NAMED.iter().find(|(names, _)| names.contains(&name));
        match named {
            Some((_, text)) => self.out.push_str(text),
            None => {
                self.out.push('\\');
                self.out.push_str(name);
            }
        }
    }

    /// A command of one character that is no letter.
    fn symbol(&mut self) {
        let Some(c) = self.rest.chars().next() else {
            return;
        };
        self.rest = &self.rest[c.len_utf8()..];
        match c {
            '!' | '-' => {}
            '$' | '%' | '#' | '&' | '_' | '{' | '}' => self.out.push(c),
            // Spaces, ends of lines, and what stands around a formula.
            _ => self.out.push(' '),
        }
    }

    /// `\frac` with two arguments, in braces or of one character each: `\frac12`.
    fn fraction(&mut self, depth: usize) {
        if self.out.ends_with(char::is_alphanumeric) {
            self.out.push(' ');
        }
        self.argument(depth, Braces::Operand);
        self.out.push('/');
        self.argument(depth, Braces::Operand);
        if self.rest.starts_with(char::is_alphanumeric) {
            self.out.push(' ');
        }
    }

    /// What a command applies to: a group, a command or a character. A font without braces reaches further, which changes nothing here.
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

    fn character(&mut self, c: char) {
        match c {
            _ if c.is_ascii() => self.out.push(c),
            // Marks of direction and width that show nothing.
            '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' => {}
            '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{fe63}' => self.out.push('-'),
            '\u{66b}' | '\u{3002}' => self.out.push('.'),
            '\u{66c}' | '\u{60c}' | '\u{3001}' => self.out.push(','),
            '\u{2018}' | '\u{2019}' | '\u{2bc}' => self.out.push('\''),
            '\u{201c}' | '\u{201d}' => self.out.push('"'),
            '\u{66a}' => self.out.push('%'),
            '\u{ba}' => self.out.push('\u{b0}'),
            '\u{d7}' | '\u{b7}' | '\u{22c5}' => self.out.push('*'),
            '\u{f7}' | '\u{2044}' | '\u{2215}' => self.out.push('/'),
            '\u{2248}' => self.out.push('='),
            // Full-width forms of ASCII.
            '\u{ff01}'..='\u{ff5e}' => self.out.push(char::from((u32::from(c) - 0xfee0) as u8)),
            _ => self.rare_character(c),
        }
    }

    /// Digits of other scripts, fractions and powers of one character; anything else is itself.
    fn rare_character(&mut self, c: char) {
        if let Some(digit) = python::decimal(c) {
            self.out.push(char::from(b'0' + digit));
        } else if let Some((_, fraction)) = FRACTIONS.iter().find(|(other, _)| *other == c) {
            if self.out.ends_with(char::is_alphanumeric) {
                self.out.push(' ');
            }
            self.out.push_str(fraction);
        } else if let Some(digit) = superscript(c) {
            self.out.push('^');
            self.out.push(digit);
            while let Some((c, digit)) = self.rest.chars().next().and_then(|c| Some((c, superscript(c)?))) {
                self.rest = &self.rest[c.len_utf8()..];
                self.out.push(digit);
            }
        } else {
            self.out.push(c);
        }
    }
}

/// Whether the content of braces needs no parentheses in their place: a word, a number, a letter with a root before it.
fn is_atom(content: &str, braces: Braces) -> bool {
    let content = content.trim();
    let content = if braces == Braces::Script { content.strip_prefix('-').unwrap_or(content) } else { content };
    let is_number = content.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b'.'));
    let in_word = |c: char| c.is_alphanumeric() || matches!(c, '.' | '\\' | '\u{221a}' | '\u{b0}' | '\u{221e}');
    is_number || content.chars().all(in_word)
}

fn superscript(c: char) -> Option<char> {
    let at = SUPERSCRIPTS.iter().position(|other| *other == c)?;
    Some(char::from(b"0123456789-"[at]))
}

const SUPERSCRIPTS: [char; 11] = [
    '\u{2070}', '\u{b9}', '\u{b2}', '\u{b3}', '\u{2074}', '\u{2075}', '\u{2076}', '\u{2077}', '\u{2078}', '\u{2079}',
    '\u{207b}',
];

const FRACTIONS: [(char, &str); 18] = [
    ('\u{bc}', "1/4"),
    ('\u{bd}', "1/2"),
    ('\u{be}', "3/4"),
    ('\u{2150}', "1/7"),
    ('\u{2151}', "1/9"),
    ('\u{2152}', "1/10"),
    ('\u{2153}', "1/3"),
    ('\u{2154}', "2/3"),
    ('\u{2155}', "1/5"),
    ('\u{2156}', "2/5"),
    ('\u{2157}', "3/5"),
    ('\u{2158}', "4/5"),
    ('\u{2159}', "1/6"),
    ('\u{215a}', "5/6"),
    ('\u{215b}', "1/8"),
    ('\u{215c}', "3/8"),
    ('\u{215d}', "5/8"),
    ('\u{215e}', "7/8"),
];

/// Commands that stand for a character, which people also write itself.
const NAMED: &[(&[&str], &str)] = &[
    (&["times", "cdot", "ast"], "*"),
    (&["div"], "/"),
    (&["circ", "degree", "textdegree"], "\u{b0}"),
    (&["approx", "simeq"], "="),
    (&["le", "leq", "leqslant"], "\u{2264}"),
    (&["ge", "geq", "geqslant"], "\u{2265}"),
    (&["ne", "neq"], "\u{2260}"),
    (&["pm"], "\u{b1}"),
    (&["infty"], "\u{221e}"),
    (&["in"], "\u{2208}"),
    (&["cup"], "\u{222a}"),
    (&["cap"], "\u{2229}"),
    (&["emptyset", "varnothing"], "\u{2205}"),
    (&["alpha"], "\u{3b1}"),
    (&["beta"], "\u{3b2}"),
    (&["theta"], "\u{3b8}"),
    (&["pi"], "\u{3c0}"),
    (&["dots", "ldots", "cdots"], "..."),
    (&["pounds"], "\u{a3}"),
    (&["euro"], "\u{20ac}"),
    (&["textdollar"], "$"),
    (&["lbrace"], "{"),
    (&["rbrace"], "}"),
];

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
            (r"\left( 18 \right)\quad\\ 5", "( 18 ) 5"),
            ("\u{661}\u{ff12}\u{200b}\u{202f}1\u{bd} 10\u{207b}\u{b2}m", "12 1 1/2 10^-2m"),
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
