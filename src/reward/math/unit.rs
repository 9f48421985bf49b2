//! Units of numbers: `dollars`, `km/h`, `apples left`; and words next to a number that are not units.

use std::borrow::Cow;

use super::words::{is_no_unit, known};

/// The unit of a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unit {
    /// None, or one that the table does not know: it agrees with any other.
    Any,
    /// Percent, which may also mean hundredths.
    Percent,
    /// One from the table, in its spelling: it disagrees with any other.
    Known(Cow<'static, str>),
}

/// A longer text is a sentence (words).
const MAX_WORDS: usize = 5;
const MAX_BYTES: usize = 200;

impl Unit {
    /// Whether both may mean the same: dollars may be dollars per day, but not cents.
    #[must_use]
    pub fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) | (_, Self::Any) => true,
            (Self::Known(left), Self::Known(right)) => {
                let per = |long: &str, short: &str| long.strip_prefix(short).is_some_and(|rest| rest.starts_with('/'));
                left == right || (!right.contains('/') && per(left, right)) || (!left.contains('/') && per(right, left))
            }
            _ => self == other,
        }
    }

    /// Parses the text after a number, with a symbol before it, as a unit; `None` if it is anything else.
    ///
    /// A letter that touches the number is a factor, as in `18x`, unless the table knows the whole word, as in `18cm`.
    #[must_use]
    pub fn parse(symbol: Option<&'static str>, text: &str) -> Option<Self> {
        let attached = !text.starts_with(' ');
        let phrase = text.trim();
        if phrase.is_empty() {
            return Some(symbol.map_or(Self::Any, |symbol| Self::Known(symbol.into())));
        }
        if phrase == "%" {
            return symbol.is_none().then_some(Self::Percent);
        }
        if text.len() > MAX_BYTES {
            return None;
        }
        let mut phrase = Phrase { spelled: symbol.map(str::to_owned).unwrap_or_default(), ..Phrase::default() };
        let lower = text.to_lowercase().replace("per cent", "percent").replace(" per ", "/").replace(" a ", "/");
        // `18m` is 18 times m, `18m/s` is a speed.
        let attached = attached && !lower.contains('/');
        for (at, factor) in lower.split('/').enumerate() {
            if at > 0 {
                phrase.spelled.push('/');
            }
            for word in factor.split([' ', '*']).filter(|word| !word.is_empty()) {
                phrase.add(word, attached)?;
            }
        }
        phrase.finish()
    }
}

/// A unit while its words are being read.
#[derive(Default)]
struct Phrase {
    /// The words in the table's spelling.
    spelled: String,
    words: usize,
    /// Whether the table lacks a word.
    has_unknown: bool,
    is_percent: bool,
    /// `^2` after `square`, until the word that it applies to.
    power: &'static str,
}

impl Phrase {
    /// Adds a word; `None` if a unit cannot have it there.
    fn add(&mut self, word: &str, attached: bool) -> Option<()> {
        let first = self.words == 0;
        self.words += 1;
        if self.words > MAX_WORDS {
            return None;
        }
        if let Some(power) = power_of(word) {
            self.power = power;
            return (!attached).then_some(());
        }
        let (name, power) = word.split_at(word.find('^').unwrap_or(word.len()));
        let name = name.strip_suffix('.').unwrap_or(name);
        let Some(unit) = known(name) else {
            self.has_unknown = true;
            let is_unit = power.is_empty() && word.len() == name.len() && !attached && is_thing(name, first);
            return is_unit.then_some(());
        };
        let is_factor = attached && first && name.len() == 1 && !matches!(name, "$" | "%");
        if is_factor || !matches!(power, "" | "^2" | "^3") {
            return None;
        }
        self.is_percent |= first && unit == "%" && self.spelled.is_empty();
        let power = if power.is_empty() { std::mem::take(&mut self.power) } else { power };
        if self.spelled == "\u{b0}" && unit.starts_with(&self.spelled) {
            self.spelled.clear(); // as in `degrees Celsius`
        }
        if !self.spelled.ends_with(unit) {
            self.spelled.push_str(unit);
        }
        self.spelled.push_str(power);
        Some(())
    }

    fn finish(self) -> Option<Unit> {
        if !self.power.is_empty() {
            return None;
        }
        Some(match self {
            Self { is_percent: true, .. } => Unit::Percent,
            Self { has_unknown: true, .. } => Unit::Any,
            Self { spelled, .. } => Unit::Known(spelled.into()),
        })
    }
}

/// Whether a word outside the table may be a unit. The first word of a unit is not short, as names of variables are.
fn is_thing(word: &str, first: bool) -> bool {
    let least = if first { 3 } else { 2 };
    let long = word.chars().nth(least - 1).is_some() || (first && word == "of");
    long && word.chars().all(|c| c.is_alphabetic() || c == '-') && !is_no_unit(word)
}

fn power_of(word: &str) -> Option<&'static str> {
    match word {
        "square" | "sq" | "sq." => Some("^2"),
        "cubic" | "cu" | "cu." => Some("^3"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(text: &str) -> Option<Unit> {
        Unit::parse(None, text)
    }

    #[test]
    fn spellings_of_a_unit_are_one() {
        let same = [
            [" dollars", " USD", "$", " bucks"],
            [" km/h", "km/h", " kilometers per hour", " kph"],
            [" cm^2", " square centimeters", " sq. cm", "cm^2"],
            [" degrees Celsius", "\u{b0}C", " \u{b0} C", "\u{b0} celsius"],
            [" ft.", " feet", " Foot", "ft"],
            [" m/s^2", " meters per s^2", " m / s^2", " metres/s^2"],
        ];
        for row in same {
            let first = unit(row[0]).unwrap_or_else(|| panic!("{}", row[0]));
            assert!(matches!(first, Unit::Known(_)), "{}", row[0]);
            assert!(row.iter().all(|other| unit(other) == Some(first.clone())), "{row:?}");
        }
        assert_eq!(Unit::parse(Some("$"), " per hour"), unit(" dollars/hour"));
        assert_eq!(Unit::parse(Some("$"), " a day"), unit(" dollars per day"));
        assert_eq!(Unit::parse(Some("$"), " dollars"), unit("$"));
    }

    #[test]
    fn known_units_agree_when_one_is_part_of_the_other() {
        for (left, right, agree) in [
            (" dollars per day", "$", true),
            (" km", " km/h", true),
            (" apples", " km/h", true),
            (" cents", "$", false),
            (" km/h", " km/s", false),
            (" m", " min", false),
            ("%", "$", false),
        ] {
            let (left, right) = (unit(left).unwrap(), unit(right).unwrap());
            assert!(left.agrees(&right) == agree && right.agrees(&left) == agree, "{left:?} {right:?}");
        }
    }

    #[test]
    fn things_agree_with_any_unit() {
        for text in
            ["", " apples", " red apples", " apples left", " of the cake", " \u{44f}\u{431}\u{43b}\u{43e}\u{43a}"]
        {
            assert_eq!(unit(text), Some(Unit::Any), "{text:?}");
        }
        for text in ["%", " %", " percent", " per cent", " percent of students"] {
            assert_eq!(unit(text), Some(Unit::Percent), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_unit_is_none() {
        let texts = [
            "x",
            " x",
            "m",
            "xyz",
            " apples and pears",
            " or so",
            " pm",
            " and a half",
            " cm^4",
            " apples^2",
            " square",
            " 2 pears",
            " apples, pears",
            " a b c d e f",
            "th",
            "!",
            "^2",
            " pi",
            " squared",
            " apples.",
            "$x",
            "s/t",
        ];
        for text in texts {
            assert_eq!(unit(text), None, "{text:?}");
        }
        assert_eq!(Unit::parse(Some("$"), "%"), None);
    }
}
