//! The mathematics of group relative policy optimisation (GRPO): groups, advantages, the loss, and what is measured of a step.
//!
//! Knows no model, no device and no directory.

pub mod advantage;
pub mod groups;
pub mod health;
pub mod loss;
pub mod metrics;
pub mod pass_stats;
