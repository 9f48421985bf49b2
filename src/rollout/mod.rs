//! Prompts in, rollouts out: what the `rollout` command does between its options and the engine.

mod follow;
mod prompts;
mod records;
mod seat;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::ahead::Ahead;
use crate::cli::note;
use crate::engine::Settings;
use crate::error::{Error, Result};
use crate::jsonl::{Input, Output};
use crate::model::Config;
use crate::policy;
use crate::progress::Progress;
use crate::stop::Stop;
use crate::tokenizer::{Tokenizer, stop_ids};

pub use follow::{Steps, follow};
pub use prompts::{Format, Limits, LongPrompt, Prompts, Source};
pub use records::{Origin, Records};
pub use seat::Place;
use seat::Seat;

/// What to sample.
#[derive(Clone)]
pub struct Job {
    /// Where to compute.
    pub place: Place,
    /// How lines become prompts.
    pub prompts: Prompts,
    /// How prompts become completions; stop ids and step are filled in from the model's directory.
    pub settings: Settings,
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
    fn new(job: Job, dir: &Path, unique_among: Option<usize>) -> Result<Self> {
        let mut settings = job.settings.clone();
        settings.sampling.check()?;
        let config = Config::load(dir)?;
        let identity = policy::identity(dir)?;
        settings.stop_ids = stop_ids(dir)?;
        settings.step = identity.step;
        let positions = config.positions();
        if settings.max_completion_tokens >= positions {
            return Err(Error::Usage(format!(
                "max-completion-tokens leaves no room for a prompt in {positions} positions"
            )));
        }
        let limits =
            prompts::Limits { positions: positions - settings.max_completion_tokens, vocabulary: config.vocab_size };
        let tokenizer = Arc::new(Tokenizer::load(dir)?);
        let seat = Seat::take(&job, dir, &settings, |plan| note("rollout", plan))?;
        let source = Source::new(job.prompts, limits, Arc::clone(&tokenizer), unique_among);
        let (step, temperature) = (identity.step, settings.sampling.temperature);
        let origin = Origin { identity, step, seed: settings.seed, temperature };
        Ok(Self { seat, settings, origin, tokenizer, source })
    }
}
