//! `export-hf`: a checkpoint in, a Hugging Face model directory or zip file out.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::Result;
use grpo_pipes::checkpoint::export::{self, Card};
use grpo_pipes::checkpoint::{self, hub};
use grpo_pipes::command::report;
use grpo_pipes::numbers::dtype::Dtype;

/// Write a checkpoint as a model directory that transformers, vLLM and llama.cpp's converter load
///
/// Tied weights once, the tokenizer and its chat template, the generation config, and a model card.
#[derive(Parser)]
#[command(name = "export-hf", version)]
struct Args {
    /// Checkpoint or model directory, or a Hub id
    checkpoint: String,
    /// Directory, or with --zip the file, to make; it appears when it is whole
    out: PathBuf,
    /// How to store the weights; f32 is what was trained, bit for bit
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// The run's metrics; the last line goes into the model card
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// What `evaluate --json` wrote, for the model card
    #[arg(long, value_name = "FILE")]
    evaluation: Option<PathBuf>,
    /// One zip file instead of a directory
    #[arg(long)]
    zip: bool,
}

fn main() -> ExitCode {
    report("export-hf", run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    checkpoint::refuse_existing(&args.out)?;
    let checkpoint = hub::model_dir(&args.checkpoint)?;
    checkpoint::verify(&checkpoint)?;
    let card = Card::of(&checkpoint, args.metrics.as_ref(), args.evaluation.as_ref())?;
    let export = if args.zip { export::archive } else { export::directory };
    export(&checkpoint, &args.out, args.dtype, &card)
}
