//! The options of each command, which are in its main.

#![allow(dead_code)] // the rest of each main

#[path = "../../bin/evaluate.rs"]
pub mod evaluate;
#[path = "../../bin/export_hf.rs"]
pub mod export_hf;
#[path = "../../bin/grpo_step.rs"]
pub mod grpo_step;
#[path = "../../bin/gsm8k_prep.rs"]
pub mod gsm8k_prep;
#[path = "../../bin/rollout.rs"]
pub mod rollout;
#[path = "../../bin/score.rs"]
pub mod score;
