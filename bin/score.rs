//! `score`: rollouts in, the same records with rewards out.

use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::command::{InputArgs, OutputArgs, run_filter};
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::lines::map::map_lines;
use grpo_pipes::reward::{Placebo, REWARDS, RewardWeights, Scorer, Semantics};

/// Add rewards to rollouts
///
/// Reads records with a "completion" and, for correctness and math, an "answer". Adds "rewards" (each reward by name, unweighted), "reward"
/// (their weighted sum) and "extracted" (the answer found in the completion, or null). Without an "answer", correctness and math are null,
/// and so is "reward" if one of them has a weight other than 0. Other fields are kept. Each batch of records
/// is answered as soon as it arrives.
///
/// math takes the answer from `<answer>`, else from the last \boxed{}, a line "#### 18", the sentence after "answer is", or the last line.
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
    #[arg(long, value_name = "NAME=WEIGHT,...", allow_hyphen_values = true, help = rewards())]
    reward: Option<RewardWeights>,
    /// Deal the values of "reward" to other completions of their group at random: the control of a training run, whose accuracy must not
    /// improve
    #[arg(long, value_name = "SEED")]
    placebo: Option<u64>,
}

fn rewards() -> String {
    let at_most: Vec<_> = REWARDS.iter().map(|reward| format!("{} (at most {})", reward.name, reward.most)).collect();
    let default: Vec<_> = REWARDS.iter().filter(|reward| reward.by_default).map(|reward| reward.name).collect();
    format!(
        "Rewards to compute, with their weights in the sum: {} [default: {}, each with weight 1]",
        at_most.join(", "),
        default.join(", ")
    )
}

fn main() -> ExitCode {
    let args = Args::parse();
    let scorer = Scorer { semantics: args.semantics, weights: args.reward.unwrap_or_default() };
    run_filter("score", &args.output, |out| {
        let input = Input::open(&args.input.file)?;
        match args.placebo {
            Some(seed) => Placebo { scorer, seed }.score(input, out),
            None => map_lines(input, out, |line, json| scorer.score_line(line, json)),
        }
    })
}
