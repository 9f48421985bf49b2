//! Generates word problems in GSM8K's form, simple enough for a model of 124 thousand parameters.

use std::collections::HashSet;

use super::draw::Draws;
use super::wording::{TEMPLATES, Template};
use super::{Row, Split};
use crate::error::{Error, Result};

/// Every 8th question, by a hash of its text, is a test question.
const TEST_SHARE: u64 = 8;

/// The smallest limit on numbers that every template can meet: 2 * 2 + 1.
pub const LEAST_MAX_NUMBER: u32 = 5;

/// The most problems per split. Even numbers up to 5 give many times as many test questions, so the search for new ones stays
/// quick.
pub const MAX_COUNT: usize = 100_000;

/// What to generate.
#[derive(Debug, Clone, Copy)]
pub struct Problems {
    /// How many problems; at most [`MAX_COUNT`].
    pub count: usize,
    /// No number in a problem, its reasoning or its answer is larger; at least [`LEAST_MAX_NUMBER`].
    pub max_number: u32,
    /// The same (seed, index) always gives the same problem.
    pub seed: u64,
}

/// The split of a question. It depends on the text alone, so that no seed and no count turns a test question into a training
/// question. Validation questions are training questions here; the order of rows holds them out.
#[must_use]
pub fn split_of(question: &str) -> Split {
    let hash = blake3::derive_key("grpo-pipes gsm8k split 1", question.as_bytes());
    let head = u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes"));
    if head % TEST_SHARE == 0 { Split::Test } else { Split::Train }
}

/// Distinct problems of one split. A smaller count gives a prefix of a larger one.
///
/// # Errors
/// [`Error::Usage`] when the count is too large, or the largest number too small.
pub fn generate(problems: Problems, split: Split) -> Result<Vec<Row>> {
    if problems.max_number < LEAST_MAX_NUMBER {
        return Err(Error::Usage(format!("--max-number must be at least {LEAST_MAX_NUMBER}")));
    }
    if problems.count > MAX_COUNT {
        return Err(Error::Usage(format!("--generate makes at most {MAX_COUNT} problems")));
    }
    let wanted = if split == Split::Test { Split::Test } else { Split::Train };
    let mut rows = Vec::with_capacity(problems.count);
    let mut seen = HashSet::new();
    let mut candidates = 0..;
    while let Some(candidate) = candidates.next().filter(|_| rows.len() < problems.count) {
        let row = problem(problems, candidate, rows.len());
        if split_of(&row.question) == wanted && seen.insert(row.question.clone()) {
            rows.push(row);
        }
    }
    Ok(rows)
}

/// The candidate problem with a number; `index` is its place among the accepted ones.
fn problem(problems: Problems, candidate: u64, index: usize) -> Row {
    let mut draws = Draws::new(problems.seed, "problem", candidate);
    let template = &TEMPLATES[draws.below(TEMPLATES.len())];
    let (numbers, results) = numbers(template, i64::from(problems.max_number), &mut draws);
    let answer = format!("{}\n#### {}", reasoning(template, numbers, &results), results[results.len() - 1]);
    let question = template.tell(numbers, &mut draws);
    let wording = TEMPLATES.iter().position(|other| other.steps == template.steps).expect("it is one of them") as u64;
    Row { index, question, answer, wording, extra: Vec::new() }
}

/// Draws numbers for a template uniformly among those that fit, with the result of each step: at least 1 midway, at least 0 at the end.
fn numbers(template: &Template, max: i64, draws: &mut Draws) -> ([i64; 3], Vec<i64>) {
    let least = |name| if template.steps.contains(&('*', name)) { 2 } else { 1 };
    loop {
        let numbers = [draws.between(2, max), draws.between(least('b'), max), draws.between(least('c'), max)];
        let results = results(template, numbers);
        let (end, way) = results.split_last().expect("a template has a step");
        if (0..=max).contains(end) && way.iter().all(|result| (1..=max).contains(result)) {
            return (numbers, results);
        }
    }
}

fn results(template: &Template, numbers: [i64; 3]) -> Vec<i64> {
    let apply = |value: &mut i64, &(operation, operand): &(char, char)| {
        *value = match operation {
            '+' => *value + number(numbers, operand),
            '-' => *value - number(numbers, operand),
            _ => *value * number(numbers, operand),
        };
        Some(*value)
    };
    template.steps.iter().scan(numbers[0], apply).collect()
}

fn number(numbers: [i64; 3], name: char) -> i64 {
    match name {
        'a' => numbers[0],
        'b' => numbers[1],
        _ => numbers[2],
    }
}

/// `3+4=7. 7-2=5.`
fn reasoning(template: &Template, numbers: [i64; 3], results: &[i64]) -> String {
    let starts = std::iter::once(&numbers[0]).chain(results);
    let step = |((start, result), &(operation, operand)): ((&i64, &i64), &(char, char))| {
        format!("{start}{operation}{}={result}.", number(numbers, operand))
    };
    starts.zip(results).zip(&template.steps).map(step).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gsm8k::final_answer;

    fn some(count: usize, max_number: u32, seed: u64, split: Split) -> Vec<Row> {
        generate(Problems { count, max_number, seed }, split).unwrap()
    }

    #[test]
    fn no_test_question_is_a_training_question_for_any_seed_and_count() {
        let mut train = HashSet::new();
        for (seed, count) in [(1, 20_000), (2, 5_000), (3, 5_000)] {
            train.extend(some(count, 10, seed, Split::Train).into_iter().map(|row| row.question));
        }
        for seed in 1..=3 {
            let test = some(2_000, 10, seed, Split::Test);
            let distinct: HashSet<_> = test.iter().map(|row| &row.question).collect();
            assert_eq!(distinct.len(), 2_000);
            assert!(distinct.iter().all(|question| !train.contains(*question)));
        }
    }

    #[test]
    fn the_reasoning_is_true_and_no_number_is_above_the_limit() {
        for max in [LEAST_MAX_NUMBER, 10, 20, 999] {
            for row in some(3_000, max, 5, Split::Train) {
                let (steps, answer) = row.answer.split_once("\n#### ").unwrap();
                let mut last = 0;
                for step in steps.split(' ') {
                    let (left, right) = step.strip_suffix('.').unwrap().split_once('=').unwrap();
                    let at = left.find(['+', '-', '*']).unwrap();
                    let (x, y): (i64, i64) = (left[..at].parse().unwrap(), left[at + 1..].parse().unwrap());
                    last = match left.as_bytes()[at] {
                        b'+' => x + y,
                        b'-' => x - y,
                        _ => x * y,
                    };
                    assert_eq!(last, right.parse::<i64>().unwrap(), "{}", row.answer);
                    assert!([x, y, last].iter().all(|n| (0..=i64::from(max)).contains(n)), "{}", row.answer);
                }
                assert_eq!(last, answer.parse::<i64>().unwrap());
                assert_eq!(final_answer(&row.answer), Some(answer));
            }
        }
    }

    #[test]
    fn every_kind_of_problem_occurs_and_hardly_two_are_worded_alike() {
        let rows = some(3_000, 10, 1, Split::Train);
        let kinds: HashSet<_> = TEMPLATES.iter().map(|template| &template.steps).collect();
        assert_eq!(rows.iter().map(|row| row.wording).collect::<HashSet<_>>().len(), kinds.len());
        let worded = |row: &Row| row.question.replace(|c: char| c.is_ascii_digit(), "");
        assert!(rows.iter().map(worded).collect::<HashSet<_>>().len() > 2_900);
    }

    #[test]
    fn fewer_problems_are_a_prefix_of_more() {
        let texts = |rows: Vec<Row>| rows.into_iter().map(|row| row.question + &row.answer).collect::<Vec<_>>();
        let few = texts(some(100, 10, 9, Split::Test));
        assert_eq!(few, texts(some(400, 10, 9, Split::Test))[..100]);
        assert_ne!(few, texts(some(100, 10, 8, Split::Test)));
    }

    #[test]
    fn as_many_problems_as_are_allowed_are_found_even_of_the_smallest_numbers() {
        assert_eq!(some(MAX_COUNT, LEAST_MAX_NUMBER, 1, Split::Test).len(), MAX_COUNT);
        for (count, max_number) in [(MAX_COUNT + 1, 10), (1, LEAST_MAX_NUMBER - 1)] {
            let error = generate(Problems { count, max_number, seed: 1 }, Split::Train).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
        }
    }
}
