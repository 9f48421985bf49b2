//! Samples for a whole run: each step takes as many prompts as the trainer, and samples from the weights that the step before made. With
//! staleness N, from those of exactly N steps earlier.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::backend::SamplingBackend;
use super::records::RecordWriter;
use super::{NAME, Ready, RolloutJob, Source};
use crate::checkpoint::{Identity, State, identity};
use crate::engine::{Completion, Request, Sink, Work};
use crate::error::{Error, Result};
use crate::lines::batches::read_ahead;
use crate::lines::jsonl::{Input, Output};
use crate::lines::record::Line;
use crate::process::cancel::Stop;
use crate::process::message::{detail, note};
use crate::process::progress::Progress;
use crate::process::read_ahead::ReadAhead;
use crate::process::stopwatch::Stopwatch;
use crate::run::{HandoverOffers, Lock, PeerWatch, Role, Run, TrainerWatch, prompts_per_step, sampled_from};

/// How the prompts of a run become steps.
#[derive(Debug, Clone, Copy)]
pub struct FollowOptions {
    /// Prompts per step.
    pub groups_per_step: usize,
    /// How many steps sampling is ahead of training; with 0 each waits for the one before.
    pub max_staleness: u64,
    /// The most steps to sample.
    pub max_steps: Option<u64>,
    /// How many times `groups_per_step` a step may sample in all, as its trainer asks for more.
    pub dynamic_sampling: Option<u64>,
}

impl FollowOptions {
    fn prompts_per_step(&self) -> usize {
        prompts_per_step(self.groups_per_step, self.dynamic_sampling)
    }

    fn check_top_up(&self, due: usize) -> Result<()> {
        let most = self.prompts_per_step();
        if due <= most {
            return Ok(());
        }
        let what = format!(
            "the trainer asks for {due} groups of a step, and --dynamic-sampling here allows {most}; give both the same"
        );
        Err(Error::Usage(what))
    }

    /// A single step is sampled from the policy as it is, and needs no trainer meanwhile.
    fn needs_trainer(&self) -> bool {
        self.max_steps != Some(1) || self.max_staleness > 0 || self.dynamic_sampling.is_some()
    }
}

/// Samples the rest of a run's prompts, until they or the steps asked for end.
///
/// # Errors
/// Those of [`super::sample`]; [`Error::Usage`] when another process samples for the run, [`Error::Run`] when the trainer is gone,
/// [`Error::Abandoned`] when the next command in the pipe is, [`Error::Data`] when the last prompts are too few for a step.
pub fn follow(job: RolloutJob, run: &Run, options: FollowOptions, input: Input, out: &mut Output) -> Result<()> {
    let lock = Lock::take(run, Role::Sample)?;
    let ended = sample(job, run, options, input, out);
    lock.leave(&ended);
    ended
}

fn sample(job: RolloutJob, run: &Run, options: FollowOptions, mut input: Input, out: &mut Output) -> Result<()> {
    let start = run.newest_intact_step(&|_| ())?;
    let (dir, oldest) = (run.checkpoint(start), run.oldest_weights(start)?);
    input.skip_consumed(State::load(&dir)?.map_or(0, |state| state.prompts_consumed))?;
    let stop = job.stop.clone();
    let source = Source::open(&dir, &job.backend.device)?;
    let Ready { mut backend, mut settings, mut origin, tokenizer, mut requests } =
        Ready::new(job, &source, Some(options.prompts_per_step()))?;
    let mut requests = read_ahead(input, move |line| requests.build(line));
    let say = |words: &str| note(NAME, words);
    let _trainer = PeerWatch::start(run, Role::Train, &stop);
    let mut watch = TrainerWatch::of(run, &say, &stop, options.needs_trainer());
    let mut progress = Progress::new(NAME);
    let mut batch = next_batch(&mut requests, options.prompts_per_step())?;
    if options.needs_trainer() && !batch.is_empty() {
        watch.wait_for_start(start + 1)?;
    }
    let mut offers = HandoverOffers::of(run);
    let mut stopwatch = Stopwatch::new(["sampling", "waiting for weights", "loading them"]);
    while !batch.is_empty() {
        let weights = sampled_from(settings.step, options.max_staleness, oldest);
        if weights != origin.identity.step {
            let (began, waited) = (Instant::now(), watch.waited());
            origin.identity = next_weights(&mut watch, weights, &mut backend)?;
            let waited = watch.waited() - waited;
            stopwatch.add("waiting for weights", waited);
            stopwatch.add("loading them", began.elapsed() - waited);
        }
        origin.step = settings.step;
        accept_offer(&mut offers, &mut backend, &say)?;
        let (mut due, mut sampled) = (options.groups_per_step, 0);
        while sampled < due {
            let part = batch.drain(..(due - sampled).min(batch.len())).collect();
            let records = RecordWriter::new(origin.clone(), Arc::clone(&tokenizer), out, &mut progress);
            let mut sink = Watched { records, watch: &mut watch };
            let sample = || backend.sample(&settings, ReadAhead::ready(part), &mut sink);
            stopwatch.time("sampling", sample).map_err(|err| in_a_pipe(err, &stop))?;
            sampled = due;
            if !batch.is_empty() {
                let waited = watch.waited();
                due = watch.wait_for_top_up(settings.step, sampled)?.unwrap_or(due);
                stopwatch.add("waiting for weights", watch.waited() - waited);
                options.check_top_up(due)?;
            }
        }
        stopwatch.end_round();
        settings.step += 1;
        let is_last = options.max_steps.is_some_and(|steps| settings.step >= start + steps);
        batch = if is_last { Vec::new() } else { next_batch(&mut requests, options.prompts_per_step())? };
    }
    progress.detail(&format!("done in {:.1} s", progress.seconds()));
    stopwatch.report(&|words| detail(NAME, words));
    Ok(())
}

/// Accepts the trainer's offer to hand over weights within the GPU, if it has made one, before the step that these records train.
fn accept_offer(offers: &mut HandoverOffers, backend: &mut SamplingBackend, say: &dyn Fn(&str)) -> Result<()> {
    let Some(offer) = offers.look() else { return Ok(()) };
    match backend.accept(offer) {
        Ok(()) => {
            detail("rollout", "the weights of each step are copied within the GPU");
            offers.take()
        }
        Err(why) => {
            say(&format!("the weights of each step come through files in memory: {why}"));
            Ok(())
        }
    }
}

/// Waits for the weights of a step and loads them.
fn next_weights(watch: &mut TrainerWatch<'_>, step: u64, backend: &mut SamplingBackend) -> Result<Identity> {
    loop {
        let dir = watch.wait_for_weights(step)?;
        let found = made(&dir);
        let opened = backend.set_weights(&dir).and_then(|()| identity(&dir));
        // The directory may vanish or be replaced meanwhile: a trainer that ends removes it, which the next wait reports, and one
        // that resumes puts the same weights in place of those that a killed one left.
        if opened.is_ok() || made(&dir) == found && found.is_some() {
            return opened;
        }
    }
}

/// Identifies the directory at a path, if there is one.
fn made(dir: &Path) -> Option<(u64, SystemTime)> {
    fs::metadata(dir).and_then(|found| Ok((found.ino(), found.modified()?))).ok()
}

/// The prompts of the next step; none at the end of the input.
fn next_batch(requests: &mut ReadAhead<Request<Line>>, size: usize) -> Result<Vec<Request<Line>>> {
    let batch = requests.take(size).collect::<Result<Vec<_>>>()?;
    let found = batch.len();
    if 0 < found && found < size {
        return Err(Error::Data(format!("the prompts ended after {found} of the {size} that a step takes")));
    }
    Ok(batch)
}

/// A closed pipe is an error here, unlike in a filter: the run is not done.
fn in_a_pipe(err: Error, stop: &Stop) -> Error {
    match err {
        Error::Output(err) if err.kind() == ErrorKind::BrokenPipe => stop.check().err().unwrap_or(Error::Abandoned),
        other => other,
    }
}

/// Writes the records of a step while a trainer is there.
struct Watched<'a, 'w> {
    records: RecordWriter<'a>,
    watch: &'a mut TrainerWatch<'w>,
}

impl Sink<Line> for Watched<'_, '_> {
    fn group(&mut self, request: Request<Line>, completions: Vec<Completion>) -> Result<()> {
        self.records.group(request, completions)
    }

    fn progress(&mut self, work: Work) -> Result<()> {
        self.watch.check()?;
        self.records.progress(work)
    }
}
