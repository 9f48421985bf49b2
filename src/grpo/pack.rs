//! Sequences of a step to micro-batches: whole sequences laid end to end, and where each target came from.

use crate::model::{Packed, Target};

/// Tokens to condition on, and tokens to learn.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// At least one token.
    pub prompt: &'a [u32],
    /// Each is a target.
    pub completion: &'a [u32],
}

impl Sequence<'_> {
    /// Tokens the model reads: the last one has no successor to predict.
    fn num_read(&self) -> usize {
        (self.prompt.len() + self.completion.len()).saturating_sub(1)
    }
}

/// Sequences that go through the model at once.
pub struct MicroBatch {
    /// What the model reads.
    pub packed: Packed,
    /// One for each token of the completions, in order.
    pub targets: Vec<Target>,
    /// Sequence, and index in its completion, of each target.
    pub origins: Vec<(usize, usize)>,
}

/// Cuts `members`, indices into `sequences`, into runs of at most `max_tokens`; a longer sequence is a run of its own, and one
/// without a target in none.
#[must_use]
pub fn cut(sequences: &[Sequence<'_>], members: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut runs: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for &member in members.iter().filter(|member| !sequences[**member].completion.is_empty()) {
        let length = sequences[member].num_read();
        match runs.last_mut() {
            Some(run) if tokens + length <= max_tokens => run.push(member),
            _ => {
                runs.push(vec![member]);
                tokens = 0;
            }
        }
        tokens += length;
    }
    runs
}

/// Lays a run of sequences end to end.
#[must_use]
pub fn pack(sequences: &[Sequence<'_>], run: &[usize]) -> MicroBatch {
    let mut batch =
        MicroBatch { packed: Packed { tokens: Vec::new(), starts: vec![0] }, targets: Vec::new(), origins: Vec::new() };
    for &member in run {
        let Sequence { prompt, completion } = sequences[member];
        let tokens = &mut batch.packed.tokens;
        let first_row = tokens.len() + prompt.len() - 1;
        let target = |(index, token): (usize, &u32)| Target { row: first_row + index, token: *token };
        batch.targets.extend(completion.iter().enumerate().map(target));
        batch.origins.extend((0..completion.len()).map(|index| (member, index)));
        tokens.extend(prompt.iter().chain(completion).take(sequences[member].num_read()));
        batch.packed.starts.push(tokens.len());
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCES: [Sequence<'static>; 4] = [
        Sequence { prompt: &[1, 2], completion: &[3, 4] },
        Sequence { prompt: &[5], completion: &[6] },
        Sequence { prompt: &[7], completion: &[] },
        Sequence { prompt: &[1, 2, 3], completion: &[4, 5, 6] },
    ];

    #[test]
    fn each_target_stands_after_the_row_of_its_predecessor() {
        let batch = pack(&SEQUENCES, &[1, 0]);
        assert_eq!(batch.packed.tokens, [5, 1, 2, 3]);
        assert_eq!(batch.packed.starts, [0, 1, 4]);
        let targets: Vec<_> = batch.targets.iter().map(|target| (target.row, target.token)).collect();
        assert_eq!(targets, [(0, 6), (2, 3), (3, 4)]);
        assert_eq!(batch.origins, [(1, 0), (0, 0), (0, 1)]);
    }

    #[test]
    fn runs_hold_whole_sequences_and_a_long_one_goes_alone() {
        assert_eq!(cut(&SEQUENCES, &[0, 1, 2, 3], 4), [vec![0, 1], vec![3]]);
        assert_eq!(cut(&SEQUENCES, &[3, 0, 1], 1), [vec![3], vec![0], vec![1]]);
        assert_eq!(cut(&SEQUENCES, &[0, 1, 3], 100), [vec![0, 1, 3]]);
    }
}
