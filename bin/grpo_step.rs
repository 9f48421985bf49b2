//! Scored rollouts and a policy to the next policy.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::checkpoint;
use grpo_pipes::error::{Error, Result};
use grpo_pipes::grpo::groups::Groups;
use grpo_pipes::grpo::health::Health;
use grpo_pipes::grpo::metrics::Metrics;
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::lines::read_ahead::Ahead;
use grpo_pipes::lines::record::{Line, Message};
use grpo_pipes::model::Model;
use grpo_pipes::optim::OptimizerConfig;
use grpo_pipes::process::cancel::Stop;
use grpo_pipes::process::command::{self, InputArgs, OutputArgs, Report};
use grpo_pipes::process::progress::Progress;
use grpo_pipes::run::{Keep, Run, fork, recipe};
use grpo_pipes::tokenizer::{Tokenizer, stop_ids};
use grpo_pipes::train::backend::Machine;
use grpo_pipes::train::device::{Load, Opened, PlaceArgs};
use grpo_pipes::train::grpo_step::{GrpoConfig, GrpoTrainer};
use grpo_pipes::train::resident::{self, Listeners};
use grpo_pipes::train::supervised::{self, Encode, SupervisedConfig};
use grpo_pipes::train::trainer::{Trainer, notice};
use grpo_pipes::train::{self, Taken};

const NAME: &str = "grpo-step";

/// Train a policy on scored rollouts: groups, advantages, loss, AdamW, and the next checkpoint directory.
///
/// One line of metrics an optimizer step goes to standard output. With --follow it is the end of a pipe that runs as long as the
/// run: `rollout --follow RUN | score | grpo-step --follow RUN`.
#[derive(Parser)]
#[command(name = NAME, version)]
struct Args {
    #[command(flatten)]
    input: InputArgs,
    /// Model directory to train: a starting model, or a checkpoint with optimizer.safetensors and state.json
    #[arg(long, value_name = "DIR", required_unless_present_any = ["follow", "begin", "status", "fork"])]
    policy: Option<PathBuf>,
    /// Checkpoint directory to make, or with --fork the run; it appears when it is whole
    #[arg(long, value_name = "DIR", required_unless_present_any = ["dry_run", "follow", "begin", "status"])]
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
    #[command(flatten)]
    manage: ManageArgs,
}

/// What is done to a run besides training it.
#[derive(clap::Args)]
struct ManageArgs {
    /// Make the directory of a run and keep the numbers of a recipe there, or refuse others than it was made with; prints them as
    /// NAME=VALUE, environment variables of the same names first
    #[arg(long, value_name = "RUN", requires = "recipe", conflicts_with_all = ["policy", "out", "follow"])]
    begin: Option<PathBuf>,
    /// Recipe of --begin: lines NAME=VALUE, and comments after #
    #[arg(long, value_name = "FILE", requires = "begin")]
    recipe: Option<PathBuf>,
    /// Print how far a run is, as NAME=VALUE
    #[arg(long, value_name = "RUN", conflicts_with_all = ["policy", "out", "follow", "begin"])]
    status: Option<PathBuf>,
    /// Make the run --out from a checkpoint of this run, with its past up to there and its recipe but for the numbers in the
    /// environment
    #[arg(long, value_name = "RUN", requires_all = ["from", "out"], conflicts_with_all = ["policy", "follow", "begin", "status"])]
    fork: Option<PathBuf>,
    /// Checkpoint of --fork, like step_000100
    #[arg(long, value_name = "CHECKPOINT", requires = "fork")]
    from: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // On a thread of the pool, where the many short parallel loops of a small model start without a switch of threads.
    rayon::scope(|_| command::report(NAME, run(args)))
}

fn run(args: Args) -> Result<()> {
    if let Some(lines) = manage(&args)? {
        let mut report = Report::create(&args.output)?;
        lines.iter().for_each(|line| report.write(line.as_bytes()));
        return report.finish();
    }
    args.optimizer.check()?;
    args.out.as_deref().map_or(Ok(()), checkpoint::refuse_existing)?;
    let place = args.place.open(&say)?;
    let mut report = Report::create(&args.output)?;
    match (&args.follow, &args.policy) {
        (Some(dir), _) => train_run(&args, dir, &place, &mut report)?,
        (None, Some(policy)) => {
            train_once(&args, policy, (Input::open(&args.input.file)?, &place), &mut report)?;
        }
        (None, None) => unreachable!("clap asks for one of them"),
    }
    report.finish()
}

fn say(words: &str) {
    command::note(NAME, words);
}

/// Lines for standard output, unless there is something to train.
fn manage(args: &Args) -> Result<Option<Vec<String>>> {
    match &args.manage {
        ManageArgs { begin: Some(run), recipe: Some(file), .. } => {
            recipe::begin(&Run::new(run), file, &say).map(|recipe| Some(recipe.lines()))
        }
        ManageArgs { status: Some(run), .. } => Run::new(run).status().map(Some),
        ManageArgs { fork: Some(run), from: Some(checkpoint), .. } => {
            let new = args.out.as_deref().expect("clap asks for it");
            fork(&Run::new(run), checkpoint, new).map(|words| say(&words)).map(|()| Some(Vec::new()))
        }
        _ => Ok(None),
    }
}

fn train_run(args: &Args, dir: &Path, place: &Opened, report: &mut Report) -> Result<()> {
    let stop = Stop::on_signals()?;
    let input = Input::open_until(&args.input.file, &stop)?;
    let job = resident::Job {
        run: Run::new(dir),
        groups_per_step: args.size().expect("clap asks for it"),
        keep: Keep { every: args.save_every.unwrap_or(1), count: args.keep.unwrap_or(3) },
        grpo: args.grpo.clone(),
        optimizer: args.optimizer.clone(),
        micro_batch_tokens: args.micro_batch_tokens,
        seed: args.seed,
        command_line: std::env::args().collect(),
        stop,
    };
    let mut metrics = |line: &[u8]| {
        report.write(line);
        report.check()
    };
    let machine = |model| args.machine(place, model);
    resident::train(&job, input, &machine, Listeners { metrics: &mut metrics, say: &say })
}

fn train_once(args: &Args, policy: &Path, (input, place): (Input, &Opened), report: &mut Report) -> Result<()> {
    let place = |model| args.machine(place, model);
    let mut trainer = match args.init {
        true => Trainer::random(policy, args.optimizer.clone(), args.seed.unwrap_or_default(), &place)?,
        false => Trainer::open(policy, args.optimizer.clone(), args.seed, &place)?,
    };
    checkpoint::verify(policy)?;
    let taken = match args.supervised {
        true => train_supervised(args, policy, input, &mut trainer, report)?,
        false => train_grpo(args, input, &mut trainer, report)?,
    };
    if taken.steps == 0 && !args.init {
        return Err(Error::Data("no records in the input".into()));
    }
    if taken.left_over > 0 {
        command::note(NAME, &format!("the last {} were too few for a step, and not trained on", taken.left_over));
    }
    if let Some(out) = &args.out {
        trainer.publish(out, args.weights_only, std::env::args().collect())?;
    }
    Ok(())
}

fn train_grpo(args: &Args, input: Input, trainer: &mut Trainer, report: &mut Report) -> Result<Taken> {
    let shape = trainer.machine.config().clone();
    let tokens = args.tokens(trainer);
    let mut grpo = GrpoTrainer::new(trainer, args.grpo.clone(), tokens, args.dry_run)?;
    let groups = Groups::new(input, shape);
    let mut progress = Progress::new(NAME);
    let mut health = Health::of_steps(args.grpo.logprob_band);
    train::in_steps(groups, args.size(), &mut |groups| {
        grpo.step(groups, &mut |line: &Metrics| tell(&health.mark(line, groups), report, &mut progress))?;
        health.tell(&|words| progress.note(words));
        Ok(())
    })
}

fn train_supervised(
    args: &Args,
    policy: &Path,
    input: Input,
    trainer: &mut Trainer,
    report: &mut Report,
) -> Result<Taken> {
    let shape = trainer.machine.config().clone();
    let config = SupervisedConfig { loss_on_prompt: args.loss_on_prompt, micro_batch_tokens: args.tokens(trainer) };
    let encode = demonstrations_of(policy)?;
    let example = move |line: Line| supervised::example(&line, &shape, &*encode).map(Some);
    let examples = Ahead::of_lines(input, example);
    let mut progress = Progress::new(NAME);
    train::in_steps(examples, args.size(), &mut |examples| {
        let line = supervised::step(trainer, config, examples)?;
        tell(&line, report, &mut progress);
        Ok(())
    })
}

fn tell(line: &Metrics, report: &mut Report, progress: &mut Progress) {
    notice(line).iter().for_each(|words| progress.note(words));
    report.write(&line.to_json());
    progress.tell(|| line.brief());
}

/// A demonstration is what `rollout` would have sampled: the chat as prompt, then the text and the token that ends a turn.
fn demonstrations_of(dir: &Path) -> Result<Box<Encode>> {
    let (tokenizer, end) = (Tokenizer::load(dir)?, stop_ids(dir)?[0]);
    Ok(Box::new(move |messages: &[Message], text: &str| {
        let chat = tokenizer.chat(messages).map_err(|what| Error::Data(format!("chat template: {what}")))?;
        let completion = tokenizer.encode(text)?.into_iter().chain([end]).collect();
        Ok((tokenizer.encode(&chat)?, completion))
    }))
}

impl Args {
    fn size(&self) -> Option<usize> {
        self.groups_per_step.map(|groups| groups as usize)
    }

    fn tokens(&self, trainer: &Trainer) -> usize {
        self.micro_batch_tokens.unwrap_or_else(|| trainer.machine.default_tokens())
    }

    fn machine(&self, place: &Opened, model: Model) -> Result<Box<dyn Machine>> {
        let (reference, tokens) = (self.grpo.reference.is_some(), self.micro_batch_tokens);
        place.machine(model, Load { reference, tokens, optimizer_state: self.optimizer.optimizer_state }, &say)
    }
}
