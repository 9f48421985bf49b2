//! Draws as Python's `random` module does, for examples that are those of another program.
//!
//! # Source
//! Matsumoto and Nishimura 1998, <https://doi.org/10.1145/272991.272995> (MT19937); CPython's `Lib/random.py` and
//! `Modules/_randommodule.c`, unchanged in this from 3.11 to 3.14.

const WORDS: usize = 624;
const AHEAD: usize = 397;
/// Up to so many, Python draws five from a copy of all; above, it draws again what it has drawn.
const LARGEST_POOL: usize = 21;

/// Python's `random.Random(seed)`.
#[derive(Debug, Clone)]
pub struct PythonRandom {
    state: [u32; WORDS],
    next: usize,
}

impl PythonRandom {
    /// The generator of a seed.
    #[must_use]
    pub fn new(seed: u32) -> Self {
        let mut state = [0; WORDS];
        state[0] = 19_650_218;
        for at in 1..WORDS {
            state[at] = Self::spread(state[at - 1]).wrapping_mul(1_812_433_253).wrapping_add(at as u32);
        }
        // The key is one word: its index is always 0.
        let mut at = 1;
        for round in 0..2 * WORDS - 1 {
            let before = Self::spread(state[at - 1]);
            state[at] = if round < WORDS {
                (state[at] ^ before.wrapping_mul(1_664_525)).wrapping_add(seed)
            } else {
                (state[at] ^ before.wrapping_mul(1_566_083_941)).wrapping_sub(at as u32)
            };
            at += 1;
            if at == WORDS {
                state[0] = state[WORDS - 1];
                at = 1;
            }
        }
        state[0] = 1 << 31;
        Self { state, next: WORDS }
    }

    fn spread(word: u32) -> u32 {
        word ^ (word >> 30)
    }

    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            for at in 0..WORDS {
                let joined = (self.state[at] & (1 << 31)) | (self.state[(at + 1) % WORDS] & !(1 << 31));
                let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[at] = self.state[(at + AHEAD) % WORDS] ^ (joined >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// A number in `0..bound`, for a bound of 1 to 2^31.
    fn below(&mut self, bound: usize) -> usize {
        let bits = usize::BITS - bound.leading_zeros();
        loop {
            let drawn = (self.word() >> (u32::BITS - bits)) as usize;
            if drawn < bound {
                return drawn;
            }
        }
    }

    /// `random.sample(range(count), 5)`: five different numbers below `count`, which must be at least 5.
    pub fn sample_five(&mut self, count: usize) -> [usize; 5] {
        let mut drawn = [0; 5];
        if count <= LARGEST_POOL {
            let mut pool: Vec<usize> = (0..count).collect();
            for (at, place) in drawn.iter_mut().enumerate() {
                *place = pool.swap_remove(self.below(count - at));
            }
            return drawn;
        }
        for at in 0..drawn.len() {
            let mut new = self.below(count);
            while drawn[..at].contains(&new) {
                new = self.below(count);
            }
            drawn[at] = new;
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // python3: import random; r = random.Random(1234); print([r.sample(range(n), 5) for n in (7473, 7473, 21, 22, 5)])
    // for _ in range(1000): r.sample(range(100), 5)
    // print(r.sample(range(100), 5))
    #[test]
    fn draws_are_pythons() {
        let mut random = PythonRandom::new(1234);
        let expected = [
            (7473, [6374, 3610, 957, 61, 742]),
            (7473, [7462, 6610, 4769, 286, 5501]),
            (21, [2, 3, 11, 7, 0]),
            (22, [0, 11, 20, 19, 15]),
            (5, [4, 3, 0, 2, 1]),
        ];
        for (count, drawn) in expected {
            assert_eq!(random.sample_five(count), drawn);
        }
        for _ in 0..1000 {
            random.sample_five(100);
        }
        assert_eq!(random.sample_five(100), [60, 9, 43, 46, 15]);
    }
}
