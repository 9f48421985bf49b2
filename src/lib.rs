//! Group relative policy optimisation (GRPO) of small language models as Unix commands.
//!
//! Six commands turn prompts into rollouts, rollouts into rewards, and rewards into weights. Records flow from `gsm8k` through `rollout`,
//! `engine`, `reward` and `grpo` to `train`; weights flow back through `run`. CONTRIBUTING.md has the map of these rooms, and who may import
//! whom.

pub mod directory;
pub mod error;

pub mod process;

pub mod lines;
pub mod numbers;

pub mod command;

pub mod dataset;
pub mod eval;
pub mod gsm8k;
pub mod reward;
pub mod tokenizer;

pub mod engine;
#[cfg(feature = "candle")]
pub mod gguf;
pub mod gpu;
pub mod model;
pub mod optim;

pub mod checkpoint;
pub mod run;

pub mod grpo;
pub mod report;
pub mod rollout;
pub mod train;

pub use error::{Error, Result};
