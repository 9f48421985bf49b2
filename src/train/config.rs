//! What configures a training step and a resident run.

use std::path::PathBuf;

use crate::grpo::advantage::AdvantageConfig;
use crate::grpo::completion::Staleness;
use crate::grpo::loss::LossConfig;
use crate::optim::OptimizerConfig;
use crate::process::cancel::Stop;
use crate::run::{Retention, Run};

/// Configures a GRPO step.
#[derive(Debug, Clone, clap::Args)]
pub struct GrpoConfig {
    /// The loss.
    #[command(flatten)]
    pub loss: LossConfig,
    /// The advantages.
    #[command(flatten)]
    pub advantage: AdvantageConfig,
    /// Optimizer steps on each batch of groups
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub num_iterations: u64,
    /// Model directory of the reference policy, from which --beta penalises the KL divergence
    #[arg(long, value_name = "DIR")]
    pub reference: Option<PathBuf>,
    /// Model directory of a teacher with the policy's vocabulary: on-policy distillation, with --distill, alone or beside rewards
    #[arg(long, value_name = "DIR")]
    pub teacher: Option<PathBuf>,
    /// Mix the policy into the reference after every N updates (TR-DPO). Checkpoints then hold the reference, and training goes on with it
    #[arg(long, value_name = "N", requires = "reference", value_parser = clap::value_parser!(u64).range(1..))]
    pub reference_sync_steps: Option<u64>,
    /// The policy's share in that mixture; with 1 it becomes the reference
    #[arg(long, value_name = "ALPHA", requires = "reference_sync_steps", default_value_t = 0.6)]
    pub reference_mixup_alpha: f64,
    /// Accept rollouts sampled by weights up to N steps older than those in training, or `any` for records made elsewhere. With
    /// --follow, give `rollout` the same N
    #[arg(long, value_name = "N|any", default_value = "0")]
    pub max_staleness: Staleness,
    /// Dynamic sampling: train a step on --groups-per-step groups in which rewards differ, and sample up to BUDGET times as many to find
    /// them. With --follow, give `rollout` the same BUDGET, and the scorer must not hold records back
    #[arg(long, value_name = "BUDGET", value_parser = clap::value_parser!(u64).range(2..))]
    pub dynamic_sampling: Option<u64>,
    /// Refuse a step where log-probabilities recorded by the sampler and recomputed with the same weights differ by more than this on
    /// average (nats)
    #[arg(long, value_name = "NATS", default_value_t = 0.05)]
    pub logprob_band: f64,
}

/// Configures a supervised step.
#[derive(Debug, Clone, Copy)]
pub struct SupervisedConfig {
    /// Whether the loss covers the prompt's tokens too.
    pub loss_on_prompt: bool,
    /// Tokens per micro-batch.
    pub micro_batch_tokens: usize,
}

/// How to train a run.
#[derive(Debug, Clone)]
pub struct ResidentJob {
    /// The run's directory.
    pub run: Run,
    /// Groups per step.
    pub groups_per_step: usize,
    /// Steps between checkpoints, and how many are kept.
    pub retention: Retention,
    /// The GRPO step.
    pub grpo: GrpoConfig,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The most tokens in the model at once; `None` leaves it to the device.
    pub micro_batch_tokens: Option<usize>,
    /// Seed of the run; `None` keeps a checkpoint's own.
    pub seed: Option<u64>,
    /// Print a sample of each step.
    pub verbose: bool,
    /// Recorded in checkpoints as the command that made them.
    pub command_line: Vec<String>,
    /// Ends training early, with a checkpoint of the last finished step.
    pub stop: Stop,
}
