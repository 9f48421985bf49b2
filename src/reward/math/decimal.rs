//! Digits with the separators that people around the world put between them.

use super::super::number::Number;

/// Length of the digits, and separators followed by digits, at the start of `text` (bytes).
#[must_use]
pub fn digits_len(text: &str) -> usize {
    let bytes = text.as_bytes();
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let mut len = 0;
    while let Some(&byte) = bytes.get(len) {
        let separates = byte == b'.' || (len > 0 && matches!(byte, b',' | b' ' | b'\'' | b'_'));
        if !(is_digit(len) || separates && is_digit(len + 1)) {
            break;
        }
        len += 1;
    }
    len
}

/// Parses digits and separators as a decimal.
///
/// A single comma or full stop is the decimal point, except a comma before exactly three digits. If both occur, the last is the point,
/// provided that it occurs once. All others, and spaces, apostrophes and underscores, separate groups: of three digits or, as in India, of two
/// before the last three.
#[must_use]
pub fn decimal(digits: &str) -> Option<Number<'_>> {
    let count = |separator: u8| digits.bytes().filter(|byte| *byte == separator).count();
    let (commas, points) = (count(b','), count(b'.'));
    let is_spaced = digits.contains([' ', '\'', '_']);
    let point = match (commas, points) {
        (0, 1) => digits.find('.'),
        (1, 0) if is_spaced || !is_grouped(digits, b',') => digits.find(','),
        (0, _) | (_, 0) => None,
        _ => {
            digits.rfind([',', '.']).filter(|at| if digits.as_bytes()[*at] == b',' { commas == 1 } else { points == 1 })
        }
    };
    let whole = &digits[..point.unwrap_or(digits.len())];
    let fraction = point.map_or("", |at| &digits[at + 1..]);
    let mut separators = whole.bytes().filter(|byte| !byte.is_ascii_digit());
    let is_whole = separators.next().is_none_or(|separator| is_grouped(whole, separator));
    let is_number = is_whole && fraction.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some(Number { negative: false, whole, fraction, exponent: 0 })
}

/// Whether this separator separates groups of digits whose first is not a lone 0.
fn is_grouped(whole: &str, separator: u8) -> bool {
    let separator = char::from(separator);
    let is_digits = |group: &str, size: usize| group.len() == size && group.bytes().all(|byte| byte.is_ascii_digit());
    let Some((first, rest)) = whole.split_once(separator) else {
        return false;
    };
    let (middle, last) = rest.rsplit_once(separator).map_or((None, rest), |(middle, last)| (Some(middle), last));
    let fits = |size: usize| {
        (1..=size).any(|len| is_digits(first, len))
            && middle.is_none_or(|middle| middle.split(separator).all(|group| is_digits(group, size)))
    };
    is_digits(last, 3) && first != "0" && (fits(3) || (separator == ',' && fits(2)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_end_where_no_digit_follows() {
        for (text, len) in [
            ("18 apples", 2),
            ("18, 19", 2),
            ("1 234.5.", 7),
            (".5", 2),
            (",5", 0),
            ("1'234'", 5),
            ("", 0),
            ("1__2", 1),
        ] {
            assert_eq!(digits_len(text), len, "{text}");
        }
    }

    #[test]
    fn whole_and_fraction_are_told_apart() {
        for (digits, whole, fraction) in [
            ("1,234", "1,234", ""),
            ("1.234", "1", "234"),
            ("0,123", "0", "123"),
            ("1 234,567", "1 234", "567"),
            ("1.234.567,8", "1.234.567", "8"),
            ("12,34,567.8", "12,34,567", "8"),
            (".5", "", "5"),
        ] {
            let number = decimal(digits).unwrap_or_else(|| panic!("{digits}"));
            assert_eq!((number.whole, number.fraction), (whole, fraction), "{digits}");
        }
        for digits in ["1,2,3", "1.2.3", "1 2", "1,234.5.6", "1.234 567", "1'234,567,8", "0,123,456", "1,,234"] {
            assert!(decimal(digits).is_none(), "{digits}");
        }
    }
}
