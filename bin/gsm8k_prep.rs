//! `gsm8k-prep`: GSM8K rows, or generated problems in their form, into prompts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::cli::{self, OutputArgs};
use grpo_pipes::gsm8k::Split;
use grpo_pipes::gsm8k::demonstration::Sloppiness;
use grpo_pipes::gsm8k::generate::{Problems, generate};
use grpo_pipes::gsm8k::prompt::{PromptStyle, SYSTEM_PROMPT};
use grpo_pipes::jsonl::Output;
use grpo_pipes::{Error, Result};

/// Turns GSM8K rows, or generated problems in their form, into prompts
#[derive(Parser)]
#[command(name = "gsm8k-prep", version)]
struct Args {
    /// Make up N different short problems instead; of a split's questions none is ever in the other
    #[arg(long, value_name = "N")]
    generate: usize,
    /// Largest number in a generated problem, its reasoning and its answer
    #[arg(long, value_name = "NUMBER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(5..=999))]
    max_number: u32,
    /// The part of the data
    #[arg(long, value_enum, default_value = "train")]
    split: Split,
    /// Seed of everything random
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// File with the system prompt; an empty one means no system message [default: the XML format, as in the notebooks]
    #[arg(long, value_name = "FILE")]
    system_prompt: Option<PathBuf>,
    /// Put a worked example before the question
    #[arg(long)]
    one_shot: bool,
    /// Add a completion made from the row's own reasoning, for a supervised start
    #[arg(long)]
    demonstrations: bool,
    /// Fraction of the demonstrations in a broken format, 0 to 1; which one depends on the wording of the question
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0, requires = "demonstrations")]
    sloppy_format: f64,
    /// Fraction of the demonstrations whose result is off by one or two, 0 to 1
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0, requires = "demonstrations")]
    sloppy_arithmetic: f64,
    #[command(flatten)]
    output: OutputArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    cli::run_filter("gsm8k-prep", &args.output, |out| prepare(&args, out))
}

fn prepare(args: &Args, out: &mut Output) -> Result<()> {
    let system = match &args.system_prompt {
        Some(path) => std::fs::read_to_string(path).map_err(Error::io(path))?,
        None => SYSTEM_PROMPT.into(),
    };
    let sloppy = Sloppiness { format: args.sloppy_format, arithmetic: args.sloppy_arithmetic };
    let demonstrations = args.demonstrations.then_some(sloppy);
    let style =
        PromptStyle { name: "generated".into(), system, one_shot: args.one_shot, demonstrations, seed: args.seed };
    let problems = Problems { count: args.generate, max_number: args.max_number, seed: args.seed };
    for row in generate(problems, args.split)? {
        if let Some(record) = style.record(&row, args.split.published(), 0) {
            out.write_line(&record)?;
        }
    }
    Ok(())
}
