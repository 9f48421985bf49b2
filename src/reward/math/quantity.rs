//! Numbers as people around the world write them, with their unit.

use super::super::number::Number;
use super::decimal::{decimal, digits_len};
use super::ratio::Value;
use super::unit::Unit;
use super::words::currency;

/// The most digits of an exponent, so that sums of exponents cannot overflow.
const MAX_EXPONENT_DIGITS: usize = 15;

/// A number and its unit.
#[derive(Debug, Clone)]
pub struct Quantity<'a> {
    value: Value<'a>,
    unit: Unit,
}

impl<'a> Quantity<'a> {
    /// Parses plain text (see [`super::plain`]) if it is a number with its unit and nothing else.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let (outer, rest) = sign(text);
        let has_sign = rest.len() < text.len();
        let (symbol, rest) = currency(rest).map_or((None, rest), |(symbol, rest)| (Some(symbol), rest.trim_start()));
        let (inner, rest) = if has_sign { (false, rest) } else { sign(rest) };
        let (value, rest) = value(rest, outer || inner)?;
        let (exponent, rest) = scale(rest);
        Some(Self { value: value.shifted(exponent), unit: Unit::parse(symbol, rest)? })
    }

    /// Whether both are the same number with agreeing units. A percentage equals a bare number in either reading.
    #[must_use]
    pub fn equals(&self, other: &Self) -> bool {
        if self.value == other.value {
            return self.unit.agrees(&other.unit);
        }
        match (&self.unit, &other.unit) {
            (Unit::Percent, Unit::Any) => self.value.clone().shifted(-2) == other.value,
            (Unit::Any, Unit::Percent) => self.value == other.value.clone().shifted(-2),
            _ => false,
        }
    }
}

/// Strips one sign, which may be a word.
fn sign(text: &str) -> (bool, &str) {
    let minus = ["-", "minus ", "negative "].into_iter().find_map(|minus| text.strip_prefix(minus));
    let rest = minus.or_else(|| text.strip_prefix('+')).unwrap_or(text);
    (minus.is_some(), rest.trim_start())
}

/// The value at the start of `text`, and the rest.
fn value(text: &str, negative: bool) -> Option<(Value<'_>, &str)> {
    let above = Operand::first(text)?;
    let below = above.rest.trim_start().strip_prefix('/').and_then(|rest| Operand::first(rest.trim_start()));
    if let Some(below) = below {
        let denominator = Number { negative: below.negative, ..decimal(below.digits)? };
        let fraction = match above.digits.rsplit_once(' ') {
            Some((whole, above)) => {
                Value::mixed(&Number { negative, ..decimal(whole)? }, &decimal(above)?, &denominator)
            }
            None => Value::fraction(
                &Number { negative: negative != above.negative, ..decimal(above.digits)? },
                &denominator,
            ),
        };
        return Some((fraction?, below.rest));
    }
    let negative = negative != above.negative;
    if let Some((exponent, rest)) = above.rest.strip_prefix('^').filter(|_| above.digits == "10").and_then(power) {
        return Some((Value::Decimal(Number { negative, whole: "1", fraction: "", exponent }), rest));
    }
    let (exponent, rest) = scientific(above.rest).unwrap_or((0, above.rest));
    Some((Value::Decimal(Number { negative, exponent, ..decimal(above.digits)? }), rest))
}

/// Digits with separators, in parentheses or not.
struct Operand<'a> {
    negative: bool,
    digits: &'a str,
    rest: &'a str,
}

impl<'a> Operand<'a> {
    /// Parses the start of `text`.
    fn first(text: &'a str) -> Option<Self> {
        let Some((inner, rest)) = text.strip_prefix('(').and_then(|text| text.split_once(')')) else {
            let len = digits_len(text);
            return (len > 0).then(|| Self { negative: false, digits: &text[..len], rest: &text[len..] });
        };
        let (negative, digits) = sign(inner.trim());
        let len = digits_len(digits);
        (len > 0 && len == digits.len()).then_some(Self { negative, digits, rest })
    }
}

/// The power of ten after a number, and the rest: `e3`, `* 10^3`, `x 10^(-3)`.
fn scientific(text: &str) -> Option<(i64, &str)> {
    if let Some(text) = text.strip_prefix(['e', 'E']) {
        return integer(text);
    }
    let ten = text.trim_start().strip_prefix(['*', 'x', 'X'])?.trim_start().strip_prefix("10")?;
    power(ten.trim_start().strip_prefix('^')?)
}

/// An exponent, in parentheses or not.
fn power(text: &str) -> Option<(i64, &str)> {
    match text.strip_prefix('(') {
        Some(inner) => integer(inner).and_then(|(exponent, rest)| Some((exponent, rest.strip_prefix(')')?))),
        None => integer(text),
    }
}

fn integer(text: &str) -> Option<(i64, &str)> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let len = unsigned.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, rest) = unsigned.split_at(len);
    let exponent = digits.parse::<i64>().ok().filter(|_| len <= MAX_EXPONENT_DIGITS)?;
    Some((if text.starts_with('-') { -exponent } else { exponent }, rest))
}

/// The power of ten of words like `million` after a number, and the rest.
fn scale(mut text: &str) -> (i64, &str) {
    let mut exponent = 0;
    while let Some((word, power)) = SCALES.iter().find(|(word, _)| starts_with_word(text, word)) {
        exponent += power;
        text = &text.trim_start()[word.len()..];
    }
    (exponent, text)
}

const SCALES: [(&str, i64); 5] = [("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12)];

fn starts_with_word(text: &str, word: &str) -> bool {
    let text = text.trim_start();
    let start = text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word));
    start && !text[word.len()..].starts_with(char::is_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantity(text: &str) -> Quantity<'_> {
        Quantity::parse(text).unwrap_or_else(|| panic!("{text} is a number"))
    }

    #[test]
    fn ways_to_write_a_number_are_equal() {
        let rows: [&[&str]; 8] = [
            &["1234.5", "1,234.5", "1.234,5", "1 234.5", "1 234,50", "1'234.5", "1_234.5", "12345e-1", "1.2345 * 10^3"],
            &["1234567", "1,234,567", "1.234.567", "12,34,567", "1 234 567", "1.234567E+6", "1.234567 million"],
            &["1.5", "1,5", "3/2", "1 1/2", "1.5/1", "0.75/0.5", "15*10^-1", "15 x 10^(-1)", "(3)/(2)", "(-3)/(-2)"],
            &["-0.5", "-.5", "-1/2", "- 1/2", "(-1)/2", "1/(-2)", "-0,500"],
            &["1000", "10^3", "1e3", "1 thousand", "10 hundred", "1,000", "1.000.000/1000"],
            &["-5", "-$5", "$-5", "$ -5", "minus 5", "-5 dollars", "USD -5"],
            &["1000.5", "1 000,5", "1.000,5"],
            &["1e1000000000000", "10e999999999999", "0.1e1000000000001"],
        ];
        for row in rows {
            assert!(row.iter().all(|other| quantity(other).equals(&quantity(row[0]))), "{row:?}");
        }
        for (at, row) in rows.iter().enumerate() {
            assert!(rows[..at].iter().all(|other| !quantity(other[0]).equals(&quantity(row[0]))), "{row:?}");
        }
    }

    #[test]
    fn what_is_more_than_a_number_is_none() {
        let texts = [
            "",
            "-",
            "$",
            ".",
            "x",
            "1 2",
            "1,2,3",
            "1.2.3",
            "1,234,56",
            "1,23,45",
            "0,123,456",
            "1,234.567,8",
            "--5",
            "$$5",
            "-$-5",
            "5..",
            "1/0",
            "1/2/3",
            "1 2 3/4",
            "1e",
            "1e5e5",
            "1e1000000000000000",
            "2^3",
            "10^",
            "3:30",
            "1-5",
            "18!",
            "5 + 3",
            "18 2 pears",
            "18, 19",
            "1.5 1/2",
            "e5",
            "1 millionth",
            "(1",
            "()",
            "(1)(2)/3",
            "\u{b1}18",
            "18 19 20",
        ];
        for text in texts {
            assert!(Quantity::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn units_must_not_disagree() {
        for (left, right) in [("18 cents", "$18"), ("18 m", "18 cm"), ("18%", "$18"), ("50%", "5"), ("50%", "0.5%")] {
            assert!(!quantity(left).equals(&quantity(right)), "{left} {right}");
        }
        for (left, right) in
            [("18 cents", "18"), ("18 apples", "$18"), ("50%", "50"), ("50%", "1/2"), ("0.5", "50 percent")]
        {
            assert!(quantity(left).equals(&quantity(right)), "{left} {right}");
        }
    }
}
