//! Packs the sequences of a step into micro-batches: complete sequences end to end, and where each target came from.

use crate::model::{Packed, Target};

/// A prompt and its completion.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Tokens to condition on; at least one.
    pub prompt: &'a [u32],
    /// Tokens to learn; each is a target.
    pub completion: &'a [u32],
}

impl Sequence<'_> {
    /// Tokens that the model reads after the sequence `before`: a shared prompt is read once, and the last token predicts nothing.
    fn num_read(&self, before: Option<&Self>) -> usize {
        let prompt = if before.is_some_and(|before| before.prompt == self.prompt) { 0 } else { self.prompt.len() };
        (prompt + self.completion.len()).saturating_sub(1)
    }
}

/// Sequences that pass through the model together.
#[derive(Default)]
pub struct MicroBatch {
    /// The tokens that the model reads.
    pub packed: Packed,
    /// One target per completion token, in order.
    pub targets: Vec<Target>,
    /// For each target, the index of its sequence and its index in that completion.
    pub origins: Vec<(usize, usize)>,
}

/// Cuts `members`, indices into `sequences`, into runs of at most `max_tokens`. A longer sequence is a run of its own; one without a
/// target is in none. A prompt shared by consecutive sequences counts once per run.
#[must_use]
pub fn cut(sequences: &[Sequence<'_>], members: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut runs: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for &member in members.iter().filter(|member| !sequences[**member].completion.is_empty()) {
        let before = runs.last().and_then(|run| run.last()).map(|&last| &sequences[last]);
        let length = sequences[member].num_read(before);
        match runs.last_mut() {
            Some(run) if tokens + length <= max_tokens => {
                run.push(member);
                tokens += length;
            }
            _ => {
                runs.push(vec![member]);
                tokens = sequences[member].num_read(None);
            }
        }
    }
    runs
}

/// Packs a run of sequences end to end. A prompt shared by consecutive sequences is packed once, and their completions continue it.
#[must_use]
pub fn pack(sequences: &[Sequence<'_>], run: &[usize]) -> MicroBatch {
    let mut batch = MicroBatch::default();
    for bundle in run.chunk_by(|&a, &b| sequences[a].prompt == sequences[b].prompt) {
        let prompt = sequences[bundle[0]].prompt;
        let prompt_end = batch.packed.tokens.len() + prompt.len();
        if let &[member] = bundle {
            let completion = sequences[member].completion;
            batch.add_targets(member, completion, prompt_end, prompt_end);
            batch.packed.lay(prompt.iter().chain(&completion[..completion.len() - 1]), None);
            continue;
        }
        let prefix = batch.packed.prefixes.len();
        batch.packed.lay(prompt, None);
        for &member in bundle {
            let completion = sequences[member].completion;
            let own_start = batch.packed.tokens.len();
            batch.add_targets(member, completion, prompt_end, own_start);
            if completion.len() > 1 {
                batch.packed.lay(&completion[..completion.len() - 1], Some(prefix));
            }
        }
    }
    batch
}

impl MicroBatch {
    /// Adds the targets of a completion: the first is predicted by the prompt's last row, the others by the rows from `own_start` on.
    fn add_targets(&mut self, member: usize, completion: &[u32], prompt_end: usize, own_start: usize) {
        for (index, &token) in completion.iter().enumerate() {
            let row = if index == 0 { prompt_end - 1 } else { own_start + index - 1 };
            self.targets.push(Target { row, token });
            self.origins.push((member, index));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCES: [Sequence<'static>; 6] = [
        Sequence { prompt: &[1, 2], completion: &[3, 4] },
        Sequence { prompt: &[5], completion: &[6] },
        Sequence { prompt: &[7], completion: &[] },
        Sequence { prompt: &[1, 2, 3], completion: &[4, 5, 6] },
        Sequence { prompt: &[1, 2, 3], completion: &[7] },
        Sequence { prompt: &[1, 2, 3], completion: &[8, 9] },
    ];

    fn targets(batch: &MicroBatch) -> Vec<(usize, u32)> {
        batch.targets.iter().map(|target| (target.row, target.token)).collect()
    }

    #[test]
    fn each_target_stands_after_the_row_of_its_predecessor() {
        let batch = pack(&SEQUENCES, &[1, 0]);
        assert_eq!(batch.packed.tokens, [5, 1, 2, 3]);
        assert_eq!(batch.packed.starts, [0, 1, 4]);
        assert_eq!(batch.packed.prefixes, [None, None]);
        assert_eq!(targets(&batch), [(0, 6), (2, 3), (3, 4)]);
        assert_eq!(batch.origins, [(1, 0), (0, 0), (0, 1)]);
    }

    #[test]
    fn a_shared_prompt_is_there_once() {
        let batch = pack(&SEQUENCES, &[1, 3, 4, 5]);
        assert_eq!(batch.packed.tokens, [5, 1, 2, 3, 4, 5, 8]);
        assert_eq!(batch.packed.starts, [0, 1, 4, 6, 7]);
        assert_eq!(batch.packed.prefixes, [None, None, Some(1), Some(1)], "one token alone is read by nobody");
        assert_eq!(targets(&batch), [(0, 6), (3, 4), (4, 5), (5, 6), (3, 7), (3, 8), (6, 9)]);
        assert_eq!(batch.origins, [(1, 0), (3, 0), (3, 1), (3, 2), (4, 0), (5, 0), (5, 1)]);
    }

    #[test]
    fn runs_hold_whole_sequences_and_a_long_one_goes_alone() {
        assert_eq!(cut(&SEQUENCES, &[0, 1, 2, 3], 4), [vec![0, 1], vec![3]]);
        assert_eq!(cut(&SEQUENCES, &[3, 0, 1], 1), [vec![3], vec![0], vec![1]]);
        assert_eq!(cut(&SEQUENCES, &[0, 1, 3], 100), [vec![0, 1, 3]]);
        assert_eq!(cut(&SEQUENCES, &[3, 4, 5], 6), [vec![3, 4, 5]], "a shared prompt counts once");
        assert_eq!(cut(&SEQUENCES, &[3, 4, 5], 5), [vec![3, 4], vec![5]], "and again in the next run");
    }
}
