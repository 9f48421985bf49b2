//! The sampler of a run: as many prompts a step as the trainer takes, each step from the weights that the step before made.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use super::records::Records;
use super::{Job, Ready, read_ahead};
use crate::cli::note;
use crate::engine::{Completion, Request, Sink, Work};
use crate::error::{Error, Result};
use crate::jsonl::{Input, Output};
use crate::policy::{State, identity};
use crate::progress::Progress;
use crate::record::Line;
use crate::run::{Lock, Role, Run, TrainerWatch};

/// Samples the rest of a run's prompts, `groups_per_step` from each policy, until they end.
///
/// # Errors
/// As [`super::run`]; [`Error::Usage`] when somebody else samples for the run, [`Error::Run`] when the trainer or the next stage of the pipe is gone, [`Error::Data`] when the last prompts
/// are too few for a step.
pub fn follow(job: Job, run: &Run, groups_per_step: usize, mut input: Input, out: &mut Output) -> Result<()> {
    let _lock = Lock::take(run, Role::Sample)?;
    let dir = run.policy()?;
    input.skip_consumed(State::load(&dir)?.map_or(0, |state| state.prompts_consumed))?;
    let Ready { mut seat, mut settings, mut origin, tokenizer, source } = Ready::new(job, &dir, Some(groups_per_step))?;
    let requests = read_ahead(source, input);
    let say = |words: &str| note("rollout", words);
    let mut watch = TrainerWatch::of(run, &say);
    let mut progress = Progress::new("rollout");
    let mut batch = next_batch(&requests, groups_per_step)?;
    if !batch.is_empty() {
        watch.wait_for_start(settings.step + 1)?;
    }
    while !batch.is_empty() {
        let records = Records::new(origin.clone(), Arc::clone(&tokenizer), out, &mut progress);
        let mut sink = Watched { records, watch: &mut watch };
        seat.sample(&settings, ready_now(batch), &mut sink).map_err(|err| in_a_pipe(err, run))?;
        batch = next_batch(&requests, groups_per_step)?;
        if !batch.is_empty() {
            let dir = watch.wait_for_weights(settings.step + 1)?;
            origin.identity = identity(&dir)?;
            settings.step = origin.identity.step;
            seat.set_weights(&dir)?;
        }
    }
    let (seconds, waited) = (progress.seconds(), watch.waited().as_secs_f64());
    progress.note(&format!("done in {seconds:.1} s, {waited:.1} s of it waiting for weights"));
    Ok(())
}

/// The prompts of the next step; none at the end.
fn next_batch(requests: &Receiver<Result<Request<Line>>>, size: usize) -> Result<Vec<Request<Line>>> {
    let batch = requests.iter().take(size).collect::<Result<Vec<_>>>()?;
    let found = batch.len();
    if 0 < found && found < size {
        return Err(Error::Data(format!("the prompts ended after {found} of the {size} that a step takes")));
    }
    Ok(batch)
}

/// Requests that need not be waited for.
fn ready_now(batch: Vec<Request<Line>>) -> Receiver<Result<Request<Line>>> {
    let (sender, receiver) = sync_channel(batch.len());
    batch.into_iter().for_each(|request| sender.send(Ok(request)).expect("the receiver is here, and has room for all"));
    receiver
}

/// A reader that goes away before the last record is no quiet end here: the run is not done.
fn in_a_pipe(err: Error, run: &Run) -> Error {
    match err {
        Error::Output(err) => Error::run(run.dir(), format!("the next stage of the pipe took no more records: {err}")),
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
