//! `score`: rollouts in, the same records with rewards out.

use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::command::{InputArgs, OutputArgs, run_filter};
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::lines::map::map_lines;
use grpo_pipes::reward::{Scorer, Semantics, Weights};

/// Add rewards to rollouts
///
/// Reads records with a "completion" and, for correctness and math, an "answer". Adds "rewards" (each reward by name, unweighted), "reward"
/// (their weighted sum) and "extracted" (the answer found in the completion, or null). Without an "answer", correctness and math are null,
/// and so is "reward" if one of them has a weight other than 0. Other fields are kept. Each batch of records
/// is answered as soon as it arrives.
///
/// math takes the answer from <answer>, else from the last \boxed{}, a line "#### 18", the sentence after "answer is", or the last line.
/// It compares the answer with the reference regardless of units, LaTeX, separators and number format; src/reward/math/math.md in the
/// source has the rules. "extracted" is the answer that math took if neither correctness nor int is computed.
#[derive(Debug, Parser)]
#[command(name = "score", version)]
struct Args {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Which definition of the rewards to use
    #[arg(long, value_enum, default_value_t = Semantics::Fixed)]
    semantics: Semantics,
    /// Rewards to compute, with their weights in the sum: correctness (at most 2), int, strict_format, soft_format, xmlcount (each at
    /// most 0.5), math (at most 1) [default: the first five, each with weight 1]
    #[arg(long, value_name = "NAME=WEIGHT,...", allow_hyphen_values = true)]
    reward: Option<Weights>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let scorer = Scorer { semantics: args.semantics, weights: args.reward.unwrap_or_default() };
    run_filter("score", &args.output, |out| {
        let input = Input::open(&args.input.file)?;
        map_lines(input, out, |line, json| scorer.score_line(line, json))
    })
}
