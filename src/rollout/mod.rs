//! The `rollout` command below its options: prompts in, sampled completions out.
//!
//! A line becomes a request ([`RequestBuilder`]), the engine samples a group for it on a `backend`, and [`RecordWriter`] writes one
//! record per sample. `follow` does so for a whole run, step by step, with weights that change.

mod backend;
mod conversation;
mod follow;
mod grown;
mod records;
mod requests;
mod serve;
mod server;
mod shard;
mod sizes;
mod source;
mod tags;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::checkpoint::hub;
use crate::engine::{Request, Settings};
use crate::error::{Error, Result};
use crate::lines::batches::read_ahead;
use crate::lines::jsonl::{Input, Output};
use crate::lines::record::Line;
use crate::model::Sampling;
use crate::process::cancel::Stop;
use crate::process::message::detail;
use crate::process::progress::Progress;
use crate::process::read_ahead::ReadAhead;
use crate::run::Run;
use crate::tokenizer::{TemplateArgs, Tokenizer};

pub use backend::BackendOptions;
use backend::SamplingBackend;
pub use conversation::converse;
pub use follow::FollowOptions;
use follow::follow;
use grown::GrownFile;
pub use records::{Origin, RecordWriter};
pub use requests::{LineFormat, LongPrompt, ModelLimits, PromptOptions, RequestBuilder};
pub use serve::{ServeOptions, serve};
pub use server::ServerOptions;
pub use shard::Shard;
pub use sizes::RequestedSizes;
pub use source::Source;

const NAME: &str = "rollout";

/// Whether a request's completions are there already.
type IsDone = Box<dyn Fn(&Request<Line>) -> Result<bool> + Send>;

/// The weights to sample from.
#[derive(Debug, Clone)]
pub enum Policy {
    /// A model directory, a checkpoint, a GGUF file, or the Hub id of a model; and the name of a file in it.
    Model(String, Option<String>),
    /// Those of each step of the run in this directory.
    Run(PathBuf, FollowOptions),
    /// Those behind a server.
    Server(ServerOptions),
}

/// What to sample, and how.
#[derive(Clone)]
pub struct RolloutJob {
    /// Where to compute.
    pub backend: BackendOptions,
    /// How lines become prompts.
    pub prompts: PromptOptions,
    /// Another chat template than the model's, and variables for it.
    pub template: TemplateArgs,
    /// The part of the prompts to sample; `None` for all.
    pub shard: Option<Shard>,
    /// Completions of each prompt.
    pub group_size: usize,
    /// The distribution to sample from.
    pub sampling: Sampling,
    /// Seed of all draws.
    pub seed: u64,
    /// Lengths, and sequences at once, as far as they were requested.
    pub sizes: RequestedSizes,
    /// A file to append records to; prompts whose groups it has are not sampled again.
    pub jsonl: Option<PathBuf>,
    /// Ends the sampling early; groups that are complete by then are written.
    pub stop: Stop,
}

/// Samples for the prompts in `file` (`-` is standard input) until they end, or a signal requests a stop.
///
/// # Errors
/// [`Error::Usage`] for `--on-long-prompt skip` with a run, else those of [`sample`] and of the run's lock and weights.
pub fn run(policy: &Policy, mut job: RolloutJob, file: &Path, out: &mut Output) -> Result<()> {
    // Signals are handled only after a download, which they should end at once.
    let model = match policy {
        Policy::Model(spec, file) => {
            Some(Source::open(&hub::model(spec, file.as_deref(), &Source::other_types())?, &job.backend.device)?)
        }
        Policy::Run(..) | Policy::Server(_) => None,
    };
    job.stop = Stop::on_signals()?;
    let lines = job.shard.map_or(Ok(0..u64::MAX), |shard| shard.lines_of(file))?;
    let input = Input::open_until(file, &job.stop)?;
    match (policy, model) {
        (_, Some(model)) => sample(job, &model, (input, lines), out),
        (Policy::Run(..), _) if job.prompts.on_long == LongPrompt::Skip => Err(Error::Usage(
            "--on-long-prompt skip does not go with --follow: each step takes a fixed range of prompts".into(),
        )),
        (Policy::Run(dir, options), _) => follow(job, &Run::new(dir), *options, input, out),
        (Policy::Server(options), _) => server::sample_from(options, job, (input, lines), out),
        (Policy::Model(..), None) => unreachable!("opened above"),
    }
}

/// Samples a group for each of these lines of `input` from a model.
///
/// # Errors
/// [`Error::Usage`] for options that do not fit together or the model, [`Error::Record`] for a line (those before it are sampled and
/// written first), and the errors of the model, the device, the output and the stop.
pub fn sample(job: RolloutJob, model: &Source, (input, lines): (Input, Range<u64>), out: &mut Output) -> Result<()> {
    let (path, grown) = (job.jsonl.clone(), job.jsonl.as_deref().map(GrownFile::open).transpose()?);
    let Ready { mut backend, settings, origin, tokenizer, requests } = Ready::new(job, model, None)?;
    let mut growing = None;
    let mut is_done: IsDone = Box::new(|_| Ok(false));
    if let (Some(path), Some(grown)) = (&path, grown) {
        grown.check(&origin, settings.group_size)?;
        if grown.prompts() > 0 {
            detail(NAME, &format!("{} has the completions of {} prompts", path.display(), grown.prompts()));
        }
        let (file, done) = grown.into_parts();
        (growing, is_done) = (Some(Output::growing(path, file)), done);
    }
    let out = growing.as_mut().unwrap_or(out);
    let skipped = requests.skipped();
    let mut progress = Progress::new(NAME);
    let requests = requests_of(input, lines, requests, is_done);
    let mut records = RecordWriter::new(origin, tokenizer, out, &mut progress);
    let work = backend.sample(&settings, requests, &mut records)?;
    records.finish(work, skipped.load(Ordering::Relaxed));
    growing.map_or(Ok(()), Output::finish)
}

/// The requests of these lines of an input, except for those that are done.
fn requests_of(
    input: Input,
    lines: Range<u64>,
    mut builder: RequestBuilder,
    is_done: IsDone,
) -> ReadAhead<Request<Line>> {
    let mut place = 0;
    read_ahead(input, move |line| {
        place += 1;
        if place > lines.end {
            return Ok(None);
        }
        // Lines before the part are requests too: how often a prompt has occurred is part of its name.
        match builder.build(line)?.filter(|_| place > lines.start) {
            Some(request) if is_done(&request)? => Ok(None),
            request => Ok(request),
        }
    })
}

/// A job on the model it is for.
struct Ready {
    backend: SamplingBackend,
    settings: Settings,
    origin: Origin,
    tokenizer: Arc<Tokenizer>,
    requests: RequestBuilder,
}

impl Ready {
    /// Loads a model and checks that the job fits it; see [`RequestBuilder::new`] for `unique_among`.
    fn new(job: RolloutJob, model: &Source, unique_among: Option<usize>) -> Result<Self> {
        job.sampling.check()?;
        let system = job.prompts.format.system_prompt(model.dir())?;
        let fits = model.limits()?;
        let identity = model.identity()?;
        let lengths = job.sizes.lengths(fits.positions)?;
        let mut settings = Settings {
            group_size: job.group_size,
            max_sequences: 0, // chosen by the backend
            max_completion_tokens: lengths.completion,
            sampling: job.sampling,
            stop_ids: model.stop_ids()?,
            seed: job.seed,
            step: identity.step,
        };
        let limits = ModelLimits {
            prompt_tokens: lengths.prompt,
            positions: fits.positions - lengths.completion,
            vocabulary: fits.vocabulary,
        };
        let tokenizer = Arc::new(model.tokenizer(&job.template)?);
        if !job.prompts.raw {
            tokenizer.check_template()?;
        }
        let backend = SamplingBackend::open(&job, model, limits, &mut settings, |words| detail(NAME, words))?;
        let origin = Origin { step: identity.step, identity, seed: job.seed, temperature: job.sampling.temperature };
        let requests = RequestBuilder::new(job.prompts, system, limits, Arc::clone(&tokenizer), unique_among);
        Ok(Self { backend, settings, origin, tokenizer, requests })
    }
}
