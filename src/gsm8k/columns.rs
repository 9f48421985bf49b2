//! Finds the question and answer columns of a data set, and the answer inside its column.

use super::{final_answer, strip};
use crate::reward::math;

/// Names of question columns, in order of preference.
const QUESTIONS: [&str; 5] = ["question", "problem", "instruction", "query", "prompt"];

/// Names of answer columns, in order of preference.
const ANSWERS: [&str; 7] = ["answer", "solution", "final_answer", "output", "response", "ground_truth", "completion"];

/// The column that continues an `instruction`, as in Alpaca's data.
const INPUT: &str = "input";

/// The column with the worked solution, where the answer is the bare result.
const SOLUTION: &str = "solution";

/// A text that is longer than this, or has several lines, is prose and not an answer (characters).
const LONGEST_ANSWER: usize = 60;

/// The columns that the user asked for.
#[derive(Debug, Clone, Default)]
pub struct AskedColumns {
    /// Of the question.
    pub question: Option<String>,
    /// Of the answer.
    pub answer: Option<String>,
}

/// The columns of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    question: String,
    answer: String,
    /// Whether the user named the answer column: then its whole text may be the answer, however long.
    is_asked_for: bool,
}

/// The question and answer of a row.
#[derive(Debug, PartialEq, Eq)]
pub struct Said {
    /// The question.
    pub question: String,
    /// Reasoning, `####` and the answer; the column's text if no answer is found.
    pub answer: String,
    /// How the answer was found.
    pub found: Found,
}

/// Where an answer was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// After `####`.
    Marked,
    /// In the last `\boxed{}`.
    Boxed,
    /// The whole column.
    Whole,
    /// Nowhere.
    Nowhere,
}

impl Columns {
    /// The columns that were asked for, else the first known names for which `has` is true.
    ///
    /// # Errors
    /// A message that names what is missing.
    pub fn find(asked: &AskedColumns, has: impl Fn(&str) -> bool) -> Result<Self, String> {
        if asked.answer.is_none() && has("prompt") && has("reward_model") {
            return Err("prompts in verl's form, which `rollout` reads as they are, as JSONL".into());
        }
        let pick =
            |asked: &Option<String>, names: &[&str], what: &str, not: &str| match asked {
                Some(name) if has(name) => Ok(name.clone()),
                Some(name) => Err(format!("no field \"{name}\"")),
                None => names.iter().find(|name| **name != not && has(name)).map(|name| (*name).to_owned()).ok_or_else(
                    || format!("no {what}: none of the fields {}; name it with --{what}-field", names.join(", ")),
                ),
            };
        let question = pick(&asked.question, &QUESTIONS, "question", "")?;
        let answer = pick(&asked.answer, &ANSWERS, "answer", &question)?;
        Ok(Self { question, answer, is_asked_for: asked.answer.is_some() })
    }

    /// The columns whose content the prompt record takes over.
    #[must_use]
    pub fn taken(&self) -> [&str; 2] {
        [&self.question, if self.answer == SOLUTION { "" } else { &self.answer }]
    }

    /// Reads a row; `text` returns a column's text.
    ///
    /// # Errors
    /// The errors of `text`, and a missing column. An answer may be null.
    pub fn read<E>(
        &self,
        has: impl Fn(&str) -> bool,
        text: impl Fn(&str) -> Result<Option<String>, E>,
        missing: impl Fn(String) -> E,
    ) -> Result<Said, E> {
        let need = |name: &str| text(name)?.ok_or_else(|| missing(format!("no field \"{name}\"")));
        let mut question = need(&self.question)?;
        if self.question == "instruction"
            && let Some(input) = text(INPUT)?.filter(|input| !input.trim().is_empty())
        {
            question = format!("{question}\n\n{input}");
        }
        let written = if has(&self.answer) { text(&self.answer)?.unwrap_or_default() } else { need(&self.answer)? };
        let (found, answer) = self.result(&written);
        let Some(answer) = answer.filter(|_| found != Found::Marked) else {
            return Ok(Said { question, answer: written, found });
        };
        // In GSM8K's form. The reasoning for a bare result is in the solution column, if there is one.
        let beside = if found == Found::Whole && self.answer != SOLUTION { text(SOLUTION)? } else { None };
        let reasoning = match found {
            Found::Boxed => written.replace("####", ""),
            _ => beside.unwrap_or_default().replace("####", ""),
        };
        Ok(Said { question, answer: format!("{reasoning}\n#### {answer}"), found })
    }

    /// Where the answer stands in its column, and the answer.
    fn result<'a>(&self, text: &'a str) -> (Found, Option<&'a str>) {
        let is_whole = |whole: &str| {
            let is_short = whole.chars().count() <= LONGEST_ANSWER;
            // An empty or truncated box is not an answer, and neither is the text around it.
            (is_short || self.is_asked_for) && !whole.contains('\n') && !whole.contains("\\boxed")
        };
        let (found, answer) = match (final_answer(text), math::boxed(text)) {
            (Some(answer), _) => (Found::Marked, answer),
            (None, Some(answer)) => (Found::Boxed, strip(answer)),
            (None, None) if is_whole(strip(text)) => (Found::Whole, strip(text)),
            (None, None) => (Found::Nowhere, ""),
        };
        if answer.is_empty() { (Found::Nowhere, None) } else { (found, Some(answer)) }
    }

    /// A message that names the columns taken; `None` for GSM8K's own.
    #[must_use]
    pub fn describe(&self, found: Found) -> Option<String> {
        let how = match found {
            Found::Marked => "behind #### in",
            Found::Boxed => "in the last \\boxed of",
            Found::Whole | Found::Nowhere => "all of",
        };
        let is_usual = (&*self.question, &*self.answer, found) == ("question", "answer", Found::Marked);
        (!is_usual).then(|| format!("the question is \"{}\", the answer {how} \"{}\"", self.question, self.answer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(row: &[(&str, &str)], asked: &AskedColumns) -> Result<(String, String, Found), String> {
        let get = |name: &str| row.iter().find(|(other, _)| *other == name).map(|(_, text)| (*text).to_owned());
        let columns = Columns::find(asked, |name| get(name).is_some())?;
        let said = columns.read(|name| get(name).is_some(), |name| Ok(get(name)), |what| what)?;
        let answer = final_answer(&said.answer).filter(|answer| !answer.is_empty()).unwrap_or("-").to_owned();
        Ok((said.question, answer, said.found))
    }

    fn found(row: &[(&str, &str)]) -> (String, String, Found) {
        said(row, &AskedColumns::default()).unwrap()
    }

    #[test]
    fn the_columns_of_common_data_sets_are_found() {
        let expect = |answer: &str, found| ("Q".to_owned(), answer.to_owned(), found);
        let prose = "First one adds, and then there is much more to say about it than fits.";
        let rows: [(&[(&str, &str)], _); 12] = [
            (&[("question", "Q"), ("answer", "2+3=5\n#### 5")], expect("5", Found::Marked)),
            (&[("problem", "Q"), ("solution", "So $\\boxed{\\frac{1}{2}}$.")], expect("\\frac{1}{2}", Found::Boxed)),
            (&[("problem", "Q"), ("solution", prose), ("answer", "5")], expect("5", Found::Whole)),
            (
                &[("problem", "Q"), ("answer", "\\boxed{1} or \\boxed{{5}}")],
                expect("\\boxed{1} or \\boxed{{5}}", Found::Boxed),
            ),
            (&[("instruction", "Q"), ("input", " "), ("output", "1,200 ")], expect("1,200", Found::Whole)),
            (&[("question", "Q"), ("solution", "It is 7.\n#### 7")], expect("7", Found::Marked)),
            (&[("prompt", "Q"), ("completion", "blue")], expect("blue", Found::Whole)),
            (&[("question", "Q"), ("answer", prose)], expect("-", Found::Nowhere)),
            (&[("question", "Q"), ("answer", "")], expect("-", Found::Nowhere)),
            (&[("question", "Q"), ("answer", "Nothing.\n#### ")], expect("-", Found::Nowhere)),
            (&[("problem", "Q"), ("solution", "So $\\boxed{}$.")], expect("-", Found::Nowhere)),
            (&[("problem", "Q"), ("solution", "So $\\boxed{\\frac{1")], expect("-", Found::Nowhere)),
        ];
        for (row, expected) in rows {
            assert_eq!(found(row), expected, "{row:?}");
        }
        assert_eq!(found(&[("instruction", "Add."), ("input", "2 and 3"), ("output", "5")]).0, "Add.\n\n2 and 3");
    }

    #[test]
    fn columns_asked_for_count_and_missing_ones_are_named() {
        let row = [
            ("question", "Q"),
            ("task", "T"),
            ("answer", "5"),
            ("gold", "as long as one wants it to be, since somebody asked for it"),
        ];
        let asked = |question: &str, answer: &str| AskedColumns {
            question: Some(question.into()),
            answer: Some(answer.into()),
        };
        assert_eq!(said(&row, &asked("task", "gold")).unwrap().0, "T");
        assert_eq!(said(&row, &asked("task", "gold")).unwrap().2, Found::Whole);
        assert_eq!(said(&row, &asked("task", "x")).unwrap_err(), "no field \"x\"");
        let none = said(&[("text", "Q")], &AskedColumns::default()).unwrap_err();
        assert!(none.starts_with("no question: none of the fields question, problem,"), "{none}");
        assert!(
            said(&[("prompt", "Q")], &AskedColumns::default()).unwrap_err().ends_with("name it with --answer-field")
        );
        let verl = said(&[("data_source", "x"), ("prompt", "Q"), ("reward_model", "")], &AskedColumns::default());
        assert!(verl.unwrap_err().starts_with("prompts in verl's form"));
    }

    #[test]
    fn reasoning_is_what_stands_around_the_answer_or_in_the_solution_beside_it() {
        let columns =
            Columns::find(&AskedColumns::default(), |name| ["problem", "solution", "answer"].contains(&name)).unwrap();
        let get =
            |name: &str| -> Result<_, String> { Ok(Some(if name == "answer" { "5" } else { "2 + 3" }.to_owned())) };
        assert_eq!(columns.read(|_| true, get, |what| what).unwrap().answer, "2 + 3\n#### 5");
        assert_eq!(columns.taken(), ["problem", "answer"], "a solution is kept");
    }
}
