//! `rollout`: prompts and a policy in, sampled completions with token ids and log-probabilities out.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::checkpoint::{self, hub};
use grpo_pipes::engine::{Sampling, Settings};
use grpo_pipes::gpu::device::{Device, Dtype};
use grpo_pipes::gsm8k::prompt::SYSTEM_PROMPT;
use grpo_pipes::lines::jsonl::{Input, Output};
use grpo_pipes::process::cancel::Stop;
use grpo_pipes::process::command::{InputArgs, OutputArgs, log_to, run_filter};
use grpo_pipes::rollout::{Asked, Format, Job, LongPrompt, Place, Prompts, Steps, follow, run};
use grpo_pipes::run::{MOST_AHEAD, Run};
use grpo_pipes::{Error, Result};

/// Sample completions of prompts from a model
///
/// Reads records with a "prompt" (chat messages or a text), "messages" or "conversations" and writes each as often as completions are
/// asked for, with the completion's text, token ids and log-probabilities added. A record without a "prompt_id" gets one, the hash of
/// its prompt. Groups leave in the order of their prompts, each as soon as it is
/// whole. The model's own sampling defaults are not applied.
#[derive(Parser)]
#[command(name = "rollout", version)]
struct Args {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Model directory or checkpoint, or a Hub id like Qwen/Qwen2.5-0.5B-Instruct
    #[arg(long, value_name = "DIR|HUB_ID", required_unless_present = "follow")]
    model: Option<String>,
    /// Sample for the whole run in this directory, in one pipe with `grpo-step --follow`: each step's prompts from the weights that
    /// the step before made, from the first prompt on that the run's policy was not trained on
    #[arg(long, value_name = "RUN", requires = "groups_per_step", conflicts_with_all = ["model", "text", "output"])]
    follow: Option<PathBuf>,
    /// Prompts a step of --follow
    #[arg(long, value_name = "N", requires = "follow", conflicts_with = "model")]
    groups_per_step: Option<NonZeroUsize>,
    /// Sample for --follow up to N steps ahead of training, which must allow the same N: each step from the weights of N steps
    /// before those that it would wait for otherwise, never from others
    #[arg(long, value_name = "N", requires = "follow", conflicts_with = "model", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(..=MOST_AHEAD))]
    max_staleness: u64,
    /// Sample at most N steps for --follow; one alone needs no trainer at the end of the pipe, without --max-staleness
    #[arg(long, value_name = "N", requires = "follow", conflicts_with = "model", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Completions of each prompt
    #[arg(short, long, value_name = "N", default_value = "1")]
    num_generations: NonZeroUsize,
    /// Logits are divided by it; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f32,
    /// Sample among the likeliest tokens whose probabilities reach P; 1 is off
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Sample among the K likeliest tokens; 0 is off
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Sample among tokens at least P times as likely as the likeliest; 0 is off
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Make tokens that occurred already less likely, as transformers does; 1 is off
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Longest prompt [tokens; default: 512, or what a small model has positions for]
    #[arg(long, value_name = "N")]
    max_prompt_tokens: Option<NonZeroUsize>,
    /// Longest completion, end token included [tokens; default: 256, or what a small model has positions for]
    #[arg(long, value_name = "N")]
    max_completion_tokens: Option<NonZeroUsize>,
    /// Seed of everything random
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
    /// What to do with longer prompts
    #[arg(long, value_enum, default_value_t = LongPrompt::Refuse)]
    on_long_prompt: LongPrompt,
    /// Lines are questions, not records
    #[arg(long)]
    text: bool,
    /// File with the system prompt of --text; an empty one means no system message [default: the model's system_prompt.txt, which
    /// a run leaves beside its weights, else the XML format]
    #[arg(long, value_name = "FILE", requires = "text")]
    system_prompt: Option<PathBuf>,
    /// Prompts are texts that go to the model as they are, as a base model takes them: no chat template
    #[arg(long, conflicts_with_all = ["system_prompt", "chat_template"])]
    raw: bool,
    /// File with a chat template (Jinja), instead of the model's
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Sequences sampled at once; changes speed and memory, never a completion [default: 64, or what a GPU has memory for]
    #[arg(long, value_name = "N")]
    max_sequences: Option<NonZeroUsize>,
    /// Where to compute: auto, cpu, cuda, or cuda:N for GPU N counted from 0. `auto` takes the first GPU if there is one that
    /// this build can use, else the processor
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value_t = Device::Auto)]
    device: Device,
    /// How weights are held, and on a GPU caches
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    dtype: Dtype,
    /// On a GPU: the same bits of a completion whatever else is sampled. Without it so they are among up to 128 sequences, but for
    /// prompts run together
    #[arg(long)]
    batch_invariant: bool,
    /// On a GPU: how much of the free memory may be taken; the plan is said before, and refused when it does not fit
    #[arg(long, value_name = "FRACTION", default_value_t = 0.9)]
    gpu_memory_fraction: f64,
    /// Write progress and messages to FILE; standard error gets only those that need attention
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    run_filter("rollout", &args.output, |out| {
        args.log.as_deref().map_or(Ok(()), log_to)?;
        rollout(&args, out)
    })
}

/// What stands before a question of --text.
fn system_prompt(args: &Args, model: &Path) -> Result<String> {
    let beside = Some(model.join(checkpoint::SYSTEM_PROMPT)).filter(|path| path.exists());
    match args.system_prompt.clone().or(beside) {
        Some(path) => std::fs::read_to_string(&path).map_err(Error::io(&path)),
        None => Ok(SYSTEM_PROMPT.into()),
    }
}

fn rollout(args: &Args, out: &mut Output) -> Result<()> {
    let place = Place {
        device: args.device.open()?,
        dtype: args.dtype,
        batch_invariant: args.batch_invariant,
        gpu_memory_fraction: args.gpu_memory_fraction,
    };
    // Before signals are taken as a wish: a download is ended by them at once.
    let model = args.model.as_deref().map(hub::model_dir).transpose()?;
    let stop = Stop::on_signals()?;
    let input = Input::open_until(&args.input.file, &stop)?;
    let format = match &model {
        Some(dir) if args.text => Format::Text { system: system_prompt(args, dir)? },
        _ => Format::Records,
    };
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
    };
    let settings = Settings {
        group_size: args.num_generations.get(),
        max_sequences: 0,
        max_completion_tokens: 0,
        sampling,
        stop_ids: Vec::new(),
        seed: args.seed,
        step: 0,
    };
    let asked = Asked {
        prompt_tokens: args.max_prompt_tokens.map(NonZeroUsize::get),
        completion_tokens: args.max_completion_tokens.map(NonZeroUsize::get),
        sequences: args.max_sequences.map(NonZeroUsize::get),
    };
    let prompts = Prompts { format, raw: args.raw, max_tokens: 0, on_long: args.on_long_prompt };
    let job = Job { place, prompts, chat_template: args.chat_template.clone(), settings, asked, stop };
    match (&args.follow, args.groups_per_step, model) {
        (Some(_), ..) if args.on_long_prompt == LongPrompt::Skip => Err(Error::Usage(
            "--on-long-prompt skip does not go with --follow: a step takes the prompts that stand in its place".into(),
        )),
        (Some(dir), Some(groups), _) => {
            let steps = Steps { groups: groups.get(), ahead: args.max_staleness, most: args.steps };
            follow(job, &Run::new(dir), steps, input, out)
        }
        (_, _, Some(dir)) => run(job, &dir, input, out),
        _ => unreachable!("clap asks for --model, or for --follow with --groups-per-step"),
    }
}
