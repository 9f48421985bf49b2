//! Rewards of how a completion is written: its length, its repetitions, its nearness to a reference text.

use std::collections::HashSet;

/// Words of a phrase whose repetition counts.
const PHRASE: usize = 3;
/// Words of either text that [`similarity`] compares; it takes the square of their number.
const COMPARED: usize = 2000;

/// What is long, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// The longest completion.
    pub longest: usize,
    /// The last tokens of that, in which a completion gets too long.
    pub buffer: usize,
}

/// 0 up to `longest - buffer` tokens, then falling to -1 at `longest`, and -1 beyond.
///
/// # Source
/// Yu et al. 2025, eq. 13, <https://arxiv.org/abs/2503.14476> (DAPO); TRL's `get_soft_overlong_punishment`.
pub fn soft_overlong(tokens: usize, Lengths { longest, buffer }: Lengths) -> f64 {
    let begins = longest.saturating_sub(buffer);
    match tokens {
        tokens if tokens <= begins => 0.0,
        tokens if tokens <= longest => -((tokens - begins) as f64) / buffer as f64,
        _ => -1.0,
    }
}

/// The part of `longest` that a completion takes, as a cost: 0 to -1.
pub fn length(tokens: usize, Lengths { longest, .. }: Lengths) -> f64 {
    -(tokens as f64 / longest as f64).min(1.0)
}

/// The share of phrases of three words that occurred before, as a cost: 0 to -1.
///
/// # Source
/// Yeo et al. 2025, <https://arxiv.org/abs/2502.03373>, as Open R1's `get_repetition_penalty_reward` counts, with a penalty of -1.
pub fn repetition(text: &str) -> f64 {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    let phrases = words.windows(PHRASE);
    let total = phrases.len();
    if total == 0 {
        return 0.0;
    }
    let different = phrases.collect::<HashSet<_>>().len();
    different as f64 / total as f64 - 1.0
}

/// The F-measure of the longest common subsequence of words (ROUGE-L): 1 for the same words, 0 for none in common. Only the first 2,000
/// words of each text count.
///
/// # Source
/// Lin 2004, section 3, <https://aclanthology.org/W04-1013>.
pub fn similarity(text: &str, reference: &str) -> f64 {
    let words = |text: &str| -> Vec<String> { text.split_whitespace().take(COMPARED).map(str::to_lowercase).collect() };
    let (ours, theirs) = (words(text), words(reference));
    let mut common = vec![0usize; theirs.len() + 1]; // of what was read of ours with each beginning of theirs
    for word in &ours {
        let mut before = 0;
        for (at, other) in theirs.iter().enumerate() {
            let above = common[at + 1];
            common[at + 1] = if word == other { before + 1 } else { above.max(common[at]) };
            before = above;
        }
    }
    match ours.len() + theirs.len() {
        0 => 1.0,
        words => 2.0 * common[theirs.len()] as f64 / words as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // TRL: get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=8)(completion_ids=[[0] * n for n in (5, 12, 15, 20, 30)])
    #[test]
    fn what_gets_too_long_loses_step_by_step() {
        let lengths = Lengths { longest: 20, buffer: 8 };
        assert_eq!([5, 12, 15, 20, 30].map(|tokens| soft_overlong(tokens, lengths)), [0.0, 0.0, -0.375, -1.0, -1.0]);
        assert_eq!([0, 5, 20, 30].map(|tokens| length(tokens, lengths)), [0.0, -0.25, -1.0, -1.0]);
        assert_eq!(soft_overlong(3, Lengths { longest: 2, buffer: 0 }), -1.0);
    }

    // Open R1: get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)
    #[test]
    fn phrases_that_come_again_cost_their_share() {
        assert_eq!(repetition("one two"), 0.0);
        assert_eq!(repetition("one two three four"), 0.0);
        assert_eq!(repetition("a b c A B\nC"), -0.25); // a b c, b c a, c a b, a b c
        assert_eq!(repetition("x x x x x x x x x x x x"), -0.9);
    }

    #[test]
    fn similarity_is_that_of_the_longest_common_words_in_order() {
        assert_eq!(similarity("police killed the gunman", "police kill the gunman"), 0.75); // Lin's example
        assert_eq!(similarity("the gunman kill police", "police kill the gunman"), 0.5);
        assert_eq!((similarity("", ""), similarity("a", ""), similarity("A b", "a B")), (1.0, 0.0, 1.0));
    }
}
