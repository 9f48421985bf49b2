//! Evaluates a model from its scored rollouts: accuracies, rewards, rates, lengths and pass@k.
//!
//! Knows nothing of tensors or models, and of tokens only their number.

mod compare;
mod fold;
mod stats;
mod summary;

pub use compare::Comparison;
pub use fold::Fold;
pub use stats::{Counts, Rate, pass_at_k, rate};
pub use summary::Summary;
