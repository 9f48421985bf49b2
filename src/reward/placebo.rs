//! Deals the rewards of each group to the wrong completions: the control of a training run.
//!
//! A run that still improves has learned from something other than its rewards.

use super::Scorer;
use crate::error::{Error, Result};
use crate::lines::jsonl::{Input, Output};
use crate::lines::record::Line;
use crate::numbers::rng::Stream;

/// A scorer whose total rewards are shuffled within each group.
#[derive(Debug, Clone)]
pub struct Placebo {
    /// Scores the completions.
    pub scorer: Scorer,
    /// Seed of the shuffle. Each group has a shuffle of its own, so that an interrupted run goes on with the same rewards.
    pub seed: u64,
}

/// The records of a group that is not whole yet.
#[derive(Default)]
struct Group {
    id: String,
    size: usize,
    scored: Vec<Line>,
    rewards: Vec<Option<f64>>,
}

impl Placebo {
    /// Scores all records of `input`. A group leaves when its last record is there.
    ///
    /// # Errors
    /// As [`Scorer::score_line`]; [`Error::Record`] and [`Error::Data`] when a group is not whole.
    pub fn score(&self, input: Input, out: &mut Output) -> Result<()> {
        let mut group = Group::default();
        for line in input {
            self.add(&mut group, line?)?;
            if group.scored.len() == group.size {
                self.deal(&mut group.rewards, &group.id);
                group.write(out)?;
                group = Group::default();
            }
        }
        match group.scored.len() {
            0 => Ok(()),
            found => Err(Error::Data(format!("the input ended after {found} of the {} in a group", group.size))),
        }
    }

    fn add(&self, group: &mut Group, line: Line) -> Result<()> {
        let record = line.record()?;
        let (id, size) = (record.get::<String>("group_id")?, record.get::<usize>("group_size")?);
        if group.scored.is_empty() {
            (group.id, group.size) = (id, size.max(1));
        } else if group.id != id {
            let found = group.scored.len();
            return Err(record.error(format!("group {} has {found} of its {} records", group.id, group.size)));
        }
        let mut json = Vec::new();
        self.scorer.score_line(&line, &mut json)?;
        let text = String::from_utf8(json).expect("records are text");
        let scored = Line { text, ..line };
        group.rewards.push(scored.record()?.get_optional("reward")?);
        group.scored.push(scored);
        Ok(())
    }

    /// Fisher and Yates' shuffle.
    fn deal(&self, rewards: &mut [Option<f64>], group_id: &str) {
        let stream = Stream::new(self.seed, 0, group_id);
        for last in (1..rewards.len()).rev() {
            let other = (stream.uniform(last as u64, 0) * (last + 1) as f64) as usize;
            rewards.swap(last, other);
        }
    }
}

impl Group {
    fn write(&self, out: &mut Output) -> Result<()> {
        for (line, reward) in self.scored.iter().zip(&self.rewards) {
            let mut record = line.record()?;
            record.set("reward", reward);
            out.write_line(&record.to_json())?;
        }
        out.flush()
    }
}
