//! The mathematics of group relative policy optimisation (GRPO): groups, advantages, the loss, and the metrics of a step.
//!
//! Knows no model, device or directory; of the model only the log-probability and entropy of a token.

pub mod advantage;
pub mod completion;
pub mod groups;
pub mod health;
pub mod limits;
pub mod loss;
pub mod metrics;
pub mod pass_stats;
