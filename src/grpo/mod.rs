//! Tokens and rewards to weights: one step of group relative policy optimisation (GRPO), or of supervised training.

pub mod advantage;
pub mod batch;
pub mod loss;
