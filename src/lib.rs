//! Group relative policy optimisation (GRPO) of small language models as Unix commands.
//!
//! The modules stand in the order of the flow; what each must not know is in its own header.

pub mod ahead;
mod allowance;
pub mod cli;
pub mod error;
pub mod jsonl;
pub mod progress;
pub mod prompt;
pub mod record;
pub mod rng;
pub mod stop;
pub mod stream;

pub mod eval;
pub mod reward;

pub mod gsm8k;
pub mod hub;
pub mod tokenizer;

pub mod device;
pub mod engine;
pub mod floats;
pub mod gpu;
pub mod model;
pub mod tensorfile;

pub mod export;
pub mod grpo;
pub mod optim;
pub mod policy;
pub mod rollout;
pub mod run;

pub use error::{Error, Result};
