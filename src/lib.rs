//! Group relative policy optimisation (GRPO) of small language models as Unix commands.
//!
//! The modules stand in the order of the flow; what each must not know is in its own header.

pub mod error;

pub mod process;

pub mod lines;
pub mod numbers;

pub mod command;

pub mod eval;
pub mod gsm8k;
pub mod reward;
pub mod tokenizer;

pub mod engine;
pub mod gpu;
pub mod model;
pub mod optim;

pub mod checkpoint;
pub mod run;

pub mod grpo;
pub mod rollout;
pub mod train;

pub use error::{Error, Result};
