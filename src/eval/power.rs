//! Computes how many problems it takes to show that one model is better than another.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::stats::Z;

/// Differences in accuracy that are of interest unless others are asked for.
pub const DIFFERENCES: [f64; 3] = [0.01, 0.02, 0.05];
/// The normal quantile of a power of 80 %.
const Z_POWER: f64 = 0.841_621_233_572_914_2;

/// The number of problems, solved by two models, among which McNemar's test at a level of 5 % (two-sided) finds a true difference with a
/// probability of 80 %.
///
/// `difference` is that of the two accuracies, above 0 and at most 1. `discordance` is the fraction of problems that only one of the two
/// solves or, where each was asked several times, the mean square of the difference in how often it is solved. Two models cannot differ
/// by more than they disagree, so it counts as at least `difference`.
///
/// # Source
/// Connor 1987, <https://doi.org/10.2307/2531961>.
#[must_use]
pub fn prompts_to_show(difference: f64, discordance: f64) -> u64 {
    let discordance = discordance.max(difference);
    let wanted = Z * discordance.sqrt() + Z_POWER * (discordance - difference.powi(2)).sqrt();
    (wanted / difference).powi(2).ceil() as u64
}

/// How many problems would show which differences.
#[derive(Debug, Clone, Serialize)]
pub struct Power {
    /// Pairs of a difference and a number of problems.
    pub prompts_to_show: Vec<(f64, u64)>,
}

impl Power {
    /// Of two models that disagree so often.
    pub(super) fn of(discordance: f64, differences: &[f64]) -> Self {
        let needed = differences.iter().map(|&difference| (difference, prompts_to_show(difference, discordance)));
        Self { prompts_to_show: needed.collect() }
    }

    /// Of two models of this accuracy that solve problems independently of each other: more than two that find the same problems hard.
    #[must_use]
    pub fn of_independent(accuracy: f64, differences: &[f64]) -> Self {
        Self::of(2.0 * accuracy * (1.0 - accuracy), differences)
    }
}

impl Display for Power {
    /// A line without its end.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let points = |difference: f64| (1e6 * difference).round() / 1e4;
        let needed: Vec<String> = self.prompts_to_show.iter().map(|(d, n)| format!("{} in {n}", points(*d))).collect();
        write!(out, "{:<20}{:>8}   points, among so many prompts (power 80 %)", "would show", needed.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::paired::sign_test;
    use crate::numbers::rng::Stream;

    // python3: from math import ceil; f = lambda d, p: ceil((1.959963984540054*p**.5 + 0.8416212335729142*(p-d*d)**.5)**2/d**2)
    // print(f(.05, .2), f(.02, .3), f(.1, .1), f(.2, .3))
    #[test]
    fn smaller_differences_and_more_disagreement_need_more_problems() {
        assert_eq!(
            [(0.05, 0.2), (0.02, 0.3), (0.1, 0.1), (0.2, 0.3)].map(|(d, p)| prompts_to_show(d, p)),
            [626, 5885, 77, 57]
        );
        assert_eq!(prompts_to_show(0.1, 0.01), prompts_to_show(0.1, 0.1));
    }

    /// The share of simulated comparisons in which the exact test finds the difference.
    fn power(problems: u64, difference: f64, discordance: f64) -> f64 {
        const STUDIES: u64 = 2000;
        let stream = Stream::new(7, 0, "power");
        let shows = |study: &u64| {
            let (mut better, mut worse) = (0, 0);
            for problem in 0..problems {
                let drawn = stream.uniform(*study, problem);
                better += u64::from(drawn < (discordance + difference) / 2.0);
                worse += u64::from(drawn > 1.0 - (discordance - difference) / 2.0);
            }
            sign_test(better, worse) < 0.05
        };
        (0..STUDIES).filter(shows).count() as f64 / STUDIES as f64
    }

    #[test]
    fn among_so_many_problems_four_of_five_comparisons_show_the_difference() {
        for (difference, discordance) in [(0.05, 0.2), (0.1, 0.5), (0.2, 0.3)] {
            let needed = prompts_to_show(difference, discordance);
            let [got, of_half] = [needed, needed / 2].map(|problems| power(problems, difference, discordance));
            // The exact test is a little less powerful than the one with the normal distribution.
            assert!((0.74..0.83).contains(&got) && of_half < 0.56, "{difference} {discordance}: {got} {of_half}");
        }
    }
}
