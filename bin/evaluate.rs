//! `evaluate`: computes accuracies and other rates from scored rollouts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::command::{OutputArgs, run_filter};
use grpo_pipes::error::Result;
use grpo_pipes::eval::{Comparison, DIFFERENCES, Fold, Judge, Outcomes, Paired, Power, Study, Summary};
use grpo_pipes::lines::jsonl::{Input, Output};
use grpo_pipes::report::{self, ReportArgs};
use grpo_pipes::reward::lm_eval::LmEvalTask;
use serde::Serialize;

/// Compute accuracies, rates, means and pass@k from scored rollouts
///
/// Strict accuracy: "rewards.correctness" is above 0. Flexible accuracy: the last number of the completion equals the answer. Math
/// accuracy: the answer that the reward math finds is right. Format: "rewards.strict_format" is above 0. Truncated: "finish_reason" is
/// "length". pass@k is the unbiased estimate, averaged over prompts; maj@k is the vote of the first k completions.
///
/// With one completion per prompt, the 95 % intervals are Wilson's. With more, completions of a prompt are correlated: the intervals are
/// then Wilson's for the effective number of completions, estimated from the variance between prompts.
#[derive(Debug, Parser)]
#[command(name = "evaluate", version)]
pub struct Args {
    /// Files of scored rollouts, evaluated together (`.zst` is decompressed); `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    /// Print one JSON object instead of a table; rates are fractions of 1
    #[arg(long)]
    json: bool,
    /// Judge as lm-evaluation-harness does in TASK, without rewards: strict is its strict-match, flexible its flexible-extract, and
    /// completions end before its stop sequences. The prompts should be those of `gsm8k-prep --lm-eval TASK`
    #[arg(long, value_name = "TASK", value_enum)]
    lm_eval: Option<LmEvalTask>,
    /// Print a table of the rates before and after, from two files that --json wrote; repeat it for another pair
    #[arg(long, value_names = ["BEFORE", "AFTER"], num_args = 2, conflicts_with_all = ["files", "json", "lm_eval"])]
    compare: Vec<PathBuf>,
    /// Also compare strict accuracy, prompt by prompt, with that of these scored rollouts of another model: the difference, an exact
    /// test of which is better, and how many prompts would show smaller differences. Repeat it to pool files, such as those of several
    /// seeds
    #[arg(long, value_name = "FILE", conflicts_with = "compare")]
    baseline: Vec<PathBuf>,
    /// Print how many prompts it takes to show these differences in strict accuracy, as fractions of 1, by McNemar's test at a level of
    /// 5 % with a power of 80 %: for two models that disagree as often as FILE and --baseline or, without it, for two as accurate as
    /// FILE that are right independently of each other, which takes more [default with --baseline: 0.01,0.02,0.05]
    #[arg(long, value_name = "D,...", value_delimiter = ',', value_parser = difference, conflicts_with = "compare")]
    power: Vec<f64>,
    /// Rank the variants of a study by sampled strict accuracy, from the evaluations in the directories VARIANT-SEED of finished runs;
    /// the first one's variant is what the others are compared with, seed by seed
    #[arg(long, value_name = "RUN", num_args = 1.., conflicts_with_all = ["files", "json", "lm_eval", "compare", "baseline", "power"])]
    study: Vec<PathBuf>,
    #[command(flatten)]
    report: ReportArgs,
}

fn difference(text: &str) -> std::result::Result<f64, String> {
    let number = text.parse().ok().filter(|value| *value > 0.0 && *value <= 1.0);
    number.ok_or_else(|| "not a number above 0 and at most 1".into())
}

/// A summary with what else was asked for, as JSON.
#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    summary: Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    paired: Option<Paired>,
    #[serde(flatten)]
    power: Option<Power>,
}

impl Args {
    /// The summary as text, with the comparison where one is asked for.
    fn text(&self) -> Result<String> {
        let judge = Judge::from(self.lm_eval);
        let (mut fold, mut outcomes) = (Fold::new(judge), Outcomes::new(judge));
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
        let mut answer = Answer { summary, paired: None, power: None };
        if !self.baseline.is_empty() {
            let mut baseline = Outcomes::new(judge);
            for file in &self.baseline {
                Input::open(file)?.try_for_each(|line| baseline.add(&line?))?;
            }
            let to_show = if self.power.is_empty() { &DIFFERENCES } else { &self.power[..] };
            answer.paired = Some(Paired::of(&outcomes, &baseline, to_show)?);
        } else if !self.power.is_empty() {
            answer.power = answer.summary.accuracy_strict.map(|rate| Power::of_independent(rate.value, &self.power));
        }
        if self.json {
            return Ok(serde_json::to_string(&answer).expect("plain data serialises"));
        }
        let more = [answer.paired.map(|paired| paired.to_string()), answer.power.map(|power| power.to_string())];
        let more: String = more.into_iter().flatten().map(|text| format!("\n{text}")).collect();
        Ok(answer.summary.to_string() + &more)
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
        if !args.study.is_empty() {
            return out.write_line(Study::read(&args.study)?.to_string().as_bytes());
        }
        if !args.compare.is_empty() {
            return out.write_line(Comparison::read(&args.compare)?.to_string().as_bytes());
        }
        out.write_line(args.text()?.as_bytes())
    })
}
