//! The weights of rewards: `correctness=1,int=0.5`.

use std::str::FromStr;

use super::{REWARDS, Reward};

/// The largest absolute weight; it keeps the weighted sum finite.
pub const MAX_WEIGHT: f64 = 1e9;

/// The rewards to compute, with their weights in the sum, in the order given.
#[derive(Debug, Clone)]
pub struct RewardWeights(Vec<(&'static Reward, f64)>);

impl RewardWeights {
    /// No reward.
    #[must_use]
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// Each reward with its weight.
    pub fn iter(&self) -> std::slice::Iter<'_, (&'static Reward, f64)> {
        self.0.iter()
    }

    /// Whether the reward of this name is among them.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(reward, _)| reward.name == name)
    }
}

impl Default for RewardWeights {
    /// The notebook's five rewards with weight 1, as TRL sums them.
    fn default() -> Self {
        Self(REWARDS.iter().filter(|reward| reward.by_default).map(|reward| (reward, 1.0)).collect())
    }
}

impl FromStr for RewardWeights {
    type Err = String;

    /// Reads `name=weight,...`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut weights = Self(Vec::new());
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').ok_or_else(|| format!("\"{part}\" is not name=weight"))?;
            let reward = reward_named(name.trim())?;
            if weights.has(reward.name) {
                return Err(format!("{} occurs twice", reward.name));
            }
            weights.0.push((reward, parse_weight(weight.trim())?));
        }
        Ok(weights)
    }
}

fn reward_named(name: &str) -> Result<&'static Reward, String> {
    Reward::named(name).ok_or_else(|| {
        let names = REWARDS.iter().map(|reward| reward.name).collect::<Vec<_>>().join(", ");
        format!("no reward \"{name}\"; there are {names}")
    })
}

fn parse_weight(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(weight) if weight.abs() <= MAX_WEIGHT => Ok(weight),
        _ => Err(format!("weight \"{text}\" is not a number between {:e} and {MAX_WEIGHT:e}", -MAX_WEIGHT)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_read_in_their_order() {
        let weights: RewardWeights = "int=-0.5, correctness=2".parse().unwrap();
        let named: Vec<_> = weights.iter().map(|(reward, weight)| (reward.name, *weight)).collect();
        assert_eq!(named, [("int", -0.5), ("correctness", 2.0)]);
        assert_eq!(RewardWeights::default().0.len(), 5);
    }

    #[test]
    fn what_is_no_weight_is_refused() {
        for text in ["", "int", "int=", "int=x", "int=nan", "int=inf", "int=1e10", "int=1,int=2", "speed=1", "int=1,"] {
            assert!(text.parse::<RewardWeights>().is_err(), "{text}");
        }
        let unknown = "speed=1".parse::<RewardWeights>().unwrap_err();
        assert!(REWARDS.iter().all(|reward| unknown.contains(reward.name)), "{unknown}");
    }
}
