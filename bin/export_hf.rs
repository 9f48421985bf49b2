//! `export-hf`: a checkpoint in, a Hugging Face model directory, a zip file of it, or a GGUF file out; or scored rollouts in, a data set
//! out.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::checkpoint::export::{self, Card};
use grpo_pipes::checkpoint::{self, hub};
use grpo_pipes::command::report;
use grpo_pipes::dataset;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::quantization::Quantization;
use grpo_pipes::{Error, Result};

/// Write a checkpoint as a model directory that transformers, vLLM and llama.cpp's converter load
///
/// Writes the weights (tied ones once), the tokenizer with its chat template, the generation config, and a model card.
///
/// Of scored rollouts, it writes a data set instead: the right completions without those that are much like another, as messages.jsonl (TRL,
/// OpenAI) and sharegpt.jsonl, with a card. A completion is right if its reward "correctness", else "math", else the sum is above 0.
#[derive(Parser)]
#[command(name = "export-hf", version)]
struct Args {
    /// Checkpoint or model directory, or a Hub id; or a .jsonl file of scored rollouts (`-` is standard input)
    checkpoint: String,
    /// Directory to create, or file with --zip; it appears when it is complete. Files of a data set are replaced
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

/// Whether a name is that of records, not of a model.
fn is_records(name: &str) -> bool {
    name == "-" || [".jsonl", ".jsonl.zst", ".jsonl.gz"].iter().any(|ending| name.ends_with(ending))
}

fn run(args: &Args) -> Result<()> {
    if is_records(&args.checkpoint) {
        if args.zip || args.gguf.is_some() || args.metrics.is_some() || args.evaluation.is_some() {
            return Err(Error::Usage(
                "--zip, --gguf, --metrics and --evaluation are for models, not for rollouts".into(),
            ));
        }
        return dataset::export(Path::new(&args.checkpoint), &args.out).map(drop);
    }
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
