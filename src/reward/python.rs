//! White space, digits and length as Python's `str` defines them, where Rust's differ.

/// `str.isspace` for one character: `str.strip` removes the same, and `\s` matches it in `re`.
///
/// Unicode's `White_Space`, and the four information separators that Python counts by their bidirectional class.
#[must_use]
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// `str.strip()`.
#[must_use]
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.isdigit()`: not empty, and every character has the Unicode numeric type `Digit` or `Decimal`, so superscripts and Arabic digits pass.
#[must_use]
pub fn is_digit(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || (!c.is_ascii() && digit_run(c).is_some()))
}

/// `len(text)`: code points, not bytes.
#[must_use]
pub fn len(text: &str) -> usize {
    text.chars().count()
}

/// `unicodedata.decimal(c)`: the value of a digit of any script that writes numbers in tens.
#[must_use]
pub fn decimal(c: char) -> Option<u8> {
    let (low, high) = digit_run(c)?;
    // Runs of subscripts, of digits with a full stop, and of circled digits are not decimal; New Tai Lue ends with a second digit one.
    let tens = (high - low + 1) / 10 * 10;
    let offset = u32::from(c) - low;
    (offset < tens && !matches!(low, 0x2080 | 0x1f100)).then_some((offset % 10) as u8)
}

/// The run of digits that contains a character.
fn digit_run(c: char) -> Option<(u32, u32)> {
    let after = DIGITS.partition_point(|&(low, _)| low <= u32::from(c));
    let run = DIGITS[after.checked_sub(1)?];
    (u32::from(c) <= run.1).then_some(run)
}

/// First and last code point of each run for which Python 3.11's `str.isdigit` holds (Unicode 14.0), made by
/// `tests/fixtures/make_score_reference.py --digits`.
#[rustfmt::skip]
const DIGITS: &[(u32, u32)] = &[
    (0x30, 0x39), (0xb2, 0xb3), (0xb9, 0xb9), (0x660, 0x669), (0x6f0, 0x6f9), (0x7c0, 0x7c9), (0x966, 0x96f),
    (0x9e6, 0x9ef), (0xa66, 0xa6f), (0xae6, 0xaef), (0xb66, 0xb6f), (0xbe6, 0xbef), (0xc66, 0xc6f), (0xce6, 0xcef),
    (0xd66, 0xd6f), (0xde6, 0xdef), (0xe50, 0xe59), (0xed0, 0xed9), (0xf20, 0xf29), (0x1040, 0x1049),
    (0x1090, 0x1099), (0x1369, 0x1371), (0x17e0, 0x17e9), (0x1810, 0x1819), (0x1946, 0x194f), (0x19d0, 0x19da),
    (0x1a80, 0x1a89), (0x1a90, 0x1a99), (0x1b50, 0x1b59), (0x1bb0, 0x1bb9), (0x1c40, 0x1c49), (0x1c50, 0x1c59),
    (0x2070, 0x2070), (0x2074, 0x2079), (0x2080, 0x2089), (0x2460, 0x2468), (0x2474, 0x247c), (0x2488, 0x2490),
    (0x24ea, 0x24ea), (0x24f5, 0x24fd), (0x24ff, 0x24ff), (0x2776, 0x277e), (0x2780, 0x2788), (0x278a, 0x2792),
    (0xa620, 0xa629), (0xa8d0, 0xa8d9), (0xa900, 0xa909), (0xa9d0, 0xa9d9), (0xa9f0, 0xa9f9), (0xaa50, 0xaa59),
    (0xabf0, 0xabf9), (0xff10, 0xff19), (0x104a0, 0x104a9), (0x10a40, 0x10a43), (0x10d30, 0x10d39),
    (0x10e60, 0x10e68), (0x11052, 0x1105a), (0x11066, 0x1106f), (0x110f0, 0x110f9), (0x11136, 0x1113f),
    (0x111d0, 0x111d9), (0x112f0, 0x112f9), (0x11450, 0x11459), (0x114d0, 0x114d9), (0x11650, 0x11659),
    (0x116c0, 0x116c9), (0x11730, 0x11739), (0x118e0, 0x118e9), (0x11950, 0x11959), (0x11c50, 0x11c59),
    (0x11d50, 0x11d59), (0x11da0, 0x11da9), (0x16a60, 0x16a69), (0x16ac0, 0x16ac9), (0x16b50, 0x16b59),
    (0x1d7ce, 0x1d7ff), (0x1e140, 0x1e149), (0x1e2f0, 0x1e2f9), (0x1e950, 0x1e959), (0x1f100, 0x1f10a),
    (0x1fbf0, 0x1fbf9),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_unicode_table() {
        for yes in ["7", "72", "\u{b2}", "\u{667}\u{662}", "\u{2460}", "\u{1d7ff}", "\u{1fbf9}"] {
            assert!(is_digit(yes), "{yes}");
        }
        for no in ["", "-7", "7.0", "7 ", "\u{bd}", "\u{4e03}", "\u{216b}", "\u{1d800}", "\u{10ffff}", "/", ":"] {
            assert!(!is_digit(no), "{no}");
        }
    }

    #[test]
    fn the_digit_table_is_sorted_and_disjoint() {
        assert!(DIGITS.iter().all(|(low, high)| low <= high));
        assert!(DIGITS.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0));
        assert_eq!(DIGITS.iter().map(|(low, high)| high - low + 1).sum::<u32>(), 788);
    }

    #[test]
    fn decimals_are_those_of_the_unicode_table() {
        for (c, value) in [('7', 7), ('\u{667}', 7), ('\u{96f}', 9), ('\u{ff11}', 1), ('\u{1d7ff}', 9), ('\u{19d9}', 9)]
        {
            assert_eq!(decimal(c), Some(value), "{c}");
        }
        for c in ['a', '/', '\u{b2}', '\u{2082}', '\u{2460}', '\u{19da}', '\u{1f101}', '\u{bd}'] {
            assert_eq!(decimal(c), None, "{c}");
        }
        // The number of characters of category Nd in Python 3.11.
        assert_eq!(('\0'..=char::MAX).filter_map(decimal).count(), 660);
    }

    #[test]
    fn white_space_includes_the_information_separators() {
        assert_eq!(strip("\u{1c}\u{1f}\u{85}\u{a0}\u{3000} x\u{1d}y \n"), "x\u{1d}y");
        assert_eq!(strip("\u{200b}x\u{feff}"), "\u{200b}x\u{feff}");
    }

    #[test]
    fn length_counts_code_points() {
        assert_eq!(len("a\u{65e5}\u{1f600}"), 3);
    }
}
