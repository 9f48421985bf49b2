//! Turns rewards into advantages: how much better a completion did than the others of its group.

/// Added to the standard deviation before dividing by it, as TRL does.
const STD_EPSILON: f64 = 1e-4;

/// What the difference between a reward and its group's mean is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ScaleRewards {
    /// The standard deviation of the completion's own group
    Group,
    /// The standard deviation of all rewards of the step
    Batch,
    /// Nothing (Dr. GRPO)
    None,
}

/// The advantages of a step, and statistics of its rewards.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    /// One list per group, one number per completion; 0 for a completion without a reward.
    pub groups: Vec<Vec<f64>>,
    /// Mean of all rewards.
    pub reward_mean: f64,
    /// Standard deviation of all rewards.
    pub reward_std: f64,
    /// Fraction of completions whose group's (or step's) rewards are all equal, so that nothing is learned from them.
    pub zero_std_frac: f64,
}

/// Advantages of each completion within its group.
///
/// A completion without a reward does not enter means and deviations. Deviations have Bessel's correction; the advantage in a group of
/// one is 0. Equal rewards give exactly 0.
///
/// # Source
/// Shao et al. 2024, section 4.1.2, <https://arxiv.org/abs/2402.03300>; TRL `GRPOTrainer`, `scale_rewards`.
#[must_use]
pub fn advantages(rewards: &[Vec<Option<f64>>], scale: ScaleRewards) -> Advantages {
    let batch = Spread::of(rewards.iter().flatten());
    let spreads: Vec<Spread> = rewards.iter().map(Spread::of).collect();
    let deviation = |group: usize| match scale {
        ScaleRewards::Batch => batch.std,
        _ => spreads[group].std,
    };
    let scaled = |group: usize, reward: f64| {
        let centred = reward - spreads[group].mean;
        match scale {
            ScaleRewards::None => centred,
            _ => centred / (deviation(group) + STD_EPSILON),
        }
    };
    let of_group = |(index, group): (usize, &Vec<Option<f64>>)| {
        group.iter().map(|reward| reward.map_or(0.0, |reward| scaled(index, reward))).collect()
    };
    let completions: usize = rewards.iter().map(Vec::len).sum();
    let over_completions = |of_group: &dyn Fn(usize) -> f64| {
        let sum: f64 = rewards.iter().enumerate().map(|(index, group)| group.len() as f64 * of_group(index)).sum();
        sum / completions.max(1) as f64
    };
    Advantages {
        groups: rewards.iter().enumerate().map(of_group).collect(),
        reward_mean: batch.mean,
        reward_std: batch.std,
        zero_std_frac: over_completions(&|group| f64::from(deviation(group) == 0.0)),
    }
}

/// Mean and standard deviation, with Bessel's correction, of numbers some of which may be unknown.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// Of the known ones; 0 if there are none.
    pub mean: f64,
    /// Exactly 0 if they are all equal.
    pub std: f64,
}

impl Spread {
    /// Of the known ones among `rewards`.
    pub fn of<'a>(rewards: impl IntoIterator<Item = &'a Option<f64>>) -> Self {
        let known: Vec<f64> = rewards.into_iter().flatten().copied().collect();
        let Some(&first) = known.first() else {
            return Self { mean: 0.0, std: 0.0 };
        };
        if known.iter().all(|reward| *reward == first) {
            return Self { mean: first, std: 0.0 }; // a computed mean may be off by a rounding error, which would be an advantage
        }
        let count = known.len() as f64;
        let mean = known.iter().sum::<f64>() / count;
        let squares: f64 = known.iter().map(|reward| (reward - mean).powi(2)).sum();
        Self { mean, std: (squares / (count - 1.0)).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(rewards: &[f64]) -> Vec<Option<f64>> {
        rewards.iter().copied().map(Some).collect()
    }

    #[test]
    fn one_success_in_four_is_worth_one_and_a_half_deviations() {
        let found = advantages(&[known(&[1.0, 0.0, 0.0, 0.0])], ScaleRewards::Group);
        for (found, expected) in found.groups[0].iter().zip([1.4997, -0.4999, -0.4999, -0.4999]) {
            assert!((found - expected).abs() < 1e-4);
        }
        assert_eq!((found.reward_mean, found.reward_std, found.zero_std_frac), (0.25, 0.5, 0.0));
    }

    #[test]
    fn equal_rewards_teach_exactly_nothing() {
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            let found = advantages(&[known(&[0.1; 3]), known(&[2.875; 7])], scale);
            assert!(found.groups.iter().flatten().all(|advantage| *advantage == 0.0), "{scale:?}");
        }
        assert_eq!(advantages(&[known(&[0.1; 3])], ScaleRewards::Group).zero_std_frac, 1.0);
    }

    #[test]
    fn a_missing_reward_changes_nobody_elses_advantage() {
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            let whole = advantages(&[known(&[3.0, 1.0, 0.5]), known(&[2.0, 0.0])], scale);
            let mut with_gap = known(&[3.0, 1.0, 0.5]);
            with_gap.insert(1, None);
            let found = advantages(&[with_gap, known(&[2.0, 0.0])], scale);
            assert_eq!(found.groups[0].remove_gap(), whole.groups[0]);
            assert_eq!(found.groups[0][1], 0.0);
            assert_eq!(found.reward_mean, whole.reward_mean);
        }
    }

    trait RemoveGap {
        fn remove_gap(&self) -> Vec<f64>;
    }

    impl RemoveGap for Vec<f64> {
        fn remove_gap(&self) -> Vec<f64> {
            [&self[..1], &self[2..]].concat()
        }
    }

    #[test]
    fn a_group_of_one_or_of_no_rewards_has_advantage_zero() {
        let found = advantages(&[known(&[5.0]), vec![None, None], known(&[1.0, 2.0])], ScaleRewards::Group);
        assert_eq!(found.groups[0], [0.0]);
        assert_eq!(found.groups[1], [0.0, 0.0]);
        assert_eq!(found.zero_std_frac, 0.6);
    }

    #[test]
    fn the_batch_deviation_is_shared_and_no_scaling_leaves_differences() {
        let rewards = [known(&[1.0, 3.0]), known(&[10.0, 10.0])];
        assert_eq!(advantages(&rewards, ScaleRewards::None).groups[0], [-1.0, 1.0]);
        let batch = advantages(&rewards, ScaleRewards::Batch);
        let std = (66.0f64 / 3.0).sqrt(); // mean 6: 25 + 9 + 16 + 16
        assert!((batch.groups[0][1] - 1.0 / (std + 1e-4)).abs() < 1e-12);
        assert!((batch.reward_std - std).abs() < 1e-12);
    }
}
