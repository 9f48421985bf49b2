//! The sampler of a run: as many prompts a step as the trainer takes, each step from the weights that the step before made, or from
//! those of exactly so many steps earlier as it may be ahead of the trainer.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::backend::Seat;
use super::records::Records;
use super::{Job, Ready};
use crate::checkpoint::{Identity, State, identity};
use crate::engine::{Completion, Request, Sink, Work};
use crate::error::{Error, Result};
use crate::lines::jsonl::{Input, Output};
use crate::lines::read_ahead::Ahead;
use crate::lines::record::Line;
use crate::process::cancel::Stop;
use crate::process::command::{detail, note};
use crate::process::progress::Progress;
use crate::process::stopwatch::Spent;
use crate::run::{Lock, Offers, PartnerWatch, Role, Run, TrainerWatch, sampled_from};

/// How the prompts of a run become steps.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    /// Prompts of each.
    pub groups: usize,
    /// How many of them sampling may be ahead of training; without being ahead each waits for the one before.
    pub ahead: u64,
    /// Sampling ends after so many of them.
    pub most: Option<u64>,
}

/// Samples the rest of a run's prompts, until they or the steps asked for end.
///
/// # Errors
/// As [`super::run`]; [`Error::Usage`] when somebody else samples for the run, [`Error::Run`] when the trainer or the next stage of
/// the pipe is gone, [`Error::Data`] when the last prompts are too few for a step.
pub fn follow(job: Job, run: &Run, steps: Steps, input: Input, out: &mut Output) -> Result<()> {
    let lock = Lock::take(run, Role::Sample)?;
    let ended = sample(job, run, steps, input, out);
    lock.leave(&ended);
    ended
}

fn sample(job: Job, run: &Run, steps: Steps, mut input: Input, out: &mut Output) -> Result<()> {
    let start = run.intact_step(&|_| ())?;
    let (dir, oldest) = (run.checkpoint(start), run.oldest_weights(start)?);
    input.skip_consumed(State::load(&dir)?.map_or(0, |state| state.prompts_consumed))?;
    let stop = job.stop.clone();
    let Ready { mut seat, mut settings, mut origin, tokenizer, mut source } =
        Ready::new(job, &dir, Some(steps.groups))?;
    let mut requests = Ahead::of_lines(input, move |line| source.request(line));
    let say = |words: &str| note("rollout", words);
    let _trainer = PartnerWatch::start(run, Role::Train, &stop);
    // One step alone is sampled from the policy, and needs no trainer while it is.
    let needs_trainer = steps.most != Some(1) || steps.ahead > 0;
    let mut watch = TrainerWatch::of(run, &say, &stop, needs_trainer);
    let mut progress = Progress::new("rollout");
    let mut batch = next_batch(&mut requests, steps.groups)?;
    if needs_trainer && !batch.is_empty() {
        watch.wait_for_start(start + 1)?;
    }
    let mut offers = Offers::of(run);
    let mut spent = Spent::on(["sampling", "waiting for weights", "loading them"]);
    while !batch.is_empty() {
        let weights = sampled_from(settings.step, steps.ahead, oldest);
        if weights != origin.identity.step {
            let (began, waited) = (Instant::now(), watch.waited());
            origin.identity = next_weights(&mut watch, weights, &mut seat)?;
            let waited = watch.waited() - waited;
            spent.add("waiting for weights", waited);
            spent.add("loading them", began.elapsed() - waited);
        }
        origin.step = settings.step;
        look_for_an_offer(&mut offers, &mut seat, &say)?;
        let records = Records::new(origin.clone(), Arc::clone(&tokenizer), out, &mut progress);
        let mut sink = Watched { records, watch: &mut watch };
        let sample = || seat.sample(&settings, Ahead::ready(batch), &mut sink);
        spent.time("sampling", sample).map_err(|err| in_a_pipe(err, &stop))?;
        spent.end_round();
        settings.step += 1;
        let is_last = steps.most.is_some_and(|most| settings.step >= start + most);
        batch = if is_last { Vec::new() } else { next_batch(&mut requests, steps.groups)? };
    }
    progress.detail(&format!("done in {:.1} s", progress.seconds()));
    spent.tell(&|words| detail("rollout", words));
    Ok(())
}

/// Takes the trainer's offer of another way for the weights than files, before it can hand over those that these records lead to.
fn look_for_an_offer(offers: &mut Offers, seat: &mut Seat, say: &dyn Fn(&str)) -> Result<()> {
    let Some(offer) = offers.look() else { return Ok(()) };
    match seat.accept(offer) {
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

/// Goes on with the weights of a step, once they are there.
fn next_weights(watch: &mut TrainerWatch<'_>, step: u64, seat: &mut Seat) -> Result<Identity> {
    loop {
        let dir = watch.wait_for_weights(step)?;
        let found = made(&dir);
        let opened = seat.set_weights(&dir).and_then(|()| identity(&dir));
        // A trainer that goes takes them along: the wait has the word for that. One that comes puts the same in place of those that
        // a killed one left.
        if opened.is_ok() || made(&dir) == found && found.is_some() {
            return opened;
        }
    }
}

/// Which directory it is, if there is one.
fn made(dir: &Path) -> Option<(u64, SystemTime)> {
    fs::metadata(dir).and_then(|found| Ok((found.ino(), found.modified()?))).ok()
}

/// The prompts of the next step; none at the end.
fn next_batch(requests: &mut Ahead<Request<Line>>, size: usize) -> Result<Vec<Request<Line>>> {
    let batch = requests.take(size).collect::<Result<Vec<_>>>()?;
    let found = batch.len();
    if 0 < found && found < size {
        return Err(Error::Data(format!("the prompts ended after {found} of the {size} that a step takes")));
    }
    Ok(batch)
}

/// A reader that goes away before the last record is no quiet end here: the run is not done.
fn in_a_pipe(err: Error, stop: &Stop) -> Error {
    match err {
        Error::Output(err) if err.kind() == ErrorKind::BrokenPipe => stop.check().err().unwrap_or(Error::Abandoned),
        other => other,
    }
}

/// Records of a step, while there is somebody to train on them.
struct Watched<'a, 'w> {
    records: Records<'a>,
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
