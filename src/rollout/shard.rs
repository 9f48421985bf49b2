//! Cuts the prompts of a file into parts that several machines sample.

use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::lines::jsonl::Input;

/// The part of a file that one of several machines samples. The parts follow each other, so that their outputs, one after the other, are
/// the output for the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 1 on.
    number: u64,
    /// Of all.
    count: u64,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(number, count)| Some((number.parse().ok()?, count.parse().ok()?)));
        match parsed {
            Some((number, count)) if (1..=count).contains(&number) => Ok(Self { number, count }),
            _ => Err("not I/N with I from 1 to N, like 3/8".into()),
        }
    }
}

impl Shard {
    /// Its lines of a file, by their places among all. Parts differ by one line at most.
    ///
    /// # Errors
    /// [`Error::Usage`] for standard input, whose lines cannot be counted first; those of reading.
    pub fn lines_of(self, file: &Path) -> Result<Range<u64>> {
        if file == Path::new("-") {
            return Err(Error::Usage("--shard needs the prompts in a FILE, because it counts them first".into()));
        }
        let mut lines = 0u64;
        Input::open(file)?.try_for_each(|line| line.map(|_| lines += 1))?;
        let start = |number: u64| (u128::from(number) * u128::from(lines) / u128::from(self.count)) as u64;
        Ok(start(self.number - 1)..start(self.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_and_differ_by_one_line_at_most() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, "{}\n".repeat(23).as_bytes()).unwrap();
        for count in [1, 2, 5, 23, 30] {
            let mut end = 0;
            for number in 1..=count {
                let lines = Shard { number, count }.lines_of(file.path()).unwrap();
                assert_eq!(lines.start, end);
                assert!((23 / count..=23 / count + 1).contains(&(lines.end - lines.start)), "{number}/{count}");
                end = lines.end;
            }
            assert_eq!(end, 23);
        }
    }

    #[test]
    fn what_is_no_part_is_refused() {
        assert_eq!("3/8".parse(), Ok(Shard { number: 3, count: 8 }));
        for wrong in ["", "3", "0/8", "9/8", "1/0", "a/b", "-1/8"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }
}
