//! Random numbers as pure functions of (seed, step, prompt_id, sample_index, position).
//!
//! There is no generator state, so a completion does not depend on what else is sampled, in which order, or on how often a run was
//! killed and restarted.

/// The random numbers of one prompt in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
}

impl Stream {
    /// Takes as its key the first 64 bits of the blake3 hash of seed and step (little-endian) and the prompt's id.
    #[must_use]
    pub fn new(seed: u64, step: u64, prompt_id: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(&step.to_le_bytes()).update(prompt_id.as_bytes());
        let hash = hasher.finalize();
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|byte| hash.as_bytes()[4 * i + byte]));
        Self { key: [word(0), word(1)] }
    }

    /// The key, for a generator on another device.
    #[must_use]
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// A number in \[0, 1), a multiple of 2^-53, for the token at `position` of a completion, counted from 0.
    #[must_use]
    pub fn uniform(&self, sample_index: u64, position: u64) -> f64 {
        let counter = [sample_index as u32, (sample_index >> 32) as u32, position as u32, (position >> 32) as u32];
        let block = philox4x32(counter, self.key);
        let bits = u64::from(block[0]) << 32 | u64::from(block[1]);
        (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// Philox4x32-10: four random words for each counter and key.
///
/// # Source
/// Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, <https://doi.org/10.1145/2063384.2063405>.
pub(crate) fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    for _ in 0..10 {
        let (a, b) = (MULTIPLIERS[0] * u64::from(counter[0]), MULTIPLIERS[1] * u64::from(counter[2]));
        let high = |product: u64| (product >> 32) as u32;
        counter = [high(b) ^ counter[1] ^ key[0], b as u32, high(a) ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kat_vectors of Random123, <https://github.com/DEShawResearch/random123>.
    #[test]
    fn philox_gives_the_known_answers() {
        let zeros = philox4x32([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn every_argument_changes_the_draw() {
        let draw = |seed, step, prompt, sample, position| Stream::new(seed, step, prompt).uniform(sample, position);
        let first = draw(1, 2, "a", 3, 4);
        assert_eq!(first, draw(1, 2, "a", 3, 4));
        let others = [draw(0, 2, "a", 3, 4), draw(1, 0, "a", 3, 4), draw(1, 2, "b", 3, 4), draw(1, 2, "a", 0, 4)];
        assert!(others.iter().all(|&other| other != first));
        assert_ne!(draw(1, 2, "a", 3, 0), first);
        assert_ne!(draw(1, 2, "a", 3, 5), draw(1, 2, "a", 5, 3));
    }

    #[test]
    fn draws_are_uniform_over_samples_and_positions() {
        let stream = Stream::new(7, 0, "gsm8k/train/17");
        let mut counts = [0u32; 64];
        for i in 0..64_000 {
            let u = stream.uniform(i % 16, i / 16);
            assert!((0.0..1.0).contains(&u));
            counts[(u * 64.0) as usize] += 1;
        }
        let chi2: f64 = counts.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi2 < 103.4, "{chi2}: beyond the 99.9 % quantile of 63 degrees of freedom");
    }
}
