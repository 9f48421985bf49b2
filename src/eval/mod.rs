//! Evaluates a model from its scored rollouts: accuracies, rewards, rates, lengths and pass@k, also against another's.
//!
//! Knows nothing of tensors or models, and of tokens only their number.

mod compare;
mod fold;
mod judge;
mod paired;
mod power;
mod stats;
mod study;
mod summary;

pub use compare::Comparison;
pub use fold::Fold;
pub use judge::Judge;
pub use paired::{Outcomes, Paired};
pub use power::{DIFFERENCES, Power, prompts_to_show};
pub use stats::{Counts, Rate, pass_at_k, rate};
pub use study::Study;
pub use summary::Summary;
