//! Finds texts that are nearly the same: MinHash proposes pairs, and their shared phrases decide.
//!
//! # Source
//! Broder 1997, On the resemblance and containment of documents; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3.

use std::collections::{BTreeSet, HashMap};

/// Words of a phrase.
const WORDS: usize = 3;
/// The fraction of phrases, of all that two texts have, from which on they are nearly the same.
const ALIKE: f64 = 0.8;
/// Texts are compared if they agree in all rows of a band: of those that are nearly the same, all but 2 in 10,000 do.
const BANDS: usize = 16;
const ROWS: usize = 4;

/// Texts so far.
#[derive(Default)]
pub struct NearDuplicates {
    /// The phrases of each, hashed.
    texts: Vec<BTreeSet<u64>>,
    /// Texts by band and by their hashes there.
    bands: HashMap<(usize, [u64; ROWS]), Vec<usize>>,
}

impl NearDuplicates {
    /// Adds a question with its answer, unless there is one that is nearly the same.
    pub fn is_new(&mut self, question: &str, answer: &str) -> bool {
        let text = phrases(&[question, answer]);
        let bands = bands(&text);
        let candidates: BTreeSet<usize> =
            bands.iter().filter_map(|band| self.bands.get(band)).flatten().copied().collect();
        if candidates.into_iter().any(|other| likeness(&text, &self.texts[other]) >= ALIKE) {
            return false;
        }
        for band in bands {
            self.bands.entry(band).or_default().push(self.texts.len());
        }
        self.texts.push(text);
        true
    }
}

/// The phrases of texts, hashed: so many words in a row, whatever stands between them and however they are capitalised. A text of fewer
/// words is one phrase.
fn phrases(texts: &[&str]) -> BTreeSet<u64> {
    let mut phrases = BTreeSet::new();
    for text in texts {
        let lower = text.to_lowercase();
        let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        for phrase in words.windows(WORDS.min(words.len()).max(1)) {
            let hash = blake3::hash(phrase.join(" ").as_bytes());
            phrases.insert(u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i])));
        }
    }
    phrases
}

/// Jaccard's index: the phrases in both, of those in either.
fn likeness(a: &BTreeSet<u64>, b: &BTreeSet<u64>) -> f64 {
    let both = a.intersection(b).count();
    let either = a.len() + b.len() - both;
    if either == 0 { 1.0 } else { both as f64 / either as f64 }
}

/// The least hash of the phrases under each of many hash functions, by band.
fn bands(phrases: &BTreeSet<u64>) -> [(usize, [u64; ROWS]); BANDS] {
    let least = |function: usize| phrases.iter().map(|&phrase| mixed(phrase, function as u64)).min().unwrap_or(0);
    std::array::from_fn(|band| (band, std::array::from_fn(|row| least(band * ROWS + row))))
}

/// A hash function for each number: the finaliser of splitmix64.
fn mixed(phrase: u64, function: u64) -> u64 {
    let x = phrase ^ (function + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUESTION: &str = "A baker fills 3 trays with 12 rolls each and then sells 20 rolls. How many rolls are left?";
    const ANSWER: &str = "Three trays hold 3 * 12 = 36 rolls. After the sale 36 - 20 = 16 rolls are left.";

    #[test]
    fn what_differs_in_layout_or_a_word_is_nearly_the_same_and_another_way_is_not() {
        let mut seen = NearDuplicates::default();
        assert!(seen.is_new(QUESTION, ANSWER));
        assert!(!seen.is_new(QUESTION, ANSWER));
        assert!(!seen.is_new(QUESTION, &ANSWER.to_uppercase().replace(". ", ".\n\n")));
        assert!(!seen.is_new(QUESTION, &ANSWER.replace("are left", "remain")));
        assert!(seen.is_new(QUESTION, "Of 36 rolls, 20 are sold, so the baker has 16."));
        assert!(seen.is_new(&QUESTION.replace("3", "5"), &ANSWER.replace("36", "60").replace("16", "40")));
        assert!(seen.is_new("", "") && !seen.is_new("", ""));
    }

    /// The pairs that MinHash proposes must hold those that comparing all with all finds.
    #[test]
    fn no_pair_is_missed() {
        let text = |i: u64| -> String {
            let word =
                |j: u64| format!("w{}", mixed(i / 4 * 100 + j + if j == i % 4 * 17 { 1000 } else { 0 }, 1) % 1000);
            (0..60).map(word).collect::<Vec<_>>().join(" ")
        };
        let texts: Vec<String> = (0..400).map(text).collect();
        let (mut seen, mut kept, mut dropped) = (NearDuplicates::default(), Vec::new(), 0);
        for text in &texts {
            let own = phrases(&[text, ""]);
            let is_new = !kept.iter().any(|other| likeness(&own, other) >= ALIKE);
            assert_eq!(seen.is_new(text, ""), is_new);
            if is_new { kept.push(own) } else { dropped += 1 }
        }
        assert!(dropped > 0 && kept.len() >= 100, "{dropped} {}", kept.len());
    }
}
