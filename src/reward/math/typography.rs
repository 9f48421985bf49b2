//! Characters that people write in place of ASCII, and LaTeX's names of characters.

use super::super::python;

/// A character's ASCII equivalent, or itself without one; `None` if it is invisible.
#[must_use]
pub fn ascii(c: char) -> Option<char> {
    Some(match c {
        // Direction marks and zero-width characters.
        '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' => return None,
        '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{fe63}' => '-',
        '\u{66b}' | '\u{3002}' => '.',
        '\u{66c}' | '\u{60c}' | '\u{3001}' => ',',
        '\u{2018}' | '\u{2019}' | '\u{2bc}' => '\'',
        '\u{201c}' | '\u{201d}' => '"',
        '\u{66a}' => '%',
        '\u{ba}' => '\u{b0}',
        '\u{d7}' | '\u{b7}' | '\u{22c5}' => '*',
        '\u{f7}' | '\u{2044}' | '\u{2215}' => '/',
        '\u{2248}' => '=',
        // Full-width forms of ASCII.
        '\u{ff01}'..='\u{ff5e}' => char::from((u32::from(c) - 0xfee0) as u8),
        _ => python::decimal(c).map_or(c, |digit| char::from(b'0' + digit)),
    })
}

/// Fractions that are one character.
#[must_use]
pub fn fraction(c: char) -> Option<&'static str> {
    FRACTIONS.iter().find(|(other, _)| *other == c).map(|(_, fraction)| *fraction)
}

/// The digit or minus of a superscript.
#[must_use]
pub fn superscript(c: char) -> Option<char> {
    let at = SUPERSCRIPTS.iter().position(|other| *other == c)?;
    Some(char::from(b"0123456789-"[at]))
}

/// The character of a LaTeX command, if people also write the character itself.
#[must_use]
pub fn named(command: &str) -> Option<&'static str> {
    NAMED.iter().find(|(names, _)| names.contains(&command)).map(|(_, text)| *text)
}

#[rustfmt::skip]
const SUPERSCRIPTS: [char; 11] = [
    '\u{2070}', '\u{b9}', '\u{b2}', '\u{b3}', '\u{2074}', '\u{2075}', '\u{2076}', '\u{2077}', '\u{2078}', '\u{2079}',
    '\u{207b}',
];

#[rustfmt::skip]
const FRACTIONS: [(char, &str); 18] = [
    ('\u{bc}', "1/4"), ('\u{bd}', "1/2"), ('\u{be}', "3/4"), ('\u{2150}', "1/7"), ('\u{2151}', "1/9"),
    ('\u{2152}', "1/10"), ('\u{2153}', "1/3"), ('\u{2154}', "2/3"), ('\u{2155}', "1/5"), ('\u{2156}', "2/5"),
    ('\u{2157}', "3/5"), ('\u{2158}', "4/5"), ('\u{2159}', "1/6"), ('\u{215a}', "5/6"), ('\u{215b}', "1/8"),
    ('\u{215c}', "3/8"), ('\u{215d}', "5/8"), ('\u{215e}', "7/8"),
];

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
