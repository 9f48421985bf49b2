//! Words of units and currencies, and words that are neither.

/// The table's spelling of a currency at the start of `text`, before a number, and the rest.
#[must_use]
pub fn currency(text: &str) -> Option<(&'static str, &str)> {
    let is_letter = |c: char| c.is_alphabetic() || c == '.';
    let len = text.find(|c| !is_letter(c)).unwrap_or(text.len());
    let len = if text[len..].starts_with('$') { len + 1 } else { len };
    let len = if len == 0 { text.chars().next().map_or(0, char::len_utf8) } else { len };
    let (name, rest) = text.split_at(len.min(text.len()));
    if name.len() > 4 {
        return None;
    }
    let name = name.to_lowercase();
    let row = UNITS[..CURRENCIES].iter().find(|row| row.contains(&name.trim_end_matches('.')))?;
    Some((row[0], rest))
}

/// The table's spelling of a word.
#[must_use]
pub fn known(word: &str) -> Option<&'static str> {
    UNITS.iter().find(|row| row.contains(&word)).map(|row| row[0])
}

/// Whether a word next to a number is something other than its unit.
#[must_use]
pub fn is_no_unit(word: &str) -> bool {
    NO_UNIT.contains(&word)
}

/// Number of currencies, which are the table's first rows.
const CURRENCIES: usize = 8;

/// Units in the spelling that comparisons use, with other spellings in lower case. `pound` is missing: it is a currency and a weight.
const UNITS: &[&[&str]] = &[
    &["$", "us$", "usd", "dollar", "dollars", "buck", "bucks"],
    &["\u{20ac}", "eur", "euro", "euros"],
    &["\u{a3}", "gbp"],
    &["\u{a5}", "jpy", "cny", "rmb", "yen", "yuan", "\u{5143}", "\u{5186}"],
    &["\u{20b9}", "inr", "rs", "rupee", "rupees"],
    &["\u{20a9}", "krw", "won", "\u{c6d0}"],
    &["\u{20bd}", "rub", "ruble", "rubles"],
    &["chf", "franc", "francs"],
    &["\u{a2}", "cent", "cents"],
    &["%", "percent", "pct"],
    &["\u{b0}", "degree", "degrees", "deg"],
    &["\u{b0}c", "c", "celsius"],
    &["\u{b0}f", "f", "fahrenheit"],
    &["mm", "millimeter", "millimeters", "millimetre", "millimetres"],
    &["cm", "centimeter", "centimeters", "centimetre", "centimetres"],
    &["m", "meter", "meters", "metre", "metres"],
    &["km", "kilometer", "kilometers", "kilometre", "kilometres"],
    &["in", "inch", "inches"],
    &["ft", "foot", "feet"],
    &["yd", "yard", "yards"],
    &["mi", "mile", "miles"],
    &["mi/h", "mph"],
    &["km/h", "kph", "kmh"],
    &["mg", "milligram", "milligrams"],
    &["g", "gram", "grams"],
    &["kg", "kilogram", "kilograms", "kilo", "kilos"],
    &["lb", "lbs"],
    &["oz", "ounce", "ounces"],
    &["ton", "tons", "tonne", "tonnes"],
    &["ml", "milliliter", "milliliters", "millilitre", "millilitres"],
    &["l", "liter", "liters", "litre", "litres"],
    &["gal", "gallon", "gallons"],
    &["s", "sec", "secs", "second", "seconds"],
    &["min", "mins", "minute", "minutes"],
    &["h", "hr", "hrs", "hour", "hours"],
    &["day", "days"],
    &["week", "weeks"],
    &["month", "months"],
    &["yr", "yrs", "year", "years"],
    &["unit", "units"],
];

/// Words next to a number that are not its unit, or that announce another number.
#[rustfmt::skip]
const NO_UNIT: &[&str] = &[
    "and", "or", "to", "und", "oder", "et", "ou", "with", "without", "plus", "minus", "times", "over", "by",
    "through", "between", "from", "until", "versus", "vs", "than", "not", "no", "is", "was", "are", "be", "but",
    "because", "if", "so", "then", "point", "half", "halves", "third", "thirds", "quarter", "quarters", "fourth",
    "fourths", "fifth", "fifths", "sixth", "sixths", "eighth", "eighths", "tenth", "tenths", "squared", "cubed",
    "factorial", "choose", "mod", "modulo", "remainder", "divided", "multiplied", "am", "pm", "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december", "a.m", "p.m", "o'clock",
    "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "inf", "infinity", "nan", "zero", "one", "two", "three",
    "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "thirty", "forty", "fifty",
    "hundred", "thousand", "million", "billion", "trillion", "hundreds", "thousands", "millions", "billions",
    "trillions", "dozen", "dozens", "hundredth", "hundredths", "thousandth", "thousandths", "millionth", "millionths",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_currency_stands_before_a_number() {
        for (text, want) in [
            ("$18", ("$", "18")),
            ("US$ 18", ("$", " 18")),
            ("Rs. 5", ("\u{20b9}", " 5")),
            ("\u{20ac}-1", ("\u{20ac}", "-1")),
        ] {
            assert_eq!(currency(text), Some(want), "{text}");
        }
        for text in ["", "18", "x$", "cent 5", "%5", "dollarsdollars", "\u{65e5}"] {
            assert_eq!(currency(text), None, "{text}");
        }
    }
}
