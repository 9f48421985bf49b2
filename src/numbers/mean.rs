//! A running mean.

/// The mean of the numbers added so far, with the smallest and the largest.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mean {
    sum: f64,
    /// Numbers added.
    pub count: u64,
    /// Largest number; 0 before the first.
    pub max: f64,
    /// Smallest number; 0 before the first.
    pub min: f64,
}

impl Mean {
    /// Adds a number.
    pub fn add(&mut self, value: f64) {
        self.max = if self.count == 0 { value } else { self.max.max(value) };
        self.min = if self.count == 0 { value } else { self.min.min(value) };
        self.sum += value;
        self.count += 1;
    }

    /// The mean; `None` before the first number.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

impl FromIterator<f64> for Mean {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut mean = Self::default();
        values.into_iter().for_each(|value| mean.add(value));
        mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_of_nothing_is_none_and_extremes_may_be_negative() {
        assert_eq!(Mean::default().mean(), None);
        let mean: Mean = [-3.0, -1.0].into_iter().collect();
        assert_eq!((mean.mean(), mean.min, mean.max), (Some(-2.0), -3.0, -1.0));
    }
}
