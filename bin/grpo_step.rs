//! Scored rollouts and a policy to the next policy.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::checkpoint;
use grpo_pipes::command::{self, InputArgs, OutputArgs, Report};
use grpo_pipes::error::Result;
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::optim::OptimizerConfig;
use grpo_pipes::process::cancel::Stop;
use grpo_pipes::process::memory_limit::CountingAllocator;
use grpo_pipes::process::message::note;
use grpo_pipes::run::{Keep, Run};
use grpo_pipes::train::COMMAND;
use grpo_pipes::train::device::{Load, PlaceArgs};
use grpo_pipes::train::grpo_step::GrpoConfig;
use grpo_pipes::train::once::{self, Objective, OnceJob};
use grpo_pipes::train::resident::{self, Job, Listeners};

/// Train a policy on scored rollouts: groups, advantages, loss, AdamW, and the next checkpoint directory.
///
/// One line of metrics an optimizer step goes to standard output. With --follow it is the end of a pipe that runs as long as the
/// run: `rollout --follow RUN | score | grpo-step --follow RUN`.
#[derive(Parser)]
#[command(name = COMMAND, version)]
struct Args {
    #[command(flatten)]
    input: InputArgs,
    /// Model directory to train: a starting model, or a checkpoint with optimizer.safetensors and state.json
    #[arg(long, value_name = "DIR", required_unless_present = "follow")]
    policy: Option<PathBuf>,
    /// Checkpoint directory to make; it appears when it is whole
    #[arg(long, value_name = "DIR", required_unless_present_any = ["dry_run", "follow"])]
    out: Option<PathBuf>,
    /// Train the run in this directory, for as many steps as the input holds: its policy, metrics.jsonl, rollouts/ and checkpoints/
    #[arg(long, value_name = "RUN", requires = "groups_per_step",
          conflicts_with_all = ["policy", "out", "dry_run", "init", "weights_only", "supervised"])]
    follow: Option<PathBuf>,
    /// Steps of --follow between checkpoints; those between, made where an input ends, go when the policy has left them [default: 1]
    #[arg(long, value_name = "N", requires = "follow", value_parser = clap::value_parser!(u64).range(1..))]
    save_every: Option<u64>,
    /// Checkpoints of --follow that are kept besides the start, the youngest: the older ones are there if one is damaged [default: 3]
    #[arg(long, value_name = "N", requires = "follow", value_parser = clap::value_parser!(u64).range(2..))]
    keep: Option<u64>,
    /// Groups (or demonstrations) a step; as many steps as the input holds [default: all, one step]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    groups_per_step: Option<u32>,
    /// Most tokens in the model at once, bounds memory [tokens] [default: 4096; on a GPU as many as fit, up to 32768]
    #[arg(long, value_name = "TOKENS")]
    micro_batch_tokens: Option<usize>,
    /// Print the metrics of each step, and change nothing
    #[arg(long, conflicts_with_all = ["supervised", "out"])]
    dry_run: bool,
    /// Start from random weights: --policy has config.json and tokenizer only; no input makes just these weights
    #[arg(long, requires = "seed")]
    init: bool,
    /// Seed of the run
    #[arg(long)]
    seed: Option<u64>,
    /// Leave optimizer and state out of --out: a starting model, at step 0
    #[arg(long)]
    weights_only: bool,
    /// Train with cross-entropy on demonstrations: records with `prompt` and `completion`
    #[arg(long)]
    supervised: bool,
    /// Learn the tokens of the prompt too
    #[arg(long, requires = "supervised")]
    loss_on_prompt: bool,
    #[command(flatten)]
    grpo: GrpoConfig,
    #[command(flatten)]
    optimizer: OptimizerConfig,
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

// Limits the memory of chat templates and tokenizers.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    let args = Args::parse();
    // On a thread of the pool, where the many short parallel loops of a small model start without a switch of threads.
    rayon::scope(|_| command::report(COMMAND, run(&args)))
}

fn run(args: &Args) -> Result<()> {
    args.optimizer.check()?;
    args.out.as_deref().map_or(Ok(()), checkpoint::refuse_existing)?;
    let say = |words: &str| note(COMMAND, words);
    let place = args.place.open(&say)?;
    let load = Load {
        reference: args.grpo.reference.is_some(),
        tokens: args.micro_batch_tokens,
        optimizer_state: args.optimizer.optimizer_state,
    };
    let place = |model| place.machine(model, load, &say);
    let mut report = Report::create(&args.output)?;
    if let Some(dir) = &args.follow {
        let job = args.resident(Run::new(dir), Stop::on_signals()?);
        let input = Input::open_until(&args.input.file, &job.stop)?;
        let mut metrics = |line: &[u8]| {
            report.write(line);
            report.check()
        };
        resident::train(&job, input, &place, Listeners { metrics: &mut metrics, say: &say })?;
    } else {
        once::train(&args.once(), Input::open(&args.input.file)?, &place, &mut report)?;
    }
    report.finish()
}

impl Args {
    fn resident(&self, run: Run, stop: Stop) -> Job {
        Job {
            run,
            groups_per_step: self.groups_per_step.expect("--follow requires it") as usize,
            keep: Keep { every: self.save_every.unwrap_or(1), count: self.keep.unwrap_or(3) },
            grpo: self.grpo.clone(),
            optimizer: self.optimizer.clone(),
            micro_batch_tokens: self.micro_batch_tokens,
            seed: self.seed,
            command_line: std::env::args().collect(),
            stop,
        }
    }

    fn once(&self) -> OnceJob {
        OnceJob {
            policy: self.policy.clone().expect("required without --follow"),
            init: self.init,
            out: self.out.clone(),
            weights_only: self.weights_only,
            groups_per_step: self.groups_per_step.map(|groups| groups as usize),
            micro_batch_tokens: self.micro_batch_tokens,
            seed: self.seed,
            objective: match self.supervised {
                true => Objective::Supervised { loss_on_prompt: self.loss_on_prompt },
                false => Objective::Grpo { config: self.grpo.clone(), dry_run: self.dry_run },
            },
            optimizer: self.optimizer.clone(),
            command_line: std::env::args().collect(),
        }
    }
}
