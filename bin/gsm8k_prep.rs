//! `gsm8k-prep`: turns GSM8K rows, or generated problems in their form, into prompts.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::checkpoint::hub;
use grpo_pipes::command::{self, OutputArgs};
use grpo_pipes::gsm8k::columns::AskedColumns;
use grpo_pipes::gsm8k::demonstration::Sloppiness;
use grpo_pipes::gsm8k::generate::{Problems, generate};
use grpo_pipes::gsm8k::order::{RowOrder, Steps};
use grpo_pipes::gsm8k::pass_rates::{LeftOut, PassRates};
use grpo_pipes::gsm8k::prompt::{PromptStyle, SYSTEM_PROMPT};
use grpo_pipes::gsm8k::source::{self, RowSource, RowStream};
use grpo_pipes::gsm8k::{Split, lm_eval, run};
use grpo_pipes::lines::jsonl::Output;
use grpo_pipes::process::message::note;
use grpo_pipes::reward::lm_eval::LmEvalTask;
use grpo_pipes::{Error, Result};

/// Turn GSM8K rows, or generated problems in their form, into prompts
///
/// Finds the question and answer fields by name (question, problem, instruction; answer, solution, output and others), and the answer
/// after `####`, in the last `\boxed{}`, or as the whole of a short field. A message says what was taken. Rows without an answer are
/// skipped and counted on standard error.
#[derive(Parser)]
#[command(name = "gsm8k-prep", version)]
pub struct Args {
    /// Hub data set, directory, or .parquet or .jsonl file, also compressed as .zst or .gz; `-` is JSONL on standard input
    #[arg(value_name = "SOURCE", default_value = "openai/gsm8k")]
    source: String,
    /// Field with the question [default: the first of question, problem, instruction, query, prompt]
    #[arg(long, value_name = "NAME", conflicts_with = "generate")]
    question_field: Option<String>,
    /// Field with the answer [default: the first of answer, solution, final_answer, output, response, ground_truth,
    /// completion]
    #[arg(long, value_name = "NAME", conflicts_with = "generate")]
    answer_field: Option<String>,
    /// Generate N distinct short problems instead; no question is in two splits
    #[arg(long, value_name = "N", conflicts_with = "source")]
    generate: Option<usize>,
    /// Largest number in a generated problem, its reasoning and its answer
    #[arg(long, value_name = "NUMBER", default_value_t = 10, requires = "generate",
          value_parser = clap::value_parser!(u32).range(5..=999))]
    max_number: u32,
    /// Split to take [default: the one in the file's name, else train]
    #[arg(long, value_enum)]
    split: Option<Split>,
    /// Hold out the last N rows of the shuffled train split; --split validation with the same N and seed takes them
    #[arg(long, value_name = "N", default_value_t = 0)]
    holdout: usize,
    /// Shuffle the rows, each epoch differently
    #[arg(long)]
    shuffle: bool,
    /// Seed of everything random
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Write all rows N times; a row keeps its prompt_id
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Write at most N rows, the same in each epoch
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Scored rollouts, a file or a directory like runs/NAME/rollouts: write only problems that they solved at times, not always. With
    /// --limit, those with the largest p (1 - p) for a pass rate p. Can be given several times
    #[arg(long, value_name = "PATH", conflicts_with = "demonstrations")]
    pass_rates: Vec<PathBuf>,
    /// Write the rows of N steps, whole ones of each epoch
    #[arg(long, value_name = "N", requires = "groups_per_step")]
    steps: Option<usize>,
    /// Rows per step of --steps
    #[arg(long, value_name = "N", requires = "steps")]
    groups_per_step: Option<NonZeroUsize>,
    /// File with the system prompt; an empty one means no system message [default: the XML format]
    #[arg(long, value_name = "FILE")]
    system_prompt: Option<PathBuf>,
    /// Put a worked example before the question
    #[arg(long)]
    one_shot: bool,
    /// Write the test split's questions as lm-evaluation-harness asks them: a text with examples, for `rollout --raw`, or without that
    /// as the harness does under --apply_chat_template. gsm8k needs a SOURCE with both splits
    #[arg(long, value_name = "TASK", value_enum,
          conflicts_with_all = ["split", "generate", "system_prompt", "one_shot", "demonstrations"])]
    lm_eval: Option<LmEvalTask>,
    /// Add a "completion" made from the row's own reasoning, for a supervised start
    #[arg(long)]
    demonstrations: bool,
    /// Fraction of demonstrations in a broken format, 0 to 1; the wording of the question decides which format
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0, requires = "demonstrations", value_parser = fraction)]
    sloppy_format: f64,
    /// Fraction of demonstrations whose result is off by one or two, 0 to 1
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0, requires = "demonstrations", value_parser = fraction)]
    sloppy_arithmetic: f64,
    /// First part of each prompt_id [default: the Hub data set's name, gsm8k for files, or generated]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

fn fraction(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|value| (0.0..=1.0).contains(value)).ok_or_else(|| "not a number from 0 to 1".into())
}

fn main() -> ExitCode {
    let args = Args::parse();
    command::run_filter("gsm8k-prep", &args.output, |out| prepare(&args, out))
}

fn prepare(args: &Args, out: &mut Output) -> Result<()> {
    let split = args.split.or(args.lm_eval.map(|_| Split::Test));
    let (name, split, mut found) = rows(args, split)?;
    if let Some(task) = args.lm_eval {
        found = lm_eval::ask(task, found, || examples(args))?;
    }
    let &Args { holdout, shuffle, seed, epochs, limit, one_shot, .. } = args;
    let system = match &args.system_prompt {
        Some(path) => std::fs::read_to_string(path).map_err(Error::io(path))?,
        None => SYSTEM_PROMPT.into(),
    };
    let sloppy = Sloppiness { format: args.sloppy_format, arithmetic: args.sloppy_arithmetic };
    let demonstrations = args.demonstrations.then_some(sloppy);
    let style = PromptStyle {
        name: args.name.clone().unwrap_or(name),
        system,
        as_text: args.lm_eval.is_some(),
        one_shot,
        demonstrations,
        seed,
    };
    let steps = args.steps.zip(args.groups_per_step).map(|(count, rows)| Steps { count, rows: rows.get() });
    let order = RowOrder { split, holdout, shuffle, seed, epochs, limit, usefulness: None, steps };
    let rates = (!args.pass_rates.is_empty()).then(|| PassRates::read(&args.pass_rates)).transpose()?;
    let skipped = run::prepare(found, &order, rates.as_ref(), &style, out)?;
    if let Some(LeftOut { unmeasured, never, always }) = skipped.left_out {
        let what =
            format!("left out {unmeasured} problems without rollouts, {never} never solved and {always} always solved");
        note("gsm8k-prep", &what);
    }
    if skipped.unanswered > 0 {
        let what = if args.demonstrations { "an answer and reasoning" } else { "an answer" };
        note("gsm8k-prep", &format!("skipped {} rows without {what}", skipped.unanswered));
    }
    Ok(())
}

/// The rows that examples come from.
fn examples(args: &Args) -> Result<RowStream> {
    if matches!(RowSource::parse(&args.source), RowSource::File(_)) {
        let what = "--lm-eval gsm8k takes examples from the train split: give a directory or data set with both splits";
        return Err(Error::Usage(format!("{what}, and not {}", args.source)));
    }
    Ok(rows(args, Some(Split::Train))?.2)
}

/// The data set's name, the split, and its rows.
fn rows(args: &Args, asked_split: Option<Split>) -> Result<(String, Split, RowStream)> {
    let split = asked_split.unwrap_or(Split::Train);
    if let Some(count) = args.generate {
        let rows = generate(Problems { count, max_number: args.max_number, seed: args.seed }, split)?;
        return Ok(("generated".into(), split, Box::new(rows.into_iter().map(Ok))));
    }
    let asked = AskedColumns { question: args.question_field.clone(), answer: args.answer_field.clone() };
    match RowSource::parse(&args.source) {
        RowSource::File(path) => {
            Ok(("gsm8k".into(), source::split_of_file(&path, asked_split)?, source::rows(&path, &asked)?))
        }
        RowSource::Directory(dir) => {
            Ok(("gsm8k".into(), split, source::rows_of_all(source::files_in(&dir, split)?, &asked)?))
        }
        RowSource::Hub(id) => {
            let files = hub::data_files(&id, |names| source::files_of_split(names, split))?;
            let name = id.rsplit('/').next().unwrap_or(&id);
            Ok((name.into(), split, source::rows_of_all(files, &asked)?))
        }
    }
}
