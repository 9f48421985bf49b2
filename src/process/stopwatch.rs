//! Measures where the time of a loop goes.

use std::fmt;
use std::time::{Duration, Instant};

/// Time per part of a loop. The first round is not counted: it has the costs of starting up.
pub struct Stopwatch {
    /// The end of the first round.
    began: Option<Instant>,
    rounds: usize,
    parts: Vec<(&'static str, Duration)>,
}

impl Stopwatch {
    /// Starts at zero for each part; they are reported in this order.
    #[must_use]
    pub fn new<const N: usize>(parts: [&'static str; N]) -> Self {
        Self { began: None, rounds: 0, parts: parts.map(|part| (part, Duration::ZERO)).into() }
    }

    /// Runs `work` and counts its time for `part`.
    ///
    /// # Panics
    /// When [`Stopwatch::new`] named no such part.
    pub fn time<T>(&mut self, part: &str, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = work();
        self.add(part, began.elapsed());
        result
    }

    /// Counts time that was measured elsewhere for `part`.
    ///
    /// # Panics
    /// When [`Stopwatch::new`] named no such part.
    pub fn add(&mut self, part: &str, time: Duration) {
        let (_, spent) = self.parts.iter_mut().find(|(name, _)| *name == part).expect("a part that was named");
        *spent += time;
    }

    /// Marks the end of a round.
    pub fn end_round(&mut self) {
        if self.began.is_none() {
            self.began = Some(Instant::now());
            self.parts.iter_mut().for_each(|(_, spent)| *spent = Duration::ZERO);
        }
        self.rounds += 1;
    }

    /// The fraction of the time spent on each part; empty until the second round ends.
    #[must_use]
    pub fn shares(&self) -> Vec<(&'static str, f64)> {
        let Some(began) = self.began.filter(|_| self.rounds > 1) else { return Vec::new() };
        let whole = began.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        self.parts.iter().map(|(part, spent)| (*part, spent.as_secs_f64() / whole)).collect()
    }

    /// Passes the summary to `say` if there was more than one round.
    pub fn report(&self, say: &dyn Fn(&str)) {
        let words = self.to_string();
        if !words.is_empty() {
            say(&words);
        }
    }
}

/// One line; empty until the second round ends.
impl fmt::Display for Stopwatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(began) = self.began.filter(|_| self.rounds > 1) else { return Ok(()) };
        let whole = began.elapsed();
        let rest = whole.saturating_sub(self.parts.iter().map(|(_, spent)| *spent).sum());
        write!(f, "spent {:.3} s after the first step:", whole.as_secs_f64())?;
        for (part, spent) in &self.parts {
            write!(f, " {part} {:.3} s,", spent.as_secs_f64())?;
        }
        write!(f, " the rest {:.3} s", rest.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_does_not_count_and_what_nothing_was_spent_on_is_the_rest() {
        let mut stopwatch = Stopwatch::new(["training", "waiting"]);
        let sleep = |milliseconds| move || std::thread::sleep(Duration::from_millis(milliseconds));
        stopwatch.time("training", sleep(200));
        stopwatch.end_round();
        assert_eq!(stopwatch.to_string(), "");
        assert_eq!(stopwatch.time("waiting", || 7), 7);
        stopwatch.time("training", sleep(20));
        sleep(10)();
        stopwatch.end_round();
        let text = stopwatch.to_string();
        let second = |part: &str| -> f64 {
            let after = text.split_once(part).unwrap().1.trim_start();
            after.split(' ').next().unwrap().parse().unwrap()
        };
        let shares = stopwatch.shares();
        assert_eq!(shares.iter().map(|(part, _)| *part).collect::<Vec<_>>(), ["training", "waiting"]);
        assert!((0.1..0.99).contains(&shares[0].1) && shares[1].1 < 0.1, "{shares:?}");
        assert!(text.starts_with("spent 0."), "{text}");
        assert!((0.02..0.2).contains(&second("training")) && second("the rest") >= 0.01, "{text}");
    }
}
