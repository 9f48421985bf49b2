//! `score`: rollouts in, the same records with rewards out.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use grpo_pipes::command::{InputArgs, OutputArgs, run_filter};
use grpo_pipes::error::{Error, Result};
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::lines::map::{LINES_PER_TASK, map_lines};
use grpo_pipes::reward::{Lengths, Placebo, REWARDS, RewardWeights, Scorer, Semantics, Workers};

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
pub struct Args {
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
    /// The longest completion that `rollout` may sample, of which the rewards length and soft_overlong are shares (tokens)
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_completion_tokens: Option<u32>,
    /// Its last tokens, in which soft_overlong falls from 0 to -1
    #[arg(long, value_name = "TOKENS", requires = "max_completion_tokens", value_parser = clap::value_parser!(u32).range(1..))]
    overlong_buffer: Option<u32>,
    /// Also ask a program, run by `sh -c`: it gets each record as a line, and answers with a line: a number, null, or an object of these
    /// by name, which are added to "reward". It must not hold answers back. Without --reward, its rewards are the only ones
    #[arg(long, value_name = "COMMAND")]
    command: Option<String>,
    /// How many copies of the program run at once [default: one per core]
    #[arg(long, value_name = "N", requires = "command", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// How long the program may take for a record (seconds)
    #[arg(long, value_name = "SECONDS", requires = "command", default_value_t = 60.0)]
    timeout: f64,
}

impl Args {
    fn scorer(&self) -> Result<Scorer> {
        let limit = Duration::try_from_secs_f64(self.timeout).ok().filter(|limit| !limit.is_zero());
        let limit = limit.ok_or_else(|| Error::Usage("--timeout must be above 0".into()))?;
        let command = self.command.as_ref().map(|command| Arc::new(Workers::new(command, limit)));
        let weights = self.reward.clone().unwrap_or_else(|| match command {
            Some(_) => RewardWeights::none(),
            None => RewardWeights::default(),
        });
        let lengths = self.lengths(&weights)?;
        Ok(Scorer { semantics: self.semantics, weights, lengths, command })
    }

    /// What is long, if a reward asks for it.
    fn lengths(&self, weights: &RewardWeights) -> Result<Option<Lengths>> {
        let buffer = self.overlong_buffer.unwrap_or(0);
        if weights.has("soft_overlong") && (buffer == 0 || Some(buffer) > self.max_completion_tokens) {
            return Err(Error::Usage(
                "soft_overlong needs --max-completion-tokens and an --overlong-buffer of at most as many".into(),
            ));
        }
        if weights.has("length") && self.max_completion_tokens.is_none() {
            return Err(Error::Usage("length needs --max-completion-tokens".into()));
        }
        Ok(self.max_completion_tokens.map(|longest| Lengths { longest: longest as usize, buffer: buffer as usize }))
    }
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
    run_filter("score", &args.output, |out| {
        let (scorer, input) = (args.scorer()?, Input::open(&args.input.file)?);
        let command = scorer.command.clone();
        let finish = || command.map_or(Ok(()), |command| command.finish());
        if let Some(seed) = args.placebo {
            return Placebo { scorer, seed }.score(input, out).and_then(|()| finish());
        }
        // A program may take its time for a record: as many threads wait as there are copies of it.
        let lines = if scorer.command.is_some() { 1 } else { LINES_PER_TASK };
        if let Some(jobs) = args.jobs {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(jobs.into());
            pool.build_global().map_err(|err| Error::Usage(format!("--jobs: {err}")))?;
        }
        map_lines(input, out, lines, |line, json| scorer.score_line(line, json)).and_then(|()| finish())
    })
}
