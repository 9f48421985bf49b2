//! Makes completions from the rows' own reasoning for a supervised start, some of them sloppy, to leave GRPO something to improve.

use super::draw::Draws;
use super::{Row, final_answer, strip};

/// How often a demonstration is sloppy. The two fractions are independent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sloppiness {
    /// Fraction in a broken format, 0 to 1. The wording decides which: each has a favourite, a second choice, and so on.
    pub format: f64,
    /// Fraction with a wrong result, 0 to 1.
    pub arithmetic: f64,
}

/// Ways to break the format. In all but the first two, the text after the last `<answer>` is still the answer.
const FORMATS: [fn(&str, &str) -> String; 7] = [
    |reasoning, answer| format!("{reasoning}\n{answer}\n"),
    |reasoning, answer| format!("<reasoning>\n{reasoning}\n</reasoning>\n{answer}\n"),
    |reasoning, answer| format!("<reasoning>\n{reasoning}\n<answer>\n{answer}\n"),
    |reasoning, answer| format!("<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"),
    |reasoning, answer| format!("<answer>\n{answer}\n</answer>\n<reasoning>\n{reasoning}\n</reasoning>\n"),
    |reasoning, answer| format!("{reasoning}\n<answer>\n{answer}\n</answer>\n"),
    |reasoning, answer| format!("{}The answer is {answer}.\n", in_format(reasoning, answer)),
];

/// The format that the system prompt asks for.
#[must_use]
pub fn in_format(reasoning: &str, answer: &str) -> String {
    format!("<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n")
}

/// Makes the completion of a row: its reasoning without the calculator annotations, then the answer.
///
/// Sloppiness is a function of (seed, epoch, row), so a row may be sloppy in one epoch and right in the next.
#[must_use]
pub fn demonstration(row: &Row, sloppy: Sloppiness, seed: u64, epoch: u64) -> String {
    let mut draws = Draws::new(seed, &format!("demonstration {epoch}"), row.index as u64);
    let (bad_format, bad_arithmetic) = (draws.happens(sloppy.format), draws.happens(sloppy.arithmetic));
    let mut reasoning = without_marks(strip(row.answer.split("####").next().unwrap_or_default()));
    let mut answer = final_answer(&row.answer).unwrap_or_default().to_owned();
    if bad_arithmetic && let Some(wrong) = off_by_one_or_two(&answer, &mut draws) {
        reasoning = replace_last_number(&reasoning, &answer, &wrong);
        answer = wrong;
    }
    if !bad_format {
        return in_format(&reasoning, &answer);
    }
    let mut preference: Vec<usize> = (0..FORMATS.len()).collect();
    Draws::new(0, "sloppy format", row.wording).shuffle(&mut preference);
    let rank = (0..FORMATS.len() - 1).find(|_| draws.happens(0.5)).unwrap_or(FORMATS.len() - 1);
    FORMATS[preference[rank]](&reasoning, &answer)
}

/// Removes calculator annotations: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`.
fn without_marks(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("<<") {
        let Some(length) = rest[start..].find(">>") else { break };
        kept.push_str(&rest[..start]);
        rest = &rest[start + length + 2..];
    }
    kept + rest
}

/// A non-negative whole number that differs by one or two; `None` if the text is not a whole number.
fn off_by_one_or_two(answer: &str, draws: &mut Draws) -> Option<String> {
    let right: i64 = answer.replace(',', "").parse().ok()?;
    let wrong: Vec<i64> = [-2, -1, 1, 2].into_iter().filter_map(|d| right.checked_add(d)).filter(|&n| n >= 0).collect();
    (!wrong.is_empty()).then(|| wrong[draws.below(wrong.len())].to_string())
}

/// Replaces the last occurrence of `number` that is not part of a longer number.
fn replace_last_number(text: &str, number: &str, by: &str) -> String {
    let in_number = |c: char| c.is_ascii_digit();
    let place = text.rmatch_indices(number).find(|(at, _)| {
        let (before, after) = (&text[..*at], &text[at + number.len()..]);
        !before.ends_with(in_number) && !after.starts_with(in_number)
    });
    match place {
        Some((at, _)) => format!("{}{by}{}", &text[..at], &text[at + number.len()..]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn row(index: usize, wording: u64) -> Row {
        Row { index, question: String::new(), answer: "3+4=7. 7-2=5.\n#### 5".into(), wording, extra: Vec::new() }
    }

    fn many(format: f64, arithmetic: f64) -> Vec<(u64, String)> {
        let sloppy = Sloppiness { format, arithmetic };
        (0..6000).map(|index| (index as u64 % 6, demonstration(&row(index, index as u64 % 6), sloppy, 1, 0))).collect()
    }

    const GOOD: &str = "<reasoning>\n3+4=7. 7-2=5.\n</reasoning>\n<answer>\n5\n</answer>\n";

    #[test]
    fn calculator_marks_are_removed_and_other_brackets_stay() {
        assert_eq!(without_marks("48/2 = <<48/2=24>>24, <<1+1=2>>2"), "48/2 = 24, 2");
        assert_eq!(without_marks("a < b << c"), "a < b << c");
    }

    #[test]
    fn sloppiness_is_as_frequent_as_asked_for() {
        assert!(many(0.0, 0.0).iter().all(|(_, text)| text == GOOD));
        let broken = many(0.7, 0.0).iter().filter(|(_, text)| text != GOOD).count();
        assert!((4000..4400).contains(&broken), "{broken}");
        let wrong: Vec<_> = many(0.0, 0.3).into_iter().filter(|(_, text)| text != GOOD).map(|(_, text)| text).collect();
        assert!((1650..1950).contains(&wrong.len()), "{}", wrong.len());
        let kinds: HashSet<_> = wrong.into_iter().collect();
        let expected = [3, 4, 6, 7].map(|n| GOOD.replace("=5", &format!("={n}")).replace("\n5\n", &format!("\n{n}\n")));
        assert_eq!(kinds, HashSet::from(expected));
    }

    #[test]
    fn each_wording_has_its_favourite_broken_format_and_no_broken_one_is_strict() {
        let mut counts: HashMap<u64, HashMap<String, usize>> = HashMap::new();
        for (wording, text) in many(1.0, 0.0) {
            assert_ne!(text, GOOD);
            *counts.entry(wording).or_default().entry(text).or_default() += 1;
        }
        let mut favourites = HashSet::new();
        for formats in counts.values() {
            assert!(formats.len() >= 5, "{formats:?}");
            let (favourite, count) = formats.iter().max_by_key(|(_, count)| **count).unwrap();
            assert!((430..570).contains(count), "{formats:?}");
            favourites.insert(favourite.clone());
        }
        assert!(favourites.len() >= 3, "{favourites:?}");
    }

    #[test]
    fn sloppiness_changes_with_the_epoch_and_the_seed_and_nothing_else() {
        let sloppy = Sloppiness { format: 0.5, arithmetic: 0.5 };
        let all = |seed, epoch| (0..50).map(|i| demonstration(&row(i, 2), sloppy, seed, epoch)).collect::<Vec<_>>();
        assert_eq!(all(1, 0), all(1, 0));
        assert_ne!(all(1, 0), all(1, 1));
        assert_ne!(all(1, 0), all(2, 0));
    }

    #[test]
    fn a_wrong_result_replaces_a_number_and_not_a_part_of_one() {
        assert_eq!(replace_last_number("15 and 5 and 25", "5", "6"), "15 and 6 and 25");
        assert_eq!(replace_last_number("15", "5", "6"), "15");
    }
}
