//! Which rewards count, and how much: `correctness=1,int=0.5`.

use std::str::FromStr;

use super::Reward;

/// The largest weight in size; keeps the sum of weighted rewards finite.
pub const MAX_WEIGHT: f64 = 1e9;

/// The rewards that are computed, with their weights in the sum, in the order given.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights(Vec<(Reward, f64)>);

impl Weights {
    /// Each reward with its weight.
    pub fn iter(&self) -> impl Iterator<Item = (Reward, f64)> {
        self.0.iter().copied()
    }

    /// Whether a reward is among them.
    #[must_use]
    pub fn has(&self, reward: Reward) -> bool {
        self.0.iter().any(|(other, _)| *other == reward)
    }
}

impl Default for Weights {
    /// The notebook's five with weight 1, as TRL sums them.
    fn default() -> Self {
        let notebook = Reward::ALL.into_iter().filter(|reward| *reward != Reward::Math);
        Self(notebook.map(|reward| (reward, 1.0)).collect())
    }
}

impl FromStr for Weights {
    type Err = String;

    /// Reads `name=weight,...`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut weights = Vec::new();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').ok_or_else(|| format!("\"{part}\" is not name=weight"))?;
            let reward = reward_named(name.trim())?;
            if weights.iter().any(|(other, _)| *other == reward) {
                return Err(format!("{} stands twice", reward.name()));
            }
            weights.push((reward, parse_weight(weight.trim())?));
        }
        Ok(Self(weights))
    }
}

fn reward_named(name: &str) -> Result<Reward, String> {
    Reward::ALL.into_iter().find(|reward| reward.name() == name).ok_or_else(|| {
        let names = Reward::ALL.map(Reward::name).join(", ");
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
        let weights: Weights = "int=-0.5, correctness=2".parse().unwrap();
        assert_eq!(weights.0, [(Reward::Int, -0.5), (Reward::Correctness, 2.0)]);
        assert_eq!(Weights::default().0.len(), 5);
    }

    #[test]
    fn what_is_no_weight_is_refused() {
        for text in ["", "int", "int=", "int=x", "int=nan", "int=inf", "int=1e10", "int=1,int=2", "speed=1", "int=1,"] {
            assert!(text.parse::<Weights>().is_err(), "{text}");
        }
        let unknown = "speed=1".parse::<Weights>().unwrap_err();
        assert!(Reward::ALL.iter().all(|reward| unknown.contains(reward.name())), "{unknown}");
    }
}
