//! Dynamic sampling: a step trains on groups whose rewards differ, and asks for more of the step's prompts until it has enough of them.

use std::slice::from_ref;

use crate::error::Result;
use crate::grpo::advantage::AdvantageConfig;
use crate::grpo::groups::Group;
use crate::run::prompts_per_step;

/// How a step gathers groups with signal. What it takes depends on its groups alone, so that recorded ones are taken again in the same
/// way.
///
/// # Source
/// Yu et al. 2025, section 3.2, <https://arxiv.org/abs/2503.14476> (DAPO). Instead of whole batches, as many more are sampled as are
/// likely to fill the step.
#[derive(Debug, Clone)]
pub struct DynamicSampling {
    advantage: AdvantageConfig,
    /// Groups to train on.
    wanted: usize,
    /// The most groups to sample.
    most: usize,
}

impl DynamicSampling {
    /// Steps of `wanted` groups, out of at most `budget` times as many.
    #[must_use]
    pub fn new(advantage: &AdvantageConfig, wanted: usize, budget: u64) -> Self {
        Self { advantage: advantage.clone(), wanted, most: prompts_per_step(wanted, Some(budget)) }
    }

    /// The prompts that each step has to itself, whether or not it samples all of them.
    #[must_use]
    pub fn prompts(&self) -> usize {
        self.most
    }

    /// How many more groups to sample for a step that has these.
    ///
    /// # Errors
    /// Those of [`AdvantageConfig::of`].
    pub fn more(&self, groups: &[Group]) -> Result<usize> {
        let (sampled, found) = (groups.len(), self.with_signal(groups)?.len());
        let missing = self.wanted.saturating_sub(found);
        let likely = if found == 0 { sampled } else { (missing * sampled).div_ceil(found) };
        Ok(likely.min(self.most.saturating_sub(sampled)))
    }

    /// The groups to train on: the first with signal, as many as a step takes. If no group has any, the first groups, as without dynamic
    /// sampling.
    ///
    /// # Errors
    /// Those of [`AdvantageConfig::of`].
    pub fn choose<'a>(&self, groups: &'a [Group]) -> Result<Vec<&'a Group>> {
        let mut chosen = self.with_signal(groups)?;
        if chosen.is_empty() {
            chosen = groups.iter().collect();
        }
        chosen.truncate(self.wanted);
        Ok(chosen)
    }

    /// A message for the user when the budget ended before a step was full.
    ///
    /// # Errors
    /// Those of [`AdvantageConfig::of`].
    pub fn shortage(&self, step: u64, groups: &[Group]) -> Result<Option<String>> {
        let (sampled, found) = (groups.len(), self.with_signal(groups)?.len());
        Ok((found < self.wanted).then(|| {
            let wanted = self.wanted;
            format!("step {step}: rewards differ in {found} of {sampled} groups, not in {wanted}; it was trained on what there is")
        }))
    }

    fn with_signal<'a>(&self, groups: &'a [Group]) -> Result<Vec<&'a Group>> {
        let mut found = Vec::new();
        for group in groups {
            if self.advantage.of(from_ref(group))?.zero_std_frac == 0.0 {
                found.push(group);
            }
        }
        Ok(found)
    }
}
