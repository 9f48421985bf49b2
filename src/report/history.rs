//! Reads the metrics of a run, line by line, into thinned curves and the causes that `health` named.

use std::collections::HashMap;

use super::curve::Curve;
use crate::error::Result;
use crate::grpo::health::METRIC;
use crate::grpo::metrics::{self, Read};
use crate::lines::jsonl::Input;
use crate::run::{HELD_OUT, Run};

/// The most metrics that are shown; a program of the user's may name rewards at will.
const MAX_CURVES: usize = 500;

/// What the metrics of a run tell.
#[derive(Debug, Default)]
pub struct History {
    /// Curves by metric, over optimizer steps, in the order of their first appearance.
    pub curves: Vec<(String, Curve)>,
    index: HashMap<String, usize>,
    /// The step of the run that was finished last.
    pub step: u64,
    /// Causes by name: how many steps named it, and the first and the last of these.
    pub health: Vec<Cause>,
}

/// A cause that `health` named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Its name.
    pub name: String,
    /// How many lines name it.
    pub count: u64,
    /// The first of their steps.
    pub first: u64,
    /// The last of their steps.
    pub last: u64,
}

impl History {
    /// Reads the metrics of a run, which may be growing: a last line that breaks off is left out. Without a file there are no curves.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when a line before the last is damaged, [`crate::Error::Io`].
    pub fn read(run: &Run) -> Result<Self> {
        let mut history = Self::default();
        if !run.metrics().exists() {
            return Ok(history);
        }
        let mut input = Input::open(&run.metrics())?.peekable();
        while let Some(line) = input.next() {
            let added = line.and_then(|line| history.add(&line.text).map_err(|err| line.error(err.to_string())));
            match added {
                Err(_) if input.peek().is_none() => break, // it is being written
                added => added?,
            }
        }
        history.add_held_out(run);
        Ok(history)
    }

    /// Adds the evaluations so far, over optimizer steps like the rest.
    fn add_held_out(&mut self, run: &Run) {
        let updates = self.curve("step").and_then(Curve::newest).unwrap_or_default();
        let updates_per_step = if self.step > 0 { updates / self.step as f64 } else { 1.0 };
        for (step, accuracy) in run.held_out() {
            if let Some(place) = self.place(HELD_OUT) {
                self.curves[place].1.add(step as f64 * updates_per_step, accuracy);
            }
        }
    }

    fn add(&mut self, line: &str) -> serde_json::Result<()> {
        let (mut numbers, mut word) = (Vec::new(), None);
        metrics::read(line, &mut |name, value| match value {
            Read::Number(number) => numbers.push((self.place(name), number)),
            Read::Word(cause) if name == METRIC => word = Some(cause.into_owned()),
            Read::Word(_) => {}
        })?;
        let at = |history: &Self, name: &str| {
            let place = *history.index.get(name)?;
            numbers.iter().find(|(other, _)| *other == Some(place)).map(|(_, number)| *number)
        };
        let update = at(self, "step").unwrap_or_default();
        self.step = at(self, "policy_step").unwrap_or(update) as u64;
        for (place, number) in numbers {
            if let Some(place) = place {
                self.curves[place].1.add(update, number);
            }
        }
        word.into_iter().for_each(|name| self.note(name));
        Ok(())
    }

    /// The place of a curve; a new one for a new name while there is room.
    fn place(&mut self, name: &str) -> Option<usize> {
        if let Some(place) = self.index.get(name) {
            return Some(*place);
        }
        if self.curves.len() == MAX_CURVES {
            return None;
        }
        self.curves.push((name.to_owned(), Curve::default()));
        self.index.insert(name.to_owned(), self.curves.len() - 1);
        Some(self.curves.len() - 1)
    }

    fn note(&mut self, name: String) {
        let step = self.step;
        match self.health.iter_mut().find(|cause| cause.name == name) {
            Some(cause) => (cause.count, cause.last) = (cause.count + 1, step),
            None => self.health.push(Cause { name, count: 1, first: step, last: step }),
        }
    }

    /// The curve of a metric.
    #[must_use]
    pub fn curve(&self, name: &str) -> Option<&Curve> {
        self.index.get(name).map(|place| &self.curves[*place].1)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn history(text: &str) -> Result<History> {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        fs::write(run.metrics(), text).unwrap();
        History::read(&run)
    }

    #[test]
    fn a_run_in_progress_may_break_off_in_its_last_line_and_nowhere_else() {
        let line = |step: u64| format!("{{\"step\":{step},\"policy_step\":{step},\"reward\":0.5}}\n");
        let torn = history(&(line(1) + &line(2) + "{\"step\":3,\"rew")).unwrap();
        assert_eq!((torn.step, torn.curve("reward").unwrap().line().len()), (2, 2));
        let error = history(&(line(1) + "{\"step\":3,\"rew\n" + &line(3))).unwrap_err();
        assert!(error.exit_code() == 3 && error.to_string().contains("metrics.jsonl:2: "), "{error}");
        assert_eq!(history("").unwrap().step, 0);
        assert!(History::read(&Run::new(std::path::Path::new("no/such"))).unwrap().curves.is_empty());
    }

    #[test]
    fn causes_are_counted_with_their_steps() {
        let text: String = (1..=9)
            .map(|step| {
                let health = if step % 2 == 0 { ",\"health\":\"no_signal\"" } else { "" };
                format!("{{\"step\":{},\"policy_step\":{step},\"grad_norm\":null{health}}}\n", 2 * step)
            })
            .collect();
        let history = history(&text).unwrap();
        assert_eq!(history.health, [Cause { name: "no_signal".into(), count: 4, first: 2, last: 8 }]);
        assert_eq!(history.curve("policy_step").unwrap().line()[1], (4.0, 2.0), "curves are over optimizer steps");
        assert!(history.curve("grad_norm").is_none());
    }
}
