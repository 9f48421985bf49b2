//! Decides which rows come in which order: holdout, shuffle, limit, epochs.

use super::Split;
use super::draw::Draws;
use crate::error::{Error, Result};

/// The order of a data set's rows, a pure function of these numbers and of how many rows there are.
#[derive(Debug, Clone, Copy)]
pub struct RowOrder<'a> {
    /// The split to take.
    pub split: Split,
    /// How many rows at the end of the shuffled train split are for validation.
    pub holdout: usize,
    /// Whether to shuffle the rows, each epoch differently.
    pub shuffle: bool,
    /// Seed of every shuffle.
    pub seed: u64,
    /// How often each row comes.
    pub epochs: u64,
    /// The most rows: the first ones of the first epoch, the same in each epoch.
    pub limit: Option<usize>,
    /// How much each row of the data set teaches. Rows with 0 are left out, and a limit takes the largest instead of the first.
    pub usefulness: Option<&'a [f64]>,
    /// Steps of training to fill, instead of whole epochs.
    pub steps: Option<Steps>,
}

/// Steps of training, and the rows of each.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    /// How many steps.
    pub count: usize,
    /// Rows per step, at least 1.
    pub rows: usize,
}

impl RowOrder<'_> {
    /// # Errors
    /// [`Error::Usage`] if options contradict each other.
    pub fn check(&self) -> Result<()> {
        let what = match (self.split, self.holdout) {
            (Split::Validation, 0) => "--split validation needs --holdout N: it is the rows that --holdout holds out",
            (Split::Test, 1..) => "--holdout is of the train split; the test split has none",
            _ => return Ok(()),
        };
        Err(Error::Usage(what.into()))
    }

    /// Whether rows come in the order of the file, so that none waits for another.
    #[must_use]
    pub fn is_natural(&self) -> bool {
        !self.shuffle && self.holdout == 0 && self.epochs == 1 && self.steps.is_none()
    }

    /// Indices of all rows to write among `count` rows, each with its epoch.
    ///
    /// With steps, an epoch gives whole ones only: its last few rows would share a step with the next epoch's, where the same problem
    /// could come twice.
    ///
    /// # Errors
    /// [`Error::Usage`] when the epochs do not fill the steps, and as [`RowOrder::epoch`].
    pub fn all(&self, count: usize) -> Result<Vec<(usize, u64)>> {
        let mut places = Vec::new();
        for epoch in 0..self.epochs {
            let mut rows = self.epoch(count, epoch)?;
            let whole = self.steps.map_or(rows.len(), |steps| rows.len() - rows.len() % steps.rows);
            rows.truncate(whole);
            places.extend(rows.into_iter().map(|place| (place, epoch)));
        }
        if let Some(Steps { count: steps, rows }) = self.steps {
            let wanted = steps.saturating_mul(rows);
            if places.len() < wanted {
                let (epochs, filled) = (self.epochs, places.len() / rows);
                let epoch = self.epoch(count, 0)?.len();
                return Err(Error::Usage(format!(
                    "{epochs} epochs of {epoch} problems are {filled} steps; set --epochs or --steps"
                )));
            }
            places.truncate(wanted);
        }
        Ok(places)
    }

    /// Indices of an epoch's rows among `count` rows.
    ///
    /// The holdout is the end of the first epoch's shuffle, whether or not the output is shuffled.
    ///
    /// # Errors
    /// [`Error::Usage`] when the holdout takes all rows.
    pub fn epoch(&self, count: usize, epoch: u64) -> Result<Vec<usize>> {
        let mut all: Vec<usize> = (0..count).collect();
        if self.shuffle || self.holdout > 0 {
            Draws::new(self.seed, "order", 0).shuffle(&mut all);
        }
        if self.holdout > 0 && self.holdout >= count {
            return Err(Error::Usage(format!("--holdout {} leaves nothing of {count} rows", self.holdout)));
        }
        let (train, validation) = all.split_at(count - self.holdout);
        let mut rows = if self.split == Split::Validation { validation } else { train }.to_vec();
        if !self.shuffle {
            rows.sort_unstable();
        }
        let limit = self.limit.unwrap_or(usize::MAX);
        if let Some(usefulness) = self.usefulness {
            keep_largest(&mut rows, usefulness, limit);
        }
        rows.truncate(limit);
        if self.shuffle && epoch > 0 {
            rows.sort_unstable();
            Draws::new(self.seed, "order", epoch).shuffle(&mut rows);
        }
        Ok(rows)
    }
}

/// Keeps at most `limit` rows, those with the largest values above 0, in their order; of equals the first.
fn keep_largest(rows: &mut Vec<usize>, values: &[f64], limit: usize) {
    rows.retain(|row| values[*row] > 0.0);
    let mut places: Vec<usize> = (0..rows.len()).collect();
    places.sort_by(|a, b| values[rows[*b]].total_cmp(&values[rows[*a]]));
    places.truncate(limit);
    places.sort_unstable();
    *rows = places.into_iter().map(|place| rows[place]).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(split: Split, holdout: usize, shuffle: bool) -> RowOrder<'static> {
        RowOrder { split, holdout, shuffle, seed: 4, epochs: 1, limit: None, usefulness: None, steps: None }
    }

    fn sorted(mut rows: Vec<usize>) -> Vec<usize> {
        rows.sort_unstable();
        rows
    }

    #[test]
    fn the_holdout_is_the_end_of_the_shuffled_train_split_and_never_trained_on() {
        let all = order(Split::Train, 0, true).epoch(100, 0).unwrap();
        let train = order(Split::Train, 30, true).epoch(100, 0).unwrap();
        let validation = order(Split::Validation, 30, true).epoch(100, 0).unwrap();
        assert_eq!([train.clone(), validation.clone()].concat(), all);
        assert_eq!(sorted(all), (0..100).collect::<Vec<_>>());
        assert_eq!(order(Split::Train, 30, false).epoch(100, 0).unwrap(), sorted(train.clone()));
        assert_eq!(order(Split::Validation, 30, false).epoch(100, 0).unwrap(), sorted(validation));
        assert_eq!(sorted(order(Split::Train, 30, true).epoch(100, 5).unwrap()), sorted(train));
    }

    #[test]
    fn each_epoch_has_the_same_rows_in_another_order() {
        let order = RowOrder { limit: Some(20), ..order(Split::Train, 10, true) };
        let epochs: Vec<_> = (0..3).map(|epoch| order.epoch(100, epoch).unwrap()).collect();
        assert_eq!(epochs[0].len(), 20);
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        assert!(epochs.iter().all(|rows| sorted(rows.clone()) == sorted(epochs[0].clone())));
    }

    #[test]
    fn steps_take_whole_ones_of_each_epoch_and_no_more_than_asked_for() {
        let order =
            |count| RowOrder { epochs: 3, steps: Some(Steps { count, rows: 4 }), ..order(Split::Train, 0, true) };
        let all = order(5).all(11).unwrap();
        let epochs: Vec<Vec<usize>> = (0..3).map(|epoch| order(5).epoch(11, epoch).unwrap()).collect();
        let of = |epoch: usize, count| epochs[epoch][..count].iter().map(move |row| (*row, epoch as u64));
        assert_eq!(all, of(0, 8).chain(of(1, 8)).chain(of(2, 4)).collect::<Vec<_>>());
        let refused = order(7).all(11).unwrap_err();
        assert_eq!(refused.to_string(), "3 epochs of 11 problems are 6 steps; set --epochs or --steps");
        assert_eq!(refused.exit_code(), 2);
        assert!(order(usize::MAX).all(11).is_err(), "a number of rows that no machine counts");
    }

    #[test]
    fn a_limit_takes_the_most_useful_rows_of_the_train_split_and_none_without_use() {
        let usefulness: Vec<f64> = (0..100).map(|row| f64::from(row % 10) / 40.0).collect();
        let plain = order(Split::Train, 30, true);
        let train = plain.epoch(100, 0).unwrap();
        let useful = RowOrder { usefulness: Some(&usefulness), ..plain };
        let kept: Vec<usize> = train.iter().copied().filter(|row| row % 10 > 0).collect();
        assert_eq!(useful.epoch(100, 0).unwrap(), kept);
        let best = RowOrder { limit: Some(10), ..useful };
        let mut found: Vec<usize> = train.iter().copied().filter(|row| row % 10 == 9).collect();
        assert!((2..10).contains(&found.len()), "the rest is of the next value");
        let rest = train.iter().copied().filter(|row| row % 10 == 8).take(10 - found.len());
        found.extend(rest);
        assert_eq!(sorted(best.epoch(100, 0).unwrap()), sorted(found.clone()));
        assert_eq!(sorted(best.epoch(100, 3).unwrap()), sorted(found));
    }

    #[test]
    fn the_order_depends_on_the_seed() {
        let one = order(Split::Train, 0, true);
        assert_ne!(one.epoch(100, 0).unwrap(), RowOrder { seed: 5, ..one }.epoch(100, 0).unwrap());
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        assert_eq!(order(Split::Validation, 0, false).check().unwrap_err().exit_code(), 2);
        assert_eq!(order(Split::Test, 5, false).check().unwrap_err().exit_code(), 2);
        assert_eq!(order(Split::Train, 5, false).epoch(5, 0).unwrap_err().exit_code(), 2);
    }
}
