//! Trains a policy on scored rollouts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use grpo_pipes::checkpoint::{self, hub};
use grpo_pipes::command::{self, InputArgs, OutputArgs, Report};
use grpo_pipes::error::{Error, Result};
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::model::Model;
use grpo_pipes::optim::OptimizerConfig;
use grpo_pipes::process::cancel::Stop;
use grpo_pipes::process::memory_limit::CountingAllocator;
use grpo_pipes::process::message::note;
use grpo_pipes::run::recipe::{self, options};
use grpo_pipes::run::{Retention, Run, fork};
use grpo_pipes::tokenizer::TemplateArgs;
use grpo_pipes::train::COMMAND;
use grpo_pipes::train::adapter::AdapterArgs;
use grpo_pipes::train::backend::Backend;
use grpo_pipes::train::config::{GrpoConfig, ResidentJob};
use grpo_pipes::train::device::{MemoryNeeds, OpenDevice, TrainDeviceArgs};
use grpo_pipes::train::once::{self, Objective, OnceJob};
use grpo_pipes::train::ranks::{self, FollowJob, Launched, Ranks};
use grpo_pipes::train::resident::{self, Listeners};

/// Train a policy on scored rollouts: groups, advantages, loss, AdamW, and the next checkpoint directory.
///
/// Each optimizer step writes one line of metrics to standard output. With --follow this is the last command of a pipe that trains a
/// whole run: `rollout --follow RUN | score | grpo-step --follow RUN`.
#[derive(Parser)]
#[command(name = COMMAND, version)]
pub struct Args {
    #[command(flatten)]
    input: InputArgs,
    /// Model to train: a directory or a Hub id to start from, or a checkpoint with optimizer.safetensors and state.json
    #[arg(long, value_name = "MODEL", required_unless_present_any = ["follow", "begin", "status", "fork"])]
    policy: Option<String>,
    /// Checkpoint directory to make, or with --fork the run; it appears when it is complete
    #[arg(long, value_name = "DIR", required_unless_present_any = ["dry_run", "follow", "begin", "status"])]
    out: Option<PathBuf>,
    /// Train the run in this directory until the input ends, and write its policy, metrics.jsonl, rollouts/ and checkpoints/
    #[arg(long, value_name = "RUN", requires = "groups_per_step",
          conflicts_with_all = ["policy", "out", "dry_run", "init", "weights_only", "supervised"])]
    follow: Option<PathBuf>,
    /// With --follow, steps between checkpoints. One that is made in between, where an input ends, is removed by a later one [default: 1]
    #[arg(long, value_name = "N", requires = "follow", conflicts_with = "policy", value_parser = clap::value_parser!(u64).range(1..))]
    save_every: Option<u64>,
    /// With --follow, how many checkpoints to keep besides the start: the newest, of which the older ones serve if one is damaged
    /// [default: 3]
    #[arg(long, value_name = "N", requires = "follow", conflicts_with = "policy", value_parser = clap::value_parser!(u64).range(2..))]
    keep: Option<u64>,
    /// With --follow, print a question of each step with its answer, a response and what was extracted from it, to standard error
    #[arg(long, requires = "follow")]
    verbose: bool,
    /// Groups (or demonstrations) per step; there are as many steps as the input holds [default: all in one step]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    groups_per_step: Option<u32>,
    /// The most tokens to process at once, which bounds memory (tokens) [default: 4096; on a GPU as many as fit, up to 32768]
    #[arg(long, value_name = "TOKENS")]
    micro_batch_tokens: Option<usize>,
    /// Print the metrics of each step without changing anything
    #[arg(long, conflicts_with_all = ["supervised", "out"])]
    dry_run: bool,
    /// Start from random weights; --policy has config.json and a tokenizer only. With an empty input, --out holds just these weights
    #[arg(long, requires = "seed", conflicts_with = "lora_rank")]
    init: bool,
    /// Seed of the run: of random weights and of rounding
    #[arg(long)]
    seed: Option<u64>,
    /// Write only the weights to --out: a starting model at step 0, without optimizer and state
    #[arg(long)]
    weights_only: bool,
    /// Train with cross-entropy on demonstrations, which are records with `prompt` and `completion`
    #[arg(long, conflicts_with_all = ["LossConfig", "AdvantageConfig", "num_iterations", "reference", "teacher", "max_staleness", "dynamic_sampling",
          "logprob_band"])]
    supervised: bool,
    /// Train on the tokens of the prompt too
    #[arg(long, requires = "supervised")]
    loss_on_prompt: bool,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    grpo: GrpoConfig,
    #[command(flatten)]
    optimizer: OptimizerConfig,
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    device: TrainDeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    manage: ManageArgs,
    /// Arguments, also from a recipe, that checkpoints record.
    #[arg(skip)]
    line: Vec<String>,
}

/// What to do with a run besides training it.
#[derive(clap::Args)]
struct ManageArgs {
    /// Make the directory of a run and keep a recipe's numbers there, and print them as NAME=VALUE. Environment variables of the same
    /// names win. A run that was made with other numbers is refused
    #[arg(long, value_name = "RUN", conflicts_with_all = ["policy", "out", "follow"])]
    begin: Option<PathBuf>,
    /// Recipe: lines of NAME=VALUE, and comments after #. Options that are not given are taken from it, as far as they go with those that
    /// are. With --begin, the recipe to keep [default: the run's own]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["supervised", "status", "fork"])]
    recipe: Option<PathBuf>,
    /// Print the step that a run has reached and the prompts it was trained on, as NAME=VALUE
    #[arg(long, value_name = "RUN", conflicts_with_all = ["policy", "out", "follow", "begin"])]
    status: Option<PathBuf>,
    /// Make the run --out from a checkpoint of this run: copy its past up to there, and its recipe except for the numbers that the
    /// environment sets
    #[arg(long, value_name = "RUN", requires_all = ["from", "out"], conflicts_with_all = ["policy", "follow", "begin", "status"])]
    fork: Option<PathBuf>,
    /// Checkpoint for --fork, like step_000100
    #[arg(long, value_name = "CHECKPOINT", requires = "fork")]
    from: Option<String>,
}

/// The option that only prints more.
const VERBOSE: &str = "--verbose";

// Limits the memory of chat templates and tokenizers. tests/install reads the options of several commands in one program.
#[cfg_attr(not(test), global_allocator)]
#[cfg_attr(test, allow(dead_code))]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok();
    let launched = Launched::find(&variable);
    let ranks = match ranks::join(launched) {
        Ok(ranks) => ranks,
        Err(err) if launched.rank == 0 => return command::report(COMMAND, Err(err)),
        Err(err) => return ExitCode::from(err.exit_code()), // said once
    };
    let line = match options::arguments(Args::command(), options::OF_GRPO_STEP) {
        Ok(line) => line,
        Err(err) if ranks.rank() == 0 => return command::report(COMMAND, Err(err)),
        Err(err) => return ExitCode::from(err.exit_code()),
    };
    let mut args = match Args::try_parse_from(&line) {
        Ok(args) => args,
        Err(err) if ranks.rank() == 0 => return answer(&err),
        Err(_) => return ExitCode::SUCCESS,
    };
    args.line = line.iter().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    if variable("RAYON_NUM_THREADS").is_none() {
        ranks::share_cores(&*ranks);
    }
    // On a thread of the pool, where the many short parallel loops of a small model start without a switch of threads.
    rayon::scope(|_| if ranks.rank() == 0 { lead(&args, &ranks) } else { follow(&args, &ranks) })
}

/// Prints what clap has to say: help, or what is wrong with the options.
fn answer(err: &clap::Error) -> ExitCode {
    let _ = err.print(); // there is nowhere else to say it
    ExitCode::from(err.exit_code() as u8)
}

/// The only rank, or the first of several.
fn lead(args: &Args, ranks: &Arc<dyn Ranks>) -> ExitCode {
    let code = command::report(COMMAND, run(args, ranks));
    ranks::dismiss(&**ranks);
    code
}

fn follow(args: &Args, ranks: &Arc<dyn Ranks>) -> ExitCode {
    let quiet = |_: &str| (); // the first rank says it
    let open = |model| args.backend(&args.device.open(&quiet)?, model, ranks, &quiet);
    match args.follow_job().and_then(|job| ranks::follow(&job, &**ranks, &open)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            say(&format!("rank {}: {err}", ranks.rank()));
            ranks.abort(err.exit_code())
        }
    }
}

fn run(args: &Args, ranks: &Arc<dyn Ranks>) -> Result<()> {
    if let Some(lines) = args.manage()? {
        let mut report = Report::create(&args.output)?;
        lines.iter().for_each(|line| report.write(line.as_bytes()));
        return report.finish();
    }
    if !args.supervised && args.template != TemplateArgs::default() {
        return Err(Error::Usage("--chat-template and --chat-template-arg require --supervised".into()));
    }
    args.optimizer.check()?;
    args.out.as_deref().map_or(Ok(()), checkpoint::refuse_existing)?;
    let device = args.device.open(&say)?;
    let open = |model| args.backend(&device, model, ranks, &say);
    let mut report = Report::create(&args.output)?;
    if let Some(dir) = &args.follow {
        let job = args.resident(Run::new(dir), Stop::on_signals()?);
        let input = Input::open_until(&args.input.file, &job.stop)?;
        let mut metrics = |line: &[u8]| {
            report.write(line);
            report.check()
        };
        resident::train(&job, input, &open, Listeners { metrics: &mut metrics, say: &say })?;
    } else {
        once::train(&args.once()?, Input::open(&args.input.file)?, &open, &mut report)?;
    }
    report.finish()
}

fn say(words: &str) {
    note(COMMAND, words);
}

impl Args {
    /// Does what is asked of a run besides training it, and returns the lines that tell of it; `None` if training is asked for.
    fn manage(&self) -> Result<Option<Vec<String>>> {
        match &self.manage {
            ManageArgs { begin: Some(run), recipe, .. } => {
                recipe::begin(&Run::new(run), recipe.as_deref(), &say).map(|recipe| Some(recipe.lines()))
            }
            ManageArgs { status: Some(run), .. } => Run::new(run).status().map(Some),
            ManageArgs { fork: Some(run), from: Some(checkpoint), .. } => {
                let new = self.out.as_deref().expect("--fork requires it");
                fork(&Run::new(run), checkpoint, new).map(|words| say(&words)).map(|()| Some(Vec::new()))
            }
            _ => Ok(None),
        }
    }

    fn backend(
        &self,
        device: &OpenDevice,
        model: Model,
        ranks: &Arc<dyn Ranks>,
        say: &dyn Fn(&str),
    ) -> Result<Box<dyn Backend>> {
        let needs = MemoryNeeds {
            frozen: [&self.grpo.reference, &self.grpo.teacher].into_iter().flatten().count(),
            tokens: self.micro_batch_tokens,
            optimizer_state: self.optimizer.optimizer_state,
        };
        device.backend(self.adapter.apply(model, self.seed.unwrap_or_default())?, needs, ranks, say)
    }

    /// What a rank after the first does. It knows the policy from the first one.
    fn follow_job(&self) -> Result<FollowJob> {
        Ok(FollowJob {
            init: self.init,
            objective: self.objective(),
            optimizer: self.optimizer.clone(),
            micro_batch_tokens: self.micro_batch_tokens,
            seed: self.seed,
            stop: if self.follow.is_some() { Stop::on_signals()? } else { Stop::default() },
        })
    }

    fn objective(&self) -> Objective {
        match self.supervised {
            true => {
                let template = self.template.clone();
                Objective::Supervised { loss_on_prompt: self.loss_on_prompt, template }
            }
            false => Objective::Grpo { config: Box::new(self.grpo.clone()), dry_run: self.dry_run },
        }
    }

    fn resident(&self, run: Run, stop: Stop) -> ResidentJob {
        ResidentJob {
            run,
            groups_per_step: self.groups_per_step.expect("--follow requires it") as usize,
            retention: Retention { every: self.save_every.unwrap_or(1), count: self.keep.unwrap_or(3) },
            grpo: self.grpo.clone(),
            optimizer: self.optimizer.clone(),
            micro_batch_tokens: self.micro_batch_tokens,
            seed: self.seed,
            verbose: self.verbose,
            command_line: self.command_line(),
            stop,
        }
    }

    /// This command with its arguments, for checkpoints, which must depend neither on where the command was found nor on what it prints.
    fn command_line(&self) -> Vec<String> {
        let line = self.line.iter().filter(|arg| *arg != VERBOSE);
        [COMMAND.to_owned()].iter().chain(line).cloned().collect()
    }

    fn once(&self) -> Result<OnceJob> {
        Ok(OnceJob {
            policy: hub::model_dir(self.policy.as_deref().expect("required without --follow"))?,
            init: self.init,
            out: self.out.clone(),
            weights_only: self.weights_only,
            groups_per_step: self.groups_per_step.map(|groups| groups as usize),
            micro_batch_tokens: self.micro_batch_tokens,
            seed: self.seed,
            objective: self.objective(),
            optimizer: self.optimizer.clone(),
            command_line: self.command_line(),
        })
    }
}
