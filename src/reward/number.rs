//! Numbers as people write them in answers: `1,000`, `$1,000` and `1000.0` are one number.
//!
//! Exact at any length: digits are compared as text, nothing is rounded to a float.

/// A decimal number in a text; equality compares values.
#[derive(Debug, Clone, Copy)]
pub struct Number<'a> {
    pub(super) negative: bool,
    /// Digits before the point, possibly with group separators.
    pub(super) whole: &'a str,
    /// Digits after the point.
    pub(super) fraction: &'a str,
    /// The power of ten that multiplies the digits; only `math` reads one.
    pub(super) exponent: i64,
}

const CURRENCY: [char; 3] = ['$', '\u{20ac}', '\u{a3}'];
const MINUS: [char; 2] = ['-', '\u{2212}'];

impl<'a> Number<'a> {
    /// Parses `text` if it is a number and nothing else.
    ///
    /// Accepts white space around it, one sign (`-`, `+`, U+2212) and one of `$`, euro and pound before it in either order, commas
    /// between groups of exactly three digits, a fraction with or without digits before the point, then `%` (a unit, as `$` is: `50%` is 50),
    /// then a full stop. Rejects other units and words, exponents, fractions with `/`, digits other than ASCII's, `12,34`.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let (negative, unsigned) = split_sign(text.trim());
        let (number, rest) = Self::prefix(unsigned)?;
        let rest = rest.trim_start();
        let rest = rest.strip_prefix('%').unwrap_or(rest);
        let rest = rest.strip_prefix('.').unwrap_or(rest);
        rest.is_empty().then_some(Self { negative, ..number })
    }

    /// The last number in `text`, whatever surrounds it.
    ///
    /// A minus is its sign if it touches the number (or its `$`) and follows no operand: `= -5` is -5, `10-5` ends in 5.
    #[must_use]
    pub fn last_in(text: &'a str) -> Option<Self> {
        let mut last = None;
        let mut at = 0;
        while let Some(found) = text[at..].find(|c: char| c.is_ascii_digit() || c == '.') {
            at += found;
            let follows_word = text[..at].ends_with(char::is_alphanumeric);
            match Self::prefix(&text[at..]) {
                Some((number, rest)) if !(follows_word && number.whole.is_empty()) => {
                    last = Some(Self { negative: has_minus(&text[..at]), ..number });
                    at = text.len() - rest.len();
                }
                _ => at += 1,
            }
        }
        last
    }

    /// Whether the value is a whole number, however it is written: `-5`, `1,000` and `72.0` are.
    #[must_use]
    pub fn is_integer(&self) -> bool {
        self.fraction.bytes().all(|digit| digit == b'0')
    }

    /// The longest unsigned number at the start of `text`, and the rest.
    fn prefix(text: &'a str) -> Option<(Self, &'a str)> {
        let whole = &text[..whole_len(text)];
        let rest = &text[whole.len()..];
        let fraction = rest.strip_prefix('.').map_or("", |after| &after[..digits_len(after)]);
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let point = usize::from(!fraction.is_empty());
        Some((Self { negative: false, whole, fraction, exponent: 0 }, &rest[point + fraction.len()..]))
    }

    /// The digits from the first nonzero one to the last nonzero one.
    pub(super) fn significant_digits(&self) -> impl Iterator<Item = u8> {
        let fraction = self.fraction.trim_end_matches('0');
        let is_nonzero = |c: char| matches!(c, '1'..='9');
        let whole = if fraction.is_empty() { self.whole.trim_end_matches(|c| !is_nonzero(c)) } else { self.whole };
        whole.bytes().chain(fraction.bytes()).filter(u8::is_ascii_digit).skip_while(|&digit| digit == b'0')
    }

    /// The smallest power of ten above the number: its digits are 0.d1d2... times 10 to this power.
    pub(super) fn magnitude(&self) -> i64 {
        let mut digits = self.whole.bytes().filter(u8::is_ascii_digit).skip_while(|&digit| digit == b'0').peekable();
        let places = match digits.peek() {
            Some(_) => digits.count() as i64,
            None => -(self.fraction.bytes().take_while(|&digit| digit == b'0').count() as i64),
        };
        places + self.exponent
    }

    /// A text that equal numbers share, however they are written.
    #[must_use]
    pub fn canonical(&self) -> String {
        if self.is_zero() {
            return "0".into();
        }
        let digits: String = self.significant_digits().map(char::from).collect();
        format!("{}{digits}e{}", if self.negative { "-" } else { "" }, self.magnitude())
    }

    /// Whether the value is zero.
    pub(super) fn is_zero(&self) -> bool {
        self.significant_digits().next().is_none()
    }
}

impl PartialEq for Number<'_> {
    fn eq(&self, other: &Self) -> bool {
        if self.is_zero() || other.is_zero() {
            return self.is_zero() && other.is_zero();
        }
        self.negative == other.negative
            && self.magnitude() == other.magnitude()
            && self.significant_digits().eq(other.significant_digits())
    }
}

impl Eq for Number<'_> {}

/// Whether two answers are equal: by value if both are numbers, else by their trimmed text.
#[must_use]
pub fn same_answer(left: &str, right: &str) -> bool {
    match (Number::parse(left), Number::parse(right)) {
        (Some(left), Some(right)) => left == right,
        _ => left.trim() == right.trim(),
    }
}

/// Strips one sign and one currency symbol, in either order.
fn split_sign(text: &str) -> (bool, &str) {
    let strip_currency = |text| str::strip_prefix(text, CURRENCY).map_or(text, str::trim_start);
    let outer = strip_currency(text);
    let Some(sign) = outer.chars().next().filter(|sign| MINUS.contains(sign) || *sign == '+') else {
        return (false, outer);
    };
    let inner = outer[sign.len_utf8()..].trim_start();
    let inner = if outer.len() == text.len() { strip_currency(inner) } else { inner };
    (sign != '+', inner)
}

/// Whether a number that follows `before` is negative.
fn has_minus(before: &str) -> bool {
    let before = before.strip_suffix(CURRENCY).unwrap_or(before);
    let operand = |c: char| c.is_alphanumeric() || matches!(c, ')' | ']' | '%');
    before.strip_suffix(MINUS).is_some_and(|before| !before.ends_with(operand))
}

fn digits_len(text: &str) -> usize {
    text.bytes().take_while(u8::is_ascii_digit).count()
}

/// Length of the whole part at the start of `text`: digits, or one to three digits and groups of exactly three after commas (bytes).
fn whole_len(text: &str) -> usize {
    let mut len = digits_len(text);
    if !(1..=3).contains(&len) {
        return len;
    }
    while let Some(group) = text[len..].strip_prefix(',') {
        if digits_len(group) != 3 {
            break;
        }
        len += 4;
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> Number<'_> {
        Number::parse(text).unwrap_or_else(|| panic!("{text} is a number"))
    }

    #[test]
    fn ways_to_write_a_thousand_are_equal() {
        let ways = [
            "1,000",
            "$1,000",
            "1000.0",
            "01000",
            "+1000",
            "1000.",
            " 1000\n",
            "$ 1,000.00",
            "1000%",
            "1000 %.",
            "\u{20ac}1000",
        ];
        for way in ways {
            assert_eq!(number(way), number("1000"), "{way}");
        }
    }

    #[test]
    fn ways_to_write_minus_five_are_equal() {
        for way in ["-5", "-$5", "$-5", "\u{2212}5", "- 5", "-5.0", "- $ 5", "$ - 5"] {
            assert_eq!(number(way), number("-5"), "{way}");
        }
        assert_ne!(number("-5"), number("5"));
        assert_eq!(number("-0"), number("0.00"));
    }

    #[test]
    fn fractions_are_exact_at_any_length() {
        assert_eq!(number("0.50"), number(".5"));
        assert_ne!(number("0.1"), number("0.10000000000000000000000001"));
        assert_ne!(number("10000000000000000000000001"), number("10000000000000000000000002"));
        assert_ne!(number("1.5"), number("15"));
        assert_ne!(number("0.05"), number("0.5"));
    }

    #[test]
    fn what_is_more_than_a_number_is_none() {
        let others = [
            "", " ", "-", "$", ".", "%", "x", "72 clips", "7 2", "1,00", "1,0000", ",000", "1,,000", "1/2", "1e3",
            "--5", "$$5",
        ];
        for other in others.into_iter().chain(["\u{667}", "5..", "5%%", "72, 73", "-$-5", "$-$5"]) {
            assert!(Number::parse(other).is_none(), "{other}");
        }
    }

    #[test]
    fn whole_numbers_are_known_by_value() {
        assert!(["-5", "1,000", "72.0", "0"].iter().all(|text| number(text).is_integer()));
        assert!(!number("72.5").is_integer());
    }

    #[test]
    fn the_last_number_of_a_text_is_found() {
        let cases = [
            ("48 + 24 = 72", "72"),
            ("so $1,234.50.", "1234.5"),
            ("is 72. Done", "72"),
            ("= -5", "-5"),
            ("10-5", "5"),
            ("owes -$1,000!", "-1000"),
            ("$10-$5", "5"),
            ("costs .5", "0.5"),
            ("end.5", "5"),
            ("1, 2, 3,", "3"),
            ("12345,678", "678"),
            ("v1.2.3", "3"),
            ("<answer>\n72\n</answer>\n", "72"),
            ("\u{65e5}7\u{65e5}...", "7"),
        ];
        for (text, last) in cases {
            assert_eq!(Number::last_in(text), Some(number(last)), "{text}");
        }
        assert_eq!(Number::last_in("none. \u{667}"), None);
    }

    #[test]
    fn answers_that_are_no_numbers_are_equal_as_text() {
        assert!(same_answer(" blue\n", "blue"));
        assert!(!same_answer("5 apples", "5"));
        assert!(same_answer("1,000", "1000.0"));
    }
}
