//! Prompts in, rollouts out: what the `rollout` command does between its options and the engine.

mod backend;
mod follow;
mod prompts;
mod records;
mod room;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::checkpoint;
use crate::engine::Settings;
use crate::error::Result;
use crate::lines::jsonl::{Input, Output};
use crate::lines::read_ahead::Ahead;
use crate::model::Config;
use crate::process::cancel::Stop;
use crate::process::command::detail;
use crate::process::progress::Progress;
use crate::tokenizer::{Tokenizer, stop_ids};

pub use backend::Place;
use backend::Seat;
pub use follow::{Steps, follow};
pub use prompts::{Format, Limits, LongPrompt, Prompts, Source};
pub use records::{Origin, Records};
pub use room::Asked;

/// What to sample.
#[derive(Clone)]
pub struct Job {
    /// Where to compute.
    pub place: Place,
    /// How lines become prompts.
    pub prompts: Prompts,
    /// A file with another chat template than the model's.
    pub chat_template: Option<PathBuf>,
    /// How prompts become completions; stop ids, step and lengths are filled in when the model is known.
    pub settings: Settings,
    /// How much of what is to be decided by the model and the device somebody has decided.
    pub asked: Asked,
    /// Ends the sampling early; groups that are whole by then are written.
    pub stop: Stop,
}

/// Samples a group for each line of `input` from the model in `dir`.
///
/// # Errors
/// What is wrong with an option, the model, a line, or the numbers; lines before a bad one are sampled and written first.
pub fn run(job: Job, dir: &Path, input: Input, out: &mut Output) -> Result<()> {
    let Ready { mut seat, settings, origin, tokenizer, mut source } = Ready::new(job, dir, None)?;
    let skipped = source.skipped();
    let mut progress = Progress::new("rollout");
    let requests = Ahead::of_lines(input, move |line| source.request(line));
    let mut records = Records::new(origin, tokenizer, out, &mut progress);
    let work = seat.sample(&settings, requests, &mut records)?;
    records.finish(work, skipped.load(Ordering::Relaxed));
    Ok(())
}

/// A job and the model it is for, found to fit together.
struct Ready {
    seat: Seat,
    settings: Settings,
    origin: Origin,
    tokenizer: Arc<Tokenizer>,
    source: Source,
}

impl Ready {
    /// Opens the model in `dir`; see [`Source::new`] for `unique_among`.
    fn new(mut job: Job, dir: &Path, unique_among: Option<usize>) -> Result<Self> {
        job.settings.sampling.check()?;
        let config = Config::load(dir)?;
        let identity = checkpoint::identity(dir)?;
        let positions = config.positions();
        let (prompt, completion) = job.asked.lengths(positions)?;
        job.prompts.max_tokens = prompt;
        job.settings.max_completion_tokens = completion;
        job.settings.stop_ids = stop_ids(dir)?;
        job.settings.step = identity.step;
        let limits = prompts::Limits { positions: positions - completion, vocabulary: config.vocab_size };
        let tokenizer = Arc::new(Tokenizer::with_template(dir, job.chat_template.as_deref())?);
        if !job.prompts.raw {
            tokenizer.check_template()?;
        }
        let seat = Seat::take(&mut job, dir, |words| detail("rollout", words))?;
        let source = Source::new(job.prompts, limits, Arc::clone(&tokenizer), unique_among);
        let settings = job.settings;
        let (step, temperature) = (identity.step, settings.sampling.temperature);
        let origin = Origin { identity, step, seed: settings.seed, temperature };
        Ok(Self { seat, settings, origin, tokenizer, source })
    }
}
