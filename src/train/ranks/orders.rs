//! What the first rank tells the others to do.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Ranks, agree};
use crate::error::Result;
use crate::grpo::groups::Group;
use crate::train::supervised::Example;

/// What the first rank tells the others to do next, and does itself.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// Open this policy.
    Open {
        /// Its directory.
        dir: String,
        /// The weights that the first rank found there.
        policy_id: String,
    },
    /// Get ready for GRPO steps.
    Begin,
    /// Make a GRPO step on these groups: the id and the records of each, as file, line and text.
    Groups(Vec<(String, Vec<SentLine>)>),
    /// Make a supervised step on these demonstrations.
    Examples(Vec<Example>),
    /// Bring the moments together.
    Moments,
    /// End.
    End,
}

/// A line of input, with its file and number.
pub type SentLine = (String, usize, String);

impl Order {
    /// A step on `groups`.
    #[must_use]
    pub fn step(groups: &[&Group]) -> Self {
        let line = |one: &crate::lines::record::Line| (one.path.to_string(), one.number, one.text.clone());
        let lines = |group: &Group| group.completions.iter().map(|one| line(&one.line)).collect();
        Self::Groups(groups.iter().copied().map(|group| (group.id.clone(), lines(group))).collect())
    }

    pub(super) fn hear(ranks: &dyn Ranks) -> Self {
        serde_json::from_slice(&ranks.hear()).expect("written by this program")
    }
}

/// Sends an order, which is made only on the first of several ranks.
pub fn send(ranks: &dyn Ranks, order: impl FnOnce() -> Order) {
    if ranks.count() > 1 && ranks.rank() == 0 {
        ranks.tell(&serde_json::to_vec(&order()).expect("plain data serialises"));
    }
}

/// Lets the others open the policy that the first rank has opened.
///
/// # Errors
/// The error of a rank that cannot.
pub fn announce_policy(ranks: &dyn Ranks, dir: &Path, policy_id: &str) -> Result<()> {
    if ranks.count() == 1 || ranks.rank() > 0 {
        return Ok(());
    }
    send(ranks, || Order::Open { dir: dir.display().to_string(), policy_id: policy_id.to_owned() });
    agree(ranks, Ok(()))
}

/// Ends the other ranks, which wait for orders.
pub fn dismiss(ranks: &dyn Ranks) {
    send(ranks, || Order::End);
}
