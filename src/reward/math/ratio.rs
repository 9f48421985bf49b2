//! Exact values of any size: decimals as digits, fractions as two big integers.

use num_bigint::BigUint;

use super::super::number::Number;

/// The most digits of a numerator or denominator: products of longer ones would take quadratic time.
const MAX_DIGITS: usize = 1000;

/// More digits than a decimal needs to equal a fraction within [`MAX_DIGITS`]: 1/2^3321 has 3,321 places.
const MAX_PLACES: usize = 5000;

/// The value of a number; equality compares rational numbers.
#[derive(Debug, Clone)]
pub enum Value<'a> {
    /// Digits with a power of ten, at any length.
    Decimal(Number<'a>),
    /// Numerator over denominator.
    Fraction(Ratio),
}

/// A fraction, not reduced.
#[derive(Debug, Clone)]
pub struct Ratio {
    negative: bool,
    numerator: BigUint,
    denominator: BigUint,
    /// The power of ten that multiplies it.
    exponent: i64,
}

impl Value<'_> {
    /// A fraction; `None` if a part is too long or the denominator is 0.
    #[must_use]
    pub fn fraction(numerator: &Number<'_>, denominator: &Number<'_>) -> Option<Self> {
        let (above, below) = (Ratio::of(numerator, MAX_DIGITS)?, Ratio::of(denominator, MAX_DIGITS)?);
        let is_finite = below.numerator != BigUint::ZERO;
        is_finite.then_some(Self::Fraction(Ratio {
            negative: above.negative != below.negative,
            numerator: above.numerator,
            denominator: below.numerator,
            exponent: above.exponent - below.exponent,
        }))
    }

    /// A mixed number such as `1 1/2`, with the sign of its whole part. `None` if a part is too long or not a whole number, or the
    /// denominator is 0.
    #[must_use]
    pub fn mixed(whole: &Number<'_>, numerator: &Number<'_>, denominator: &Number<'_>) -> Option<Self> {
        let (above, below) = (whole_number(numerator)?, whole_number(denominator)?);
        let numerator = whole_number(whole)? * &below + above;
        let is_finite = below != BigUint::ZERO;
        is_finite.then_some(Self::Fraction(Ratio {
            negative: whole.negative,
            numerator,
            denominator: below,
            exponent: 0,
        }))
    }

    /// The value times a power of ten.
    #[must_use]
    pub fn shifted(mut self, exponent: i64) -> Self {
        match &mut self {
            Self::Decimal(number) => number.exponent += exponent,
            Self::Fraction(ratio) => ratio.exponent += exponent,
        }
        self
    }
}

impl PartialEq for Value<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Decimal(left), Self::Decimal(right)) => left == right,
            (Self::Fraction(left), Self::Fraction(right)) => left.equals(right),
            (Self::Fraction(ratio), Self::Decimal(number)) | (Self::Decimal(number), Self::Fraction(ratio)) => {
                Ratio::of(number, MAX_PLACES).is_some_and(|number| ratio.equals(&number))
            }
        }
    }
}

impl Ratio {
    /// A decimal as a fraction; `None` if it has more significant digits than `most`.
    fn of(number: &Number<'_>, most: usize) -> Option<Self> {
        let digits: Vec<u8> = number.significant_digits().take(most + 1).collect();
        if digits.len() > most {
            return None;
        }
        Some(Self {
            negative: number.negative,
            numerator: BigUint::parse_bytes(&digits, 10).unwrap_or_default(),
            denominator: 1_u32.into(),
            exponent: number.magnitude() - digits.len() as i64,
        })
    }

    fn equals(&self, other: &Self) -> bool {
        let (mut left, mut right) = (&self.numerator * &other.denominator, &other.numerator * &self.denominator);
        if left == BigUint::ZERO || right == BigUint::ZERO {
            return left == right;
        }
        // Neither product has this many digits, so no larger power can make them equal.
        let shift = self.exponent - other.exponent;
        let Some(power) = u32::try_from(shift.abs()).ok().filter(|power| *power as usize <= MAX_DIGITS + MAX_PLACES)
        else {
            return false;
        };
        let larger = if shift > 0 { &mut left } else { &mut right };
        *larger *= BigUint::from(10_u32).pow(power);
        self.negative == other.negative && left == right
    }
}

/// A decimal without point and exponent as a whole number.
fn whole_number(number: &Number<'_>) -> Option<BigUint> {
    let digits: Vec<u8> = number.whole.bytes().filter(u8::is_ascii_digit).take(MAX_DIGITS + 1).collect();
    let is_whole = number.fraction.is_empty() && number.exponent == 0 && digits.len() <= MAX_DIGITS;
    is_whole.then(|| BigUint::parse_bytes(&digits, 10)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> Number<'_> {
        Number::parse(text).unwrap()
    }

    fn fraction(above: &str, below: &str) -> Value<'static> {
        match Value::fraction(&number(above), &number(below)) {
            Some(Value::Fraction(ratio)) => Value::Fraction(ratio),
            other => panic!("{above}/{below}: {other:?}"),
        }
    }

    #[test]
    fn equal_fractions_are_equal_and_others_are_not() {
        let half = fraction("1", "2");
        for (above, below) in [("2", "4"), ("-1", "-2"), ("0.5", "1"), ("100", "200"), ("1", "2.0"), ("5,000", "10000")]
        {
            assert_eq!(fraction(above, below), half, "{above}/{below}");
        }
        for (above, below) in [("-1", "2"), ("1", "3"), ("0", "2"), ("5", "1"), ("1", "20")] {
            assert_ne!(fraction(above, below), half, "{above}/{below}");
        }
        assert_eq!(half, Value::Decimal(number("0.50")));
        assert_ne!(fraction("1", "3"), Value::Decimal(number(&format!("0.{}", "3".repeat(400)))));
        assert_eq!(fraction("0", "2"), Value::Decimal(number("-0")));
        assert!(Value::fraction(&number("1"), &number("0.0")).is_none());
    }

    #[test]
    fn a_mixed_number_is_the_sum() {
        let mixed = |whole, above, below| Value::mixed(&number(whole), &number(above), &number(below));
        assert_eq!(mixed("1", "1", "2"), Some(fraction("3", "2")));
        assert_eq!(mixed("-1", "1", "2"), Some(fraction("-3", "2")));
        assert_eq!(mixed("100", "10", "20"), Some(fraction("201", "2")));
        assert!(mixed("1", "1", "0").is_none() && mixed("1.5", "1", "2").is_none());
    }

    #[test]
    fn powers_of_ten_take_no_memory() {
        let huge = 1_000_000_000_000;
        assert_eq!(Value::Decimal(number("10")).shifted(huge), Value::Decimal(number("1")).shifted(huge + 1));
        assert_eq!(fraction("1", "2").shifted(huge), fraction("50", "10").shifted(huge - 1));
        assert_ne!(fraction("1", "2").shifted(huge), fraction("1", "2"));
    }

    #[test]
    fn long_fractions_are_refused_and_long_decimals_compared() {
        let long = "7".repeat(1001);
        assert!(Value::fraction(&number(&long), &number("2")).is_none());
        assert!(Value::fraction(&number(&long[1..]), &number("2")).is_some());
        // 1/2^3321 = 5^3321 / 10^3321 has 3,321 places.
        let two = BigUint::from(2_u32).pow(3321).to_string();
        let places = format!("0.{:0>3321}", BigUint::from(5_u32).pow(3321).to_string());
        assert_eq!(fraction("1", &two), Value::Decimal(number(&places)));
        assert_ne!(fraction("1", &two), Value::Decimal(number(&(places + "1"))));
    }
}
