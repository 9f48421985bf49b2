//! `export-hf`: a checkpoint in, a Hugging Face model directory, a zip file of it, or a GGUF file out.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
#[cfg(not(feature = "candle"))]
use grpo_pipes::Error;
use grpo_pipes::Result;
use grpo_pipes::checkpoint::export::{self, Card};
use grpo_pipes::checkpoint::{self, hub};
use grpo_pipes::command::report;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::quantization::Quantization;

/// Write a checkpoint as a model directory that transformers, vLLM and llama.cpp's converter load
///
/// Writes the weights (tied ones once), the tokenizer with its chat template, the generation config, and a model card.
#[derive(Parser)]
#[command(name = "export-hf", version)]
struct Args {
    /// Checkpoint or model directory, or a Hub id
    checkpoint: String,
    /// Directory to create, or file with --zip; it appears when it is complete
    out: PathBuf,
    /// Type to store the weights in; f32 keeps the trained bits
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Write a GGUF file for llama.cpp and Ollama, with weights of this type
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["dtype", "zip"])]
    gguf: Option<Quantization>,
    /// Metrics of the run; the last line goes into the model card
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Output of `evaluate --json`, for the model card
    #[arg(long, value_name = "FILE")]
    evaluation: Option<PathBuf>,
    /// Write one zip file instead of a directory
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
    if let Some(quantization) = args.gguf {
        return gguf(args, &checkpoint, quantization, &card);
    }
    let export = if args.zip { export::archive } else { export::directory };
    export(&checkpoint, &args.out, args.dtype, &card)
}

#[cfg(feature = "candle")]
fn gguf(args: &Args, checkpoint: &Path, quantization: Quantization, card: &Card) -> Result<()> {
    export::gguf::directory(checkpoint, &args.out, quantization, card)
}

#[cfg(not(feature = "candle"))]
fn gguf(_: &Args, _: &Path, _: Quantization, _: &Card) -> Result<()> {
    Err(Error::Usage("--gguf: this build lacks the feature candle; `cargo build --release` has it".into()))
}
