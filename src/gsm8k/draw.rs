//! Makes random choices as a pure function of (seed, purpose, index): no generator state outlives a decision.

/// The choices of one (seed, purpose, index): BLAKE3's output stream under that key, read from its start.
pub struct Draws {
    stream: blake3::OutputReader,
}

impl Draws {
    /// Starts the choices for `index`. `purpose` says what they decide, so that two decisions about one row are independent.
    #[must_use]
    pub fn new(seed: u64, purpose: &str, index: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("grpo-pipes gsm8k 1");
        hasher.update(&seed.to_le_bytes()).update(&index.to_le_bytes()).update(purpose.as_bytes());
        Self { stream: hasher.finalize_xof() }
    }

    /// A number in `0..bound`; the bias is below `bound / 2^64`.
    pub fn below(&mut self, bound: usize) -> usize {
        let mut bytes = [0; 8];
        self.stream.fill(&mut bytes);
        ((u128::from(u64::from_le_bytes(bytes)) * bound as u128) >> 64) as usize
    }

    /// A number in `low..=high`.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as usize) as i64
    }

    /// Whether an event of this probability happens; never for 0, always for 1.
    pub fn happens(&mut self, probability: f64) -> bool {
        (self.below(1 << 53) as f64) < probability * (1u64 << 53) as f64
    }

    /// Shuffles in place (Fisher-Yates): every order is equally likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last + 1);
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64, purpose: &str, index: u64) -> Vec<usize> {
        let mut items: Vec<usize> = (0..50).collect();
        Draws::new(seed, purpose, index).shuffle(&mut items);
        items
    }

    #[test]
    fn each_part_of_the_key_changes_the_choices() {
        assert_eq!(order(1, "order", 0), order(1, "order", 0));
        assert_ne!(order(1, "order", 0), order(2, "order", 0));
        assert_ne!(order(1, "order", 0), order(1, "problem", 0));
        assert_ne!(order(1, "order", 0), order(1, "order", 1));
    }

    #[test]
    fn a_shuffle_loses_nothing_and_each_place_is_equally_likely() {
        let mut first = [0; 5];
        for index in 0..10_000 {
            let mut items = [0, 1, 2, 3, 4];
            Draws::new(7, "test", index).shuffle(&mut items);
            first[items[0]] += 1;
            items.sort_unstable();
            assert_eq!(items, [0, 1, 2, 3, 4]);
        }
        assert!(first.iter().all(|count| (1850..2150).contains(count)), "{first:?}");
    }

    #[test]
    fn a_probability_is_met_and_its_ends_are_exact() {
        let count = |p| (0..10_000).filter(|&index| Draws::new(3, "test", index).happens(p)).count();
        assert_eq!((count(0.0), count(1.0)), (0, 10_000));
        assert!((2850..3150).contains(&count(0.3)));
    }
}
