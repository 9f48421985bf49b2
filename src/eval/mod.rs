//! Scored rollouts folded into what a model is worth: accuracies, rewards, rates, lengths, pass@k.
//!
//! Knows nothing of tokens (it counts them), tensors, models.

mod fold;
mod stats;
mod summary;

pub use fold::Fold;
pub use stats::{Counts, Rate, pass_at_k, rate};
pub use summary::Summary;
