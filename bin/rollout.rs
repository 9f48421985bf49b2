//! `rollout`: prompts and a policy in, sampled completions with token ids and log-probabilities out.

use std::io::{IsTerminal, stdin, stdout};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use grpo_pipes::Result;
use grpo_pipes::command::{InputArgs, OutputArgs, report, run_filter};
use grpo_pipes::gpu::device::DeviceArgs;
use grpo_pipes::model::Sampling;
use grpo_pipes::process::cancel::Stop;
use grpo_pipes::process::memory_limit::CountingAllocator;
use grpo_pipes::process::message::log_to;
use grpo_pipes::rollout::{
    BackendOptions, FollowOptions, LineFormat, LongPrompt, Policy, PromptOptions, RequestedSizes, RolloutJob,
    ServeOptions, ServerOptions, Shard, converse, run, serve,
};
use grpo_pipes::run::MAX_STEPS_AHEAD;
use grpo_pipes::run::recipe::options;
use grpo_pipes::tokenizer::TemplateArgs;

/// Sample completions of prompts from a model
///
/// Reads records with a "prompt" (chat messages or a text), "messages" or "conversations". For each, writes N records with a
/// completion's text, token ids and log-probabilities added (see --num-generations). A record without a "prompt_id" gets one: the hash
/// of its prompt. Groups are written in the order of their prompts, each as soon as it is complete. The sampling defaults that come
/// with the model are not used.
#[derive(Parser)]
#[command(name = "rollout", version)]
pub struct Args {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Model directory, checkpoint or GGUF file, or a Hub id like Qwen/Qwen2.5-0.5B-Instruct; with --server, the server's name for it
    #[arg(long, value_name = "DIR|GGUF|HUB_ID", required_unless_present_any = ["follow", "server"])]
    model: Option<String>,
    /// Recipe to take options from that are not given, as far as they go with those that are: one of pipelines/recipes, or the recipe.env
    /// of a run
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// The GGUF file to take from the directory or Hub repository of --model
    #[arg(long = "file", id = "file_of_model", value_name = "NAME", requires = "model")]
    file: Option<String>,
    /// Sample for the whole run in this directory, in one pipe with `grpo-step --follow`: each step from the weights that the step
    /// before made, beginning with the first prompt that the run's policy was not trained on
    #[arg(long, value_name = "RUN", requires = "groups_per_step", conflicts_with_all = ["model", "text", "output"])]
    follow: Option<PathBuf>,
    /// Prompts per step of --follow
    #[arg(long, value_name = "N", requires = "follow", conflicts_with_all = ["model", "server"])]
    groups_per_step: Option<NonZeroUsize>,
    /// Let --follow sample up to N steps ahead of training, which must allow the same N: each step uses the weights from exactly N
    /// steps before those that it would otherwise wait for
    #[arg(long, value_name = "N", requires = "follow", conflicts_with_all = ["model", "server"], default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(..=MAX_STEPS_AHEAD))]
    max_staleness: u64,
    /// Let the trainer of --follow, which must have the same BUDGET, ask for more groups of a step, up to BUDGET times --groups-per-step
    /// in all
    #[arg(long, value_name = "BUDGET", requires = "follow", conflicts_with_all = ["model", "server", "max_staleness"],
          value_parser = clap::value_parser!(u64).range(2..))]
    dynamic_sampling: Option<u64>,
    /// Sample at most N steps for --follow. A single step needs no trainer at the end of the pipe, unless --max-staleness or
    /// --dynamic-sampling is given
    #[arg(long, value_name = "N", requires = "follow", conflicts_with = "model", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Answer the requests of programs written for OpenAI's API at ADDRESS, HOST:PORT or a PORT of this machine alone, until a signal
    /// comes. The sampling options are what applies where a request says nothing; it may not ask for longer completions
    #[arg(long, value_name = "ADDRESS", requires = "model",
          conflicts_with_all = ["file", "follow", "text", "raw", "shard", "output", "num_generations"])]
    serve: Option<String>,
    /// Sample from a server that speaks OpenAI's API, like http://localhost:8000: vLLM, llama.cpp, SGLang, or `rollout --serve`, whose
    /// records are those of rollout. The server has the chat template, the limits and the device. A server that returns token ids and
    /// log-probabilities gives records to train on, with --max-staleness any
    #[arg(long, value_name = "URL", conflicts_with_all = ["follow", "serve", "jsonl", "file_of_model", "chat_template",
          "chat_template_arg", "batch_invariant", "max_prompt_tokens"])]
    server: Option<String>,
    /// What clients of --serve must send as their API key, and what --server is sent; an address that other machines can reach needs one
    #[arg(long, value_name = "KEY", env = "GRPO_PIPES_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Append the records to FILE, each group as soon as it is complete, and do not sample prompts again whose completions FILE has: the
    /// same command goes on where it was killed
    #[arg(long, value_name = "FILE", conflicts_with_all = ["follow", "output", "serve"])]
    jsonl: Option<PathBuf>,
    /// Sample the I-th of N parts of the prompts, for several machines. The parts' outputs, one after the other, are that of the whole
    #[arg(long, value_name = "I/N", conflicts_with = "follow")]
    shard: Option<Shard>,
    /// Completions per prompt
    #[arg(short, long, value_name = "N", default_value = "1")]
    num_generations: NonZeroUsize,
    /// Divide logits by T; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f32,
    /// Sample only the likeliest tokens whose probabilities add up to P; 1 turns it off
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Sample only the K likeliest tokens; 0 turns it off
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Sample only tokens at least P times as likely as the likeliest; 0 turns it off
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Make tokens that occurred already less likely, as transformers does; 1 turns it off
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Longest prompt (tokens) [default: 512, or less for a model with few positions]
    #[arg(long, value_name = "N")]
    max_prompt_tokens: Option<NonZeroUsize>,
    /// Longest completion, end token included (tokens) [default: 256, or less for a model with few positions]
    #[arg(long, value_name = "N")]
    max_completion_tokens: Option<NonZeroUsize>,
    /// Seed of all draws
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
    /// What to do with longer prompts
    #[arg(long, value_enum, default_value_t = LongPrompt::Refuse)]
    on_long_prompt: LongPrompt,
    /// Read lines as questions, not as records. On a terminal, without FILE, this is a conversation
    #[arg(long)]
    text: bool,
    /// File with the system prompt of --text; an empty file means no system message [default: the model's system_prompt.txt, which
    /// a run leaves beside its weights, else the XML format]
    #[arg(long, value_name = "FILE", requires = "text")]
    system_prompt: Option<PathBuf>,
    /// Pass prompts to the model as plain text without a chat template, as base models need them
    #[arg(long, conflicts_with_all = ["system_prompt", "chat_template", "chat_template_arg"])]
    raw: bool,
    #[command(flatten)]
    template: TemplateArgs,
    /// Sequences sampled at once; changes speed and memory, never a completion [default: 64, or fewer if a GPU's memory is short]
    #[arg(long, value_name = "N")]
    max_sequences: Option<NonZeroUsize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// On a GPU, make each completion bit-identical whatever else is sampled. Without it, completions can differ in the last bits
    /// between batches of more than 128 sequences, or when prompts are run together
    #[arg(long)]
    batch_invariant: bool,
    /// Use at most this fraction of the free GPU memory; a plan that does not fit is refused before anything is allocated
    #[arg(long, value_name = "FRACTION", default_value_t = 0.9)]
    gpu_memory_fraction: f64,
    /// Write progress and messages to FILE; standard error gets only those that need attention
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

// Limits the memory of chat templates and tokenizers. tests/install reads the options of several commands in one program.
#[cfg_attr(not(test), global_allocator)]
#[cfg_attr(test, allow(dead_code))]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    let args = match options::arguments(Args::command(), options::OF_ROLLOUT) {
        Ok(line) => Args::parse_from(line),
        Err(err) => return report("rollout", Err(err)),
    };
    let log = || args.log.as_deref().map_or(Ok(()), log_to);
    let file = args.file.as_deref();
    match (&args.model, &args.serve) {
        (Some(model), Some(address)) => {
            let options = ServeOptions { address: address.clone(), api_key: args.api_key.clone() };
            report("rollout", log().and_then(|()| serve(model, file, args.job()?, &options)))
        }
        (Some(model), None) if args.is_conversation() && args.server.is_none() => {
            report("rollout", log().and_then(|()| converse(model, file, args.job()?)))
        }
        _ => run_filter("rollout", &args.output, |out| {
            log()?;
            run(&args.policy(), args.job()?, &args.input.file, out)
        }),
    }
}

impl Args {
    fn is_conversation(&self) -> bool {
        let is_plain = self.output.output.is_none() && self.shard.is_none() && self.num_generations.get() == 1;
        let asks = self.text && !self.raw && self.input.file.as_os_str() == "-";
        asks && is_plain && stdin().is_terminal() && stdout().is_terminal()
    }

    fn policy(&self) -> Policy {
        if let Some(url) = self.server.clone() {
            return Policy::Server(ServerOptions { url, model: self.model.clone(), api_key: self.api_key.clone() });
        }
        match (&self.follow, self.groups_per_step, &self.model) {
            (Some(dir), Some(groups), _) => {
                let options = FollowOptions {
                    groups_per_step: groups.get(),
                    max_staleness: self.max_staleness,
                    max_steps: self.steps,
                    dynamic_sampling: self.dynamic_sampling,
                };
                Policy::Run(dir.clone(), options)
            }
            (_, _, Some(model)) => Policy::Model(model.clone(), self.file.clone()),
            _ => unreachable!("clap requires --model, or --follow with --groups-per-step"),
        }
    }

    fn job(&self) -> Result<RolloutJob> {
        let format = match self.text {
            true => LineFormat::Questions { system_prompt: self.system_prompt.clone() },
            false => LineFormat::Records,
        };
        Ok(RolloutJob {
            backend: BackendOptions {
                device: self.device.device.open()?,
                dtype: self.device.dtype,
                batch_invariant: self.batch_invariant,
                gpu_memory_fraction: self.gpu_memory_fraction,
            },
            prompts: PromptOptions { format, raw: self.raw, on_long: self.on_long_prompt },
            template: self.template.clone(),
            shard: self.shard,
            group_size: self.num_generations.get(),
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
            },
            seed: self.seed,
            sizes: RequestedSizes {
                prompt_tokens: self.max_prompt_tokens.map(NonZeroUsize::get),
                completion_tokens: self.max_completion_tokens.map(NonZeroUsize::get),
                sequences: self.max_sequences.map(NonZeroUsize::get),
            },
            jsonl: self.jsonl.clone(),
            stop: Stop::default(),
        })
    }
}
