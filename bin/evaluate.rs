//! `evaluate`: computes accuracies and other rates from scored rollouts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::command::{OutputArgs, run_filter};
use grpo_pipes::error::Result;
use grpo_pipes::eval::{Comparison, Fold, Outcomes, Paired, Summary};
use grpo_pipes::lines::jsonl::{Input, Output};
use grpo_pipes::report::{self, ReportArgs};
use serde::Serialize;

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
    /// Also compare strict accuracy, prompt by prompt, with that of these scored rollouts of another model: the difference, an exact
    /// test of which is better, and how many prompts would show smaller differences. Repeat it to pool files, such as those of several
    /// seeds
    #[arg(long, value_name = "FILE", conflicts_with = "compare")]
    baseline: Vec<PathBuf>,
    #[command(flatten)]
    report: ReportArgs,
}

/// A summary with the comparison, as JSON.
#[derive(Serialize)]
struct Both {
    #[serde(flatten)]
    summary: Summary,
    paired: Paired,
}

impl Args {
    /// The summary as text, with the comparison where one is asked for.
    fn text(&self) -> Result<String> {
        let (mut fold, mut outcomes) = (Fold::default(), Outcomes::default());
        for file in &self.files {
            for line in Input::open(file)? {
                let line = line?;
                fold.add(&line)?;
                if !self.baseline.is_empty() {
                    outcomes.add(&line)?;
                }
            }
        }
        let summary = fold.finish()?;
        if self.baseline.is_empty() {
            return Ok(if self.json { summary.to_json() } else { summary.to_string() });
        }
        let mut baseline = Outcomes::default();
        for file in &self.baseline {
            Input::open(file)?.try_for_each(|line| baseline.add(&line?))?;
        }
        let paired = Paired::of(&outcomes, &baseline)?;
        Ok(match self.json {
            true => serde_json::to_string(&Both { summary, paired }).expect("plain data serialises"),
            false => format!("{summary}\n{paired}"),
        })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    run_filter("evaluate", &args.output, |out| {
        if let Some(file) = &args.report.html {
            let mut page = Output::create(Some(file))?;
            page.write_lines(report::page(&args.report)?.as_bytes())?;
            return page.finish();
        }
        if !args.compare.is_empty() {
            return out.write_line(Comparison::read(&args.compare)?.to_string().as_bytes());
        }
        out.write_line(args.text()?.as_bytes())
    })
}
