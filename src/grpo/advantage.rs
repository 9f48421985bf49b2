//! Turns rewards into advantages: how much better a completion did than the others of its group.

use std::borrow::Borrow;
use std::str::FromStr;

use crate::error::Result;
use crate::grpo::groups::{self, Group};

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

/// Configures advantages.
#[derive(Debug, Clone, clap::Args)]
pub struct AdvantageConfig {
    /// What the difference between a reward and its group's mean is divided by
    #[arg(long, value_enum, value_name = "BY", default_value = "group")]
    pub scale_rewards: ScaleRewards,
    /// Compare a reward with the mean of the others of its group, without itself (RLOO)
    #[arg(long)]
    pub leave_one_out: bool,
    /// Normalise each of the records' `rewards` within its group before these weigh and add them, and the sums over the step (GDPO):
    /// NAME=WEIGHT,... The records' `reward` is then only reported
    #[arg(long, value_name = "WEIGHTS", conflicts_with_all = ["scale_rewards", "leave_one_out"])]
    pub normalize_then_sum: Option<PartWeights>,
}

/// Weights of parts of the rewards, by name.
#[derive(Debug, Clone, PartialEq)]
pub struct PartWeights(pub Vec<(String, f64)>);

impl FromStr for PartWeights {
    type Err = String;

    /// Reads `name=weight,...`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut weights: Vec<(String, f64)> = Vec::new();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').ok_or_else(|| format!("\"{part}\" is not name=weight"))?;
            let (name, weight) = (name.trim(), weight.trim());
            let weight = weight.parse().ok().filter(|weight: &f64| weight.is_finite());
            let weight = weight.ok_or_else(|| format!("the weight of {name} is not a number"))?;
            if weights.iter().any(|(other, _)| other == name) {
                return Err(format!("{name} occurs twice"));
            }
            weights.push((name.to_owned(), weight));
        }
        Ok(Self(weights))
    }
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

impl AdvantageConfig {
    /// Advantages of each completion of a step.
    ///
    /// # Errors
    /// [`crate::Error::Record`] when a completion with a reward has none of the parts that [`AdvantageConfig::normalize_then_sum`] names.
    pub fn of<G: Borrow<Group>>(&self, groups: &[G]) -> Result<Advantages> {
        let rewards = Self::by_group(groups, groups::completions(groups).map(|one| one.reward));
        let Some(PartWeights(weights)) = &self.normalize_then_sum else {
            return Ok(advantages(&rewards, self.scale_rewards, self.leave_one_out));
        };
        let mut parts = groups::parts(groups);
        let mut weighted = Vec::new();
        for (name, weight) in weights {
            let values = parts.iter_mut().find(|(other, _)| other == name).map(|(_, values)| std::mem::take(values));
            weighted.push((Self::by_group(groups, values.unwrap_or_default().into_iter()), *weight));
        }
        let has_part = |group: usize, one: usize| weighted.iter().any(|(values, _)| values[group][one].is_some());
        for (group, completions) in groups.iter().map(|group| &group.borrow().completions).enumerate() {
            let bare = completions.iter().enumerate().find(|(one, it)| it.reward.is_some() && !has_part(group, *one));
            if let Some((_, completion)) = bare {
                let names = weights.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
                return Err(
                    completion.error(format!("\"rewards\" has none of {names}, which --normalize-then-sum adds"))
                );
            }
        }
        Ok(normalized_then_summed(&rewards, &weighted))
    }

    fn by_group<G: Borrow<Group>>(
        groups: &[G],
        mut values: impl Iterator<Item = Option<f64>>,
    ) -> Vec<Vec<Option<f64>>> {
        let of_group = |group: &G| group.borrow().completions.iter().map(|_| values.next().flatten()).collect();
        groups.iter().map(of_group).collect()
    }
}

/// Advantages of each completion within its group.
///
/// A completion without a reward does not enter means and deviations. Deviations have Bessel's correction; the advantage in a group of
/// one is 0. Equal rewards give exactly 0. With `leave_one_out` a reward is compared with the mean of the others, which is n / (n - 1)
/// times as far away.
///
/// # Source
/// Shao et al. 2024, section 4.1.2, <https://arxiv.org/abs/2402.03300>; TRL `GRPOTrainer`, `scale_rewards`; Ahmadian et al. 2024,
/// <https://arxiv.org/abs/2402.14740> (RLOO).
#[must_use]
pub fn advantages(rewards: &[Vec<Option<f64>>], scale: ScaleRewards, leave_one_out: bool) -> Advantages {
    let batch = Spread::of(rewards.iter().flatten());
    let spreads: Vec<Spread> = rewards.iter().map(Spread::of).collect();
    let deviation = |group: usize| match scale {
        ScaleRewards::Batch => batch.std,
        _ => spreads[group].std,
    };
    let scaled = |group: usize, reward: f64| {
        let centred = reward - spreads[group].mean;
        let known = rewards[group].iter().flatten().count() as f64;
        let centred = if leave_one_out && known > 1.0 { centred * known / (known - 1.0) } else { centred };
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

/// Advantages from parts of the rewards with their weights: each part is normalised within its group, the weighted sum over the step.
/// `rewards` are only reported, and say which completions have one.
///
/// # Source
/// Liu et al. 2026, <https://arxiv.org/abs/2601.05242> (GDPO); TRL `GRPOTrainer`, `multi_objective_aggregation="normalize_then_sum"`.
fn normalized_then_summed(rewards: &[Vec<Option<f64>>], parts: &[(Vec<Vec<Option<f64>>>, f64)]) -> Advantages {
    let spreads: Vec<Vec<Spread>> = parts.iter().map(|(values, _)| values.iter().map(Spread::of).collect()).collect();
    let sum = |group: usize, one: usize| {
        let normalized = parts.iter().zip(&spreads).filter_map(|((values, weight), spreads)| {
            let Spread { mean, std } = spreads[group];
            Some(weight * (values[group][one]? - mean) / (std + STD_EPSILON))
        });
        rewards[group][one].map(|_| normalized.sum::<f64>())
    };
    let sums: Vec<Vec<Option<f64>>> =
        (0..rewards.len()).map(|group| (0..rewards[group].len()).map(|one| sum(group, one)).collect()).collect();
    let (reported, all) = (Spread::of(rewards.iter().flatten()), Spread::of(sums.iter().flatten()));
    let normalize = |sum: &Option<f64>| sum.map_or(0.0, |sum| (sum - all.mean) / (all.std + STD_EPSILON));
    Advantages {
        groups: sums.iter().map(|group| group.iter().map(normalize).collect()).collect(),
        reward_mean: reported.mean,
        reward_std: reported.std,
        zero_std_frac: f64::from(all.std == 0.0),
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
        let found = advantages(&[known(&[1.0, 0.0, 0.0, 0.0])], ScaleRewards::Group, false);
        for (found, expected) in found.groups[0].iter().zip([1.4997, -0.4999, -0.4999, -0.4999]) {
            assert!((found - expected).abs() < 1e-4);
        }
        assert_eq!((found.reward_mean, found.reward_std, found.zero_std_frac), (0.25, 0.5, 0.0));
    }

    #[test]
    fn equal_rewards_teach_exactly_nothing() {
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            let found = advantages(&[known(&[0.1; 3]), known(&[2.875; 7])], scale, false);
            assert!(found.groups.iter().flatten().all(|advantage| *advantage == 0.0), "{scale:?}");
        }
        assert_eq!(advantages(&[known(&[0.1; 3])], ScaleRewards::Group, false).zero_std_frac, 1.0);
    }

    #[test]
    fn a_missing_reward_changes_nobody_elses_advantage() {
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            let whole = advantages(&[known(&[3.0, 1.0, 0.5]), known(&[2.0, 0.0])], scale, false);
            let mut with_gap = known(&[3.0, 1.0, 0.5]);
            with_gap.insert(1, None);
            let found = advantages(&[with_gap, known(&[2.0, 0.0])], scale, false);
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
        let found = advantages(&[known(&[5.0]), vec![None, None], known(&[1.0, 2.0])], ScaleRewards::Group, false);
        assert_eq!(found.groups[0], [0.0]);
        assert_eq!(found.groups[1], [0.0, 0.0]);
        assert_eq!(found.zero_std_frac, 0.6);
    }

    #[test]
    fn the_batch_deviation_is_shared_and_no_scaling_leaves_differences() {
        let rewards = [known(&[1.0, 3.0]), known(&[10.0, 10.0])];
        assert_eq!(advantages(&rewards, ScaleRewards::None, false).groups[0], [-1.0, 1.0]);
        let batch = advantages(&rewards, ScaleRewards::Batch, false);
        let std = (66.0f64 / 3.0).sqrt(); // mean 6: 25 + 9 + 16 + 16
        assert!((batch.groups[0][1] - 1.0 / (std + 1e-4)).abs() < 1e-12);
        assert!((batch.reward_std - std).abs() < 1e-12);
    }

    #[test]
    fn without_itself_a_reward_is_compared_with_the_mean_of_the_others() {
        let rewards = [known(&[3.0, 1.0, 0.5]), known(&[5.0])];
        let found = advantages(&rewards, ScaleRewards::None, true);
        for (found, expected) in found.groups[0].iter().zip([3.0 - 0.75, 1.0 - 1.75, 0.5 - 2.0]) {
            assert!((found - expected).abs() < 1e-12);
        }
        assert_eq!(found.groups[1], [0.0]);
    }

    #[test]
    fn parts_of_different_size_count_alike_once_they_are_normalised() {
        let (big, small) = (vec![known(&[100.0, 0.0, 0.0, 0.0])], vec![known(&[0.0, 0.01, 0.0, 0.0])]);
        let sums = [known(&[100.0, 0.01, 0.0, 0.0])];
        let found = normalized_then_summed(&sums, &[(big, 1.0), (small, 1.0)]);
        let [first, second, third, fourth] = found.groups[0][..] else { panic!("four") };
        assert!(first > 0.7 && second > 0.7 && third < -0.7, "{first} {second} {third}");
        assert!((first - second).abs() < 0.05 && third == fourth);
        assert_eq!(found.reward_mean, sums[0].iter().flatten().sum::<f64>() / 4.0);
    }

    #[test]
    fn weights_of_parts_are_numbers_with_names() {
        let weights: PartWeights = "a=1, b=-0.5".parse().unwrap();
        assert_eq!(weights.0, [("a".to_owned(), 1.0), ("b".to_owned(), -0.5)]);
        for wrong in ["", "a", "a=x", "a=inf", "a=1,a=2"] {
            assert!(wrong.parse::<PartWeights>().is_err(), "{wrong}");
        }
    }
}
