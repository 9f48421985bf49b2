//! Reads an export back and compares what it answers: a file that says something else than the checkpoint is found before anyone uses it.

use std::path::Path;

use crate::error::{Error, Result};
use crate::model::{DecodeRow, KvCache, Model};

/// Prompts to compare, and the most tokens of each and of its answer.
const PROMPTS: usize = 32;
const LENGTH: usize = 16;

/// Compares the likeliest tokens that two models answer to prompts of arbitrary tokens. `want` has the numbers that were to be written.
///
/// # Errors
/// [`Error::Numerics`] naming the file, when an answer differs.
pub(super) fn same_answers(path: &Path, got: &Model, want: &Model) -> Result<()> {
    let prompts = prompts(want);
    if answers(got, &prompts) == answers(want, &prompts) {
        return Ok(());
    }
    let path = path.display();
    Err(Error::Numerics(format!(
        "{path}: read back, the model does not answer as the checkpoint does; please report this"
    )))
}

/// Prompts of tokens from all over the vocabulary.
fn prompts(model: &Model) -> Vec<Vec<u32>> {
    let vocabulary = model.config().vocab_size;
    let most = LENGTH.min((model.config().positions() / 2).max(1));
    let token = |i: usize, j: usize| ((i * 7919 + j * 104_729 + i * j * 31) % vocabulary) as u32;
    (0..PROMPTS).map(|i| (0..1 + i % most).map(|j| token(i, j)).collect()).collect()
}

/// The likeliest tokens after each prompt.
fn answers(model: &Model, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let steps = LENGTH.min(model.config().positions() - prompts.iter().map(Vec::len).max().unwrap_or(0));
    let rows: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let mut caches: Vec<(KvCache, KvCache, Vec<u32>)> = model
        .prefill(&[], &rows)
        .into_iter()
        .map(|(prompt, logits)| (prompt, KvCache::new(model.config(), LENGTH), vec![likeliest(&logits)]))
        .collect();
    let vocabulary = model.config().vocab_size;
    let mut logits = vec![0.0; rows.len() * vocabulary];
    for _ in 1..steps {
        let mut rows: Vec<DecodeRow<'_>> = caches
            .iter_mut()
            .map(|(prompt, own, answer)| DecodeRow { token: *answer.last().expect("has its first token"), prompt, own })
            .collect();
        model.decode(&mut rows, &mut logits);
        for ((_, _, answer), logits) in caches.iter_mut().zip(logits.chunks_exact(vocabulary)) {
            answer.push(likeliest(logits));
        }
    }
    caches.into_iter().map(|(_, _, answer)| answer).collect()
}

fn likeliest(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == largest).unwrap_or_default() as u32
}
