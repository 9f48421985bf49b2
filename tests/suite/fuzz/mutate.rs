//! Good inputs made bad, each a function of its number alone.

use grpo_pipes::numbers::rng::Stream;

/// The random choices of one input.
pub struct Dice {
    stream: Stream,
    input: u64,
    thrown: u64,
}

impl Dice {
    /// Of an input by the name of what it is for and its number.
    pub fn of(target: &str, input: u64) -> Self {
        Self { stream: Stream::new(0, 0, target), input, thrown: 0 }
    }

    /// A number from 0 to `sides`, without it.
    pub fn below(&mut self, sides: usize) -> usize {
        self.thrown += 1;
        (self.stream.uniform(self.input, self.thrown) * sides as f64) as usize
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Where something begins and ends in so many bytes; mostly short.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let from = self.below(len + 1);
        let longest = if self.below(4) == 0 { len } else { 16 };
        from..(from + self.below(longest + 1)).min(len)
    }
}

/// Numbers that are too large, too small, of the wrong kind, or none at all.
const NUMBERS: [&str; 16] = [
    "0",
    "-1",
    "1",
    "2",
    "7",
    "0.5",
    "-0",
    "1e999",
    "-1e308",
    "1e-320",
    "16777216",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "NaN",
];

/// What JSON is made of, and what it is not.
pub const JSON: [&str; 20] = [
    "null",
    "true",
    "{}",
    "[]",
    "\"\"",
    "\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\\u0000",
    "\\ud800",
    "\\",
    "\n",
    "\r\n",
    "[[[[[[[[",
    "{\"a\":{\"a\":{\"a\":",
    "\u{feff}",
];

/// One of the seeds with one to eight changes.
pub fn mutate(dice: &mut Dice, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let mut bytes = dice.pick(seeds).clone();
    for _ in 0..=dice.below(8) {
        change(dice, &mut bytes, seeds, words);
    }
    bytes
}

fn change(dice: &mut Dice, bytes: &mut Vec<u8>, seeds: &[Vec<u8>], words: &[&str]) {
    let range = dice.range(bytes.len());
    match dice.below(10) {
        0 if !bytes.is_empty() => {
            let at = dice.below(bytes.len());
            bytes[at] ^= 1 << dice.below(8);
        }
        1 => {
            let byte = dice.below(256) as u8;
            bytes.insert(range.start, byte);
        }
        2 => drop(bytes.drain(range)),
        3 => {
            let times = 1 << dice.below(if bytes.len() < 1 << 12 { 8 } else { 3 });
            let part = bytes[range.clone()].repeat(times);
            bytes.splice(range.end..range.end, part);
        }
        4 | 5 => {
            let word = dice.pick(words).bytes();
            bytes.splice(range, word);
        }
        6 => {
            let word = dice.pick(words).bytes();
            bytes.splice(range.start..range.start, word);
        }
        7 => bytes.truncate(range.start),
        8 => {
            let other = dice.pick(seeds);
            bytes.truncate(range.start);
            bytes.extend_from_slice(&other[dice.below(other.len() + 1)..]);
        }
        _ => replace_number(dice, bytes),
    }
}

/// Puts another number where the next one stands.
fn replace_number(dice: &mut Dice, bytes: &mut Vec<u8>) {
    let from = dice.below(bytes.len() + 1);
    let Some(at) = bytes[from..].iter().position(u8::is_ascii_digit) else { return };
    let at = from + at;
    let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = dice.pick(&NUMBERS).bytes();
    bytes.splice(at..at + digits, number);
}
