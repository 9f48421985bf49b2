//! `evaluate`: computes accuracies and other rates from scored rollouts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::command::{OutputArgs, run_filter};
use grpo_pipes::eval::{Comparison, Fold};
use grpo_pipes::lines::jsonl::Input;

/// Compute accuracies, rates, means and pass@k from scored rollouts
///
/// Strict accuracy: "rewards.correctness" is above 0. Flexible accuracy: the last number of the completion equals the answer. Format:
/// "rewards.strict_format" is above 0. Truncated: "finish_reason" is "length". pass@k is the unbiased estimate, averaged over prompts.
///
/// With one completion per prompt, the 95 % intervals are Wilson's. With more, completions of a prompt are correlated: the intervals are
/// then Wilson's for the effective number of completions, estimated from the variance between prompts.
#[derive(Debug, Parser)]
#[command(name = "evaluate", version)]
struct Args {
    /// Files of scored rollouts, evaluated together (`.zst` is decompressed); `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    /// Print one JSON object instead of a table; rates are fractions of 1
    #[arg(long)]
    json: bool,
    /// Print a table of the rates before and after, from two files that --json wrote; repeat it for another pair
    #[arg(long, value_names = ["BEFORE", "AFTER"], num_args = 2, conflicts_with_all = ["files", "json"])]
    compare: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    run_filter("evaluate", &args.output, |out| {
        if !args.compare.is_empty() {
            return out.write_line(Comparison::read(&args.compare)?.to_string().as_bytes());
        }
        let mut fold = Fold::default();
        for file in &args.files {
            for line in Input::open(file)? {
                fold.add(&line?)?;
            }
        }
        let summary = fold.finish()?;
        let text = if args.json { summary.to_json() } else { summary.to_string() };
        out.write_line(text.as_bytes())
    })
}
