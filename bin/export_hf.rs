//! `export-hf`: a checkpoint in, a Hugging Face model directory, a zip file of it, a GGUF file, or a repository on the Hub out; or scored
//! rollouts in, a data set out.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use grpo_pipes::checkpoint;
use grpo_pipes::checkpoint::export::{self, Card, rollouts};
use grpo_pipes::checkpoint::hub::push::{Push, PushArgs, PushFile};
use grpo_pipes::checkpoint::hub::{self, RepoKind};
use grpo_pipes::command::{OutputArgs, Report, report};
use grpo_pipes::dataset;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::quantization::Quantization;
use grpo_pipes::process::message::note;
use grpo_pipes::{Error, Result};
use tempfile::TempDir;

/// Write a checkpoint as a model directory that transformers, vLLM and llama.cpp's converter load
///
/// Writes the weights (tied ones once), the tokenizer with its chat template, the generation config, and a model card.
///
/// Of scored rollouts, it writes a data set instead: the right completions without those that are much like another, as messages.jsonl (TRL,
/// OpenAI) and sharegpt.jsonl, with a card. A completion is right if its reward "correctness", else "math", else the sum is above 0.
#[derive(Parser)]
#[command(name = "export-hf", version)]
pub struct Args {
    /// Checkpoint or model directory, or a Hub id; or a .jsonl file of scored rollouts (`-` is standard input)
    checkpoint: String,
    /// Directory to create, or file with --zip; it appears when it is complete. Files of a data set are replaced
    #[arg(required_unless_present = "hub")]
    out: Option<PathBuf>,
    /// Type to store the weights in; f32 keeps the trained bits
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Write a GGUF file for llama.cpp and Ollama, with weights of this type
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["dtype", "zip"])]
    gguf: Option<Quantization>,
    /// Write the adapter (LoRA) that the checkpoint is, as PEFT reads it, instead of the model that it makes with its base
    #[arg(long, conflicts_with_all = ["dtype", "zip", "gguf"])]
    adapter: bool,
    /// Metrics of the run; the last line goes into the model card
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Output of `evaluate --json`, for the model card
    #[arg(long, value_name = "FILE")]
    evaluation: Option<PathBuf>,
    /// Write one zip file instead of a directory
    #[arg(long)]
    zip: bool,
    /// Licence for the card, by the Hub's name for it, such as apache-2.0 [default: that of the checkpoint's LICENSE file]
    #[arg(long, value_name = "NAME")]
    license: Option<String>,
    #[command(flatten)]
    push: PushArgs,
}

fn main() -> ExitCode {
    report("export-hf", run(&Args::parse()))
}

/// Whether a name is that of records, not of a model.
fn is_records(name: &str) -> bool {
    name == "-" || rollouts::ENDINGS.iter().any(|ending| name.ends_with(ending))
}

fn run(args: &Args) -> Result<()> {
    if let Some(out) = &args.out {
        return match is_records(&args.checkpoint) {
            true => export_records(args, out),
            false => export(args, out, None),
        };
    }
    let kept = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let say = |words: &str| note("export-hf", words);
    let mut report = Report::create(&OutputArgs { output: None })?;
    for line in push(args, &kept, &say)? {
        report.write(line.as_bytes());
    }
    report.finish()
}

/// Writes the data set of scored rollouts.
fn export_records(args: &Args, out: &Path) -> Result<()> {
    let has_license = args.license.is_some();
    if args.zip
        || args.adapter
        || has_license
        || args.gguf.is_some()
        || args.metrics.is_some()
        || args.evaluation.is_some()
    {
        let what = "--zip, --adapter, --license, --gguf, --metrics and --evaluation are for models, not for rollouts";
        return Err(Error::Usage(what.into()));
    }
    dataset::export(Path::new(&args.checkpoint), out).map(drop)
}

/// Uploads the export, or records; returns the lines that tell where.
fn push(args: &Args, kept: &TempDir, say: &dyn Fn(&str)) -> Result<Vec<String>> {
    let name = |id: &str| id.rsplit('/').next().unwrap_or(id).to_owned();
    if let Some(id) = &args.push.push_dataset {
        let push = Push::new(RepoKind::Dataset, id, &args.push)?;
        let (source, card) = (Path::new(&args.checkpoint), kept.path().join("README.md"));
        let files = match dataset::names_in(source) {
            Some(_) if args.license.is_some() => {
                let readme = source.join("README.md");
                return Err(Error::Usage(format!(
                    "--license: write it into the card that is there, {}",
                    readme.display()
                )));
            }
            Some(names) => names.map(|name| PushFile { path: source.join(name), name: name.into() }).into(),
            None => rollouts::files(source, &name(id), args.license.as_deref(), &card)?,
        };
        return push.files(&files, say);
    }
    let id = args.push.push.as_ref().expect("clap requires OUT without it");
    let push = Push::new(RepoKind::Model, id, &args.push)?;
    let out = kept.path().join("export");
    export(args, &out, Some(&name(id)))?;
    push.files(&PushFile::all_in(&out)?, say)
}

/// Writes the export to `out`; its card calls the model `name`, or as the checkpoint's directory is called.
fn export(args: &Args, out: &Path, name: Option<&str>) -> Result<()> {
    checkpoint::refuse_existing(out)?;
    let checkpoint = hub::model_dir(&args.checkpoint)?;
    checkpoint::verify(&checkpoint)?;
    let card = Card::of(&checkpoint, args.metrics.as_ref(), args.evaluation.as_ref())?;
    let card = card.with_license(args.license.as_deref());
    let card = if let Some(name) = name { card.with_name(name) } else { card };
    if let Some(quantization) = args.gguf {
        return gguf(&checkpoint, out, quantization, &card);
    }
    if args.adapter {
        return export::adapter::directory(&checkpoint, out, &card);
    }
    let export = if args.zip { export::archive } else { export::directory };
    export(&checkpoint, out, args.dtype, &card)
}

#[cfg(feature = "candle")]
fn gguf(checkpoint: &Path, out: &Path, quantization: Quantization, card: &Card) -> Result<()> {
    export::gguf::directory(checkpoint, out, quantization, card)
}

#[cfg(not(feature = "candle"))]
fn gguf(_: &Path, _: &Path, _: Quantization, _: &Card) -> Result<()> {
    Err(Error::Usage("--gguf: this build lacks the feature candle; `cargo build --release` has it".into()))
}
