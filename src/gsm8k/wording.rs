//! Words generated problems: templates whose parts vary as different people would put them.

use std::sync::LazyLock;

use super::draw::Draws;
use super::people::{Person, relative};
use super::things::THINGS;

/// A template of a problem.
pub(super) struct Template {
    /// The operations, applied in turn from the first number on; each operand is one of the numbers.
    pub steps: Vec<(char, char)>,
    /// The question, in the notation that `wording.txt` explains.
    text: String,
}

/// The templates of one step and of two steps.
pub(super) static TEMPLATES: LazyLock<Vec<Template>> = LazyLock::new(|| {
    let lines = || include_str!("wording.txt").lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parts: Vec<_> = lines().filter_map(|line| line.split_once(" = ")).collect();
    lines().filter(|line| !line.contains(" = ")).map(|line| Template::parse(line, &parts)).collect()
});

/// One problem in this many looks hastily typed: without capitals, or without the question mark.
const HURRY: f64 = 0.1;

/// How often the name is repeated where a pronoun would do.
const NAME_AGAIN: f64 = 0.2;

impl Template {
    /// Parses `+b-c: text`.
    fn parse(line: &str, parts: &[(&str, &str)]) -> Self {
        let (steps, text) = line.split_once(": ").expect("steps, then a text");
        let steps: Vec<char> = steps.chars().collect();
        let mut text = text.to_owned();
        for (name, part) in parts.iter().rev() {
            text = text.replace(&format!("{{{name}}}"), part);
            for number in ["a", "b", "c"] {
                text = text.replace(&format!("{{{name}:{number}}}"), &part.replace('#', &format!("{{{number}}}")));
            }
        }
        Self { steps: steps.chunks(2).map(|step| (step[0], step[1])).collect(), text }
    }

    /// The question with these numbers.
    pub fn tell(&self, numbers: [i64; 3], draws: &mut Draws) -> String {
        let who = Person::draw(draws);
        let other = Person::other_than(&who, draws);
        let things = THINGS[draws.below(THINGS.len())];
        let mut text = choose(&self.text, &who, draws);
        for (name, value) in ["a", "b", "c"].into_iter().zip(numbers) {
            let thing = if value == 1 { things.0 } else { things.1 };
            text = text.replace(&format!("{{{name}o}}"), &format!("{value} {thing}"));
            text = text.replace(&format!("{{{name}}}"), &value.to_string());
        }
        text = text.replace("{f}", &relative(&who, draws));
        while text.contains("{he}") {
            let again = who.has_name && draws.happens(NAME_AGAIN);
            text = text.replacen("{he}", if again { &who.name } else { who.he }, 1);
        }
        let possessive = if who.has_name { format!("{}'s", who.name) } else { who.his.to_owned() };
        let words =
            [("{n}'s", &*possessive), ("{n}", &who.name), ("{m}", &other.name), ("{o}", things.1), ("{his}", who.his)];
        let text = words.iter().fold(text, |text, (mark, word)| text.replace(mark, word)).replace("{him}", who.him);
        in_style(&text, draws)
    }
}

/// Chooses among a text's alternatives, innermost first, and the verb forms that fit `who`.
fn choose(text: &str, who: &Person, draws: &mut Draws) -> String {
    let mut text = text.to_owned();
    while let Some(end) = text.find(')') {
        let start = text[..end].rfind('(').expect("what ends has begun");
        let ways: Vec<&str> = text[start + 1..end].split('|').collect();
        let way = ways[draws.below(ways.len())].to_owned();
        text.replace_range(start..=end, &way);
    }
    while let Some(end) = text.find(']') {
        let start = text[..end].rfind('[').expect("what ends has begun");
        let (third, rest) = text[start + 1..end].split_once('/').expect("two forms of a verb");
        let form = if who.is_third { third } else { rest }.to_owned();
        text.replace_range(start..=end, &form);
    }
    text
}

/// Normalises spaces and capitals, unless the problem looks hastily typed.
fn in_style(text: &str, draws: &mut Draws) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = [",", ".", "?", ";", ":"].iter().fold(text, |text, mark| text.replace(&format!(" {mark}"), mark));
    if draws.happens(HURRY) {
        return text.to_lowercase();
    }
    let mut styled = String::with_capacity(text.len());
    let mut begins = true;
    for c in text.chars() {
        if begins && c.is_alphanumeric() {
            styled.extend(c.to_uppercase());
            begins = false;
        } else {
            styled.push(c);
            begins |= matches!(c, '.' | '?');
        }
    }
    if draws.happens(HURRY) { styled.trim_end_matches('?').to_owned() } else { styled }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternatives_are_chosen_from_the_inside_out_and_verbs_agree() {
        let mut draws = Draws::new(1, "test", 0);
        let he = Person { name: "Tom".into(), he: "he", his: "his", him: "him", is_third: true, has_name: true };
        let i = Person { name: "I".into(), he: "I", his: "my", him: "me", is_third: false, has_name: false };
        let told: std::collections::BTreeSet<_> =
            (0..100).map(|_| choose("a(b|c(d|))e [has/have]", &he, &mut draws)).collect();
        assert_eq!(told.into_iter().collect::<Vec<_>>(), ["abe has", "acde has", "ace has"]);
        assert_eq!(choose("[has/have]", &i, &mut draws), "have");
    }

    #[test]
    fn every_template_is_whole_and_has_every_number_it_counts_with() {
        for template in TEMPLATES.iter() {
            let numbers = [7, 3, 2];
            for index in 0..200 {
                let told = template.tell(numbers, &mut Draws::new(1, "test", index));
                assert!(!told.contains(['{', '}', '(', ')', '[', ']', '|', '/']), "{told}");
                assert!(!told.contains("  ") && told.split(' ').count() <= 40, "{told}");
                let counted = template.steps.iter().filter(|(_, operand)| *operand != 'a').count();
                assert_eq!(told.matches(|c: char| c.is_ascii_digit()).count(), 1 + counted, "{told}");
            }
        }
    }
}
