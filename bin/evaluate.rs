//! `evaluate`: scored rollouts in, what they come to out.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::command::{OutputArgs, run_filter};
use grpo_pipes::eval::{Comparison, Fold};
use grpo_pipes::lines::jsonl::Input;

/// Fold scored rollouts into accuracies, rates, means and pass@k
///
/// Strict accuracy: "rewards.correctness" is above 0. Flexible: the last number of the completion is the answer, by value. Format:
/// "rewards.strict_format" is above 0. Truncated: "finish_reason" is "length". pass@k is the unbiased estimate, over prompts.
///
/// Intervals are Wilson's at 95 % with one completion a prompt. With more, completions of a prompt are correlated: the interval is then
/// Wilson's for the effective number of completions, from the variance between prompts.
#[derive(Debug, Parser)]
#[command(name = "evaluate", version)]
struct Args {
    /// Files of scored rollouts, taken together (`.zst` is decompressed); `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    /// One JSON object instead of a table; rates are fractions of 1
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
