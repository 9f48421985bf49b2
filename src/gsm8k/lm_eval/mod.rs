//! Asks questions as lm-evaluation-harness's tasks `gsm8k` and `gsm8k_cot` do: one text of examples and the question, byte for byte.
//!
//! # Source
//! lm-evaluation-harness 0.4.13 (MIT), `lm_eval/tasks/gsm8k/*.yaml` and `lm_eval/api/samplers.py`, with its default seed.

use super::Row;
use super::python_random::PythonRandom;
use super::source::RowStream;
use crate::error::{Error, Result};
use crate::reward::lm_eval::LmEvalTask;

/// The examples of `gsm8k_cot`, which are those of Wei et al. 2022, <https://arxiv.org/abs/2201.11903>.
const COT_EXAMPLES: &str = include_str!("gsm8k_cot.txt");

/// The harness's `fewshot_random_seed`.
const SEED: u32 = 1234;

/// Turns the question of each row into the whole prompt. The examples of `gsm8k` depend on a row's place in the split, so `rows` must be
/// all of it, in its order; `train` opens the split that they come from.
///
/// # Errors
/// Those of `train`; [`Error::Usage`] when it has fewer than five rows.
pub fn ask(task: LmEvalTask, rows: RowStream, train: impl FnOnce() -> Result<RowStream>) -> Result<RowStream> {
    let mut prompt: Box<dyn FnMut(&str) -> String> = match task {
        LmEvalTask::Gsm8kCot => Box::new(|question| format!("{COT_EXAMPLES}Q: {question}\nA:")),
        LmEvalTask::Gsm8k => {
            let pool = train()?.collect::<Result<Vec<Row>>>()?;
            if pool.len() < 5 {
                return Err(Error::Usage(format!("gsm8k takes five examples, and the train split has {}", pool.len())));
            }
            let mut random = PythonRandom::new(SEED);
            Box::new(move |question| {
                let example = |place: usize| {
                    let Row { question, answer, .. } = &pool[place];
                    format!("Question: {question}\nAnswer: {answer}\n\n")
                };
                let examples: String = random.sample_five(pool.len()).into_iter().map(example).collect();
                format!("{examples}Question: {question}\nAnswer:")
            })
        }
    };
    Ok(Box::new(rows.map(move |row| row.map(|row| Row { question: prompt(&row.question), ..row }))))
}
