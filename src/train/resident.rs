//! Trains a run: makes a step for every `groups_per_step` groups, hands its weights back at once, and writes checkpoints.
//!
//! A step is final when the run's policy link is renamed, with everything before it on the disk. Whatever a killed run did after that
//! is removed when it resumes, and made again with the same bytes.
//!
//! Where sampling may be N steps ahead, the N steps after a checkpoint are sampled from weights of before it. So a checkpoint
//! holds these too: N times the weights more, beside weights and two moments. Without them sampling could not be ahead right after a
//! checkpoint; but a signal, and a run made step by step, write one at any step, and an interrupted run would then end with other bytes
//! than one that was not.

use std::iter::Peekable;
use std::path::Path;

use crate::checkpoint::State;
use crate::error::{Error, Result};
use crate::grpo::completion::Staleness;
use crate::grpo::groups::{CheckOrder, Group, Groups};
use crate::grpo::health::Health;
use crate::grpo::metrics::Metrics;
use crate::lines::jsonl::Input;
use crate::model::Config;
use crate::process::read_ahead::ReadAhead;
use crate::run::record_order::RecordOrder;
use crate::run::{
    LiveWeights, Lock, MAX_STEPS_AHEAD, PeerState, PeerWatch, Role, TopUps, prompts_per_step, sampler_elsewhere,
};
use crate::train::config::ResidentJob;
use crate::train::dynamic::DynamicSampling;
use crate::train::grpo_step::GrpoTrainer;
use crate::train::live::Live;
use crate::train::step_writer::StepWriter;
use crate::train::trainer::{OpenBackend, Trainer, notice};
use crate::train::{Taken, in_steps, verbose};

impl ResidentJob {
    /// Steps that sampling may be ahead of training.
    pub(super) fn steps_ahead(&self) -> u64 {
        self.grpo.max_staleness.ahead()
    }

    /// Prompts that a step has to itself.
    fn prompts_per_step(&self) -> usize {
        prompts_per_step(self.groups_per_step, self.grpo.dynamic_sampling)
    }
}

/// Callbacks of a run.
pub struct Listeners<'a> {
    /// Takes each line of metrics.
    pub metrics: &'a mut dyn FnMut(&[u8]) -> Result<()>,
    /// Takes messages for the user.
    pub say: &'a dyn Fn(&str),
}

/// Trains as many steps as `input` holds. Finished steps are kept however the input ends; a step under way is dropped when the job is
/// stopped or the run's sampler dies.
///
/// # Errors
/// [`Error::Usage`] when another process trains the run, or sampling would be too far ahead, [`Error::Record`] and [`Error::Data`] for
/// an input that is not the run's rollouts in their order, [`Error::Numerics`] as [`GrpoTrainer::step`] and when the sampler's
/// numbers are not finite, [`Error::Io`] when a file cannot be written, [`Error::Interrupted`] and [`Error::Abandoned`].
pub fn train(job: &ResidentJob, input: Input, open: OpenBackend<'_>, listeners: Listeners<'_>) -> Result<()> {
    let (run, ahead, say) = (&job.run, job.steps_ahead(), listeners.say);
    if ahead > MAX_STEPS_AHEAD {
        return Err(Error::Usage(format!("--max-staleness {ahead}: with --follow at most {MAX_STEPS_AHEAD}")));
    }
    let dynamic = job.grpo.dynamic_sampling(Some(job.groups_per_step))?;
    if dynamic.is_some() && job.grpo.max_staleness != Staleness::Steps(0) {
        return Err(Error::Usage("--dynamic-sampling with --follow needs --max-staleness 0".into()));
    }
    let _lock = Lock::take(run, Role::Train)?;
    let sampler = PeerWatch::start(run, Role::Sample, &job.stop);
    let step = recover(job, say)?;
    let start = run.checkpoint(step);

    let shape = Config::load(&start)?;
    let order = record_order(job, &start)?;
    let is_complete = order.is_over();
    let elsewhere = sampler_elsewhere(run, &|| input.is_ready(), &job.stop)?;
    let live = LiveWeights::create(run, shape.weight_bytes(), ahead, elsewhere.as_deref(), say)?;
    let mut writer = StepWriter::new(job, &sampler, live, step)?;
    let groups = open_groups(job, input, &shape, order);
    let mut trainer = Trainer::open(&start, job.optimizer.clone(), job.seed, open)?;
    trainer.stop_with(&job.stop);
    let health = open_health(job)?;

    if elsewhere.is_none() {
        share_weights(&mut trainer, job, &mut writer.live, say)?;
    }
    writer.publish_start(&mut trainer)?;

    let tokens = trainer.micro_batch_tokens(job.micro_batch_tokens);
    let grpo = GrpoTrainer::new(&mut trainer, job.grpo.clone(), tokens, false)?;
    let mut grpo = grpo.choosing_groups(dynamic.clone());
    let outcome = train_steps(&mut grpo, groups, dynamic.as_ref(), &mut writer, health, listeners);
    finish(outcome, is_complete, &mut writer, grpo.trainer(), &sampler)?;
    writer.stopwatch.report(say);
    Ok(())
}

/// Brings the run's directory to the end of its newest intact checkpoint, and returns that step.
fn recover(job: &ResidentJob, say: &dyn Fn(&str)) -> Result<u64> {
    let run = &job.run;
    let step = run.newest_intact_step(say)?;
    if run.policy()? != run.checkpoint(step) {
        run.point_policy_at(step)?;
    }
    run.recover(step, job.retention)?;
    Ok(step)
}

/// The order of the records that follow the checkpoint `start`.
fn record_order(job: &ResidentJob, start: &Path) -> Result<RecordOrder> {
    let consumed = State::load(start)?.map_or(0, |state| state.prompts_consumed);
    let order = RecordOrder::new(&job.run.prompts(), consumed, job.prompts_per_step())?;
    Ok(if job.grpo.dynamic_sampling.is_some() { order.with_steps_that_may_end_early() } else { order })
}

/// Reads the run's groups on a thread of their own, so that a sampler that is ahead can write while a step is trained.
fn open_groups(job: &ResidentJob, input: Input, shape: &Config, mut order: RecordOrder) -> Peekable<ReadAhead<Group>> {
    let check: CheckOrder = Box::new(move |record, sample, group_size| order.check(record, sample, group_size));
    let groups = Groups::new(input, shape.into()).in_order(check);
    let mut groups = ReadAhead::new(groups, job.steps_ahead() as usize * job.groups_per_step).peekable();
    if job.steps_ahead() == 0 {
        groups.peek(); // a sampler that has sampled has allocated its GPU memory, so that the rest can be planned for
    }
    groups
}

fn open_health(job: &ResidentJob) -> Result<Health> {
    let path = job.run.metrics();
    let past = if path.exists() { Some(Input::open(&path)?) } else { None };
    Health::of_run(job.grpo.logprob_band, past.into_iter().flatten())
}

/// Lets a sampler on the same GPU copy the weights from where they are trained. It does so while they do not change: the next update
/// needs records that it makes from them. A sampler that may be ahead has no such guarantee, and is offered nothing.
fn share_weights(trainer: &mut Trainer, job: &ResidentJob, live: &mut LiveWeights, say: &dyn Fn(&str)) -> Result<()> {
    if job.grpo.max_staleness != Staleness::Steps(0) {
        return Ok(());
    }
    match trainer.share_weights() {
        Ok(handle) => handle.map_or(Ok(()), |handle| live.offer(handle)),
        Err(why) => {
            say(&format!("the weights of each step go through files in memory: {why}"));
            Ok(())
        }
    }
}

/// How the training of a run's steps ended.
enum Outcome {
    /// The input ended. The weights are those of the last step, which is written.
    InputEnded(Taken),
    /// Training stopped before an update. The weights are those of the last step, which is written.
    Stopped(Error),
    /// A step failed half-way. The weights must not be published.
    Broken(Error),
}

fn train_steps(
    grpo: &mut GrpoTrainer<'_>,
    groups: impl Iterator<Item = Result<Group>>,
    dynamic: Option<&DynamicSampling>,
    writer: &mut StepWriter<'_>,
    mut health: Health,
    listeners: Listeners<'_>,
) -> Outcome {
    let mut is_written = true;
    let updates_per_step = writer.job.grpo.num_iterations;
    let mut live =
        Live::new(writer.job.optimizer.total_steps.map(|updates| updates / updates_per_step), &writer.job.run);
    let top_ups = TopUps::of(&writer.job.run);
    let more = &mut |groups: &[Group]| {
        let more = dynamic.map_or(Ok(0), |dynamic| dynamic.more(groups))?;
        if more > 0 {
            let sampled_from = groups[0].completions[0].policy_step.unwrap_or_default();
            top_ups.ask(sampled_from, groups.len() + more)?;
        }
        Ok(more)
    };
    let taken = in_steps(groups, Some(writer.job.groups_per_step), more, &mut |groups| {
        let (mut lines, updates) = (Vec::new(), grpo.trainer().updates());
        let mut line = |line: &Metrics| {
            notice(line).iter().for_each(|words| live.say(words, listeners.say));
            lines.push(health.mark(line, groups).to_json());
            live.see(line);
        };
        let stepped = writer.stopwatch.time("training", || grpo.step(groups, &mut line));
        // A refused record, or a stop before the update, has changed nothing; after any other failure the weights are unusable.
        let harmless = matches!(stepped, Err(Error::Record { .. } | Error::Interrupted { .. } | Error::Abandoned));
        is_written = harmless && grpo.trainer().updates() == updates;
        stepped?;
        writer.write_step(grpo.trainer(), groups, &lines)?;
        is_written = true;
        if writer.job.verbose {
            verbose::sample(grpo.trainer().policy_step(), groups).iter().for_each(|text| live.say(text, listeners.say));
        }
        live.show(&writer.stopwatch, listeners.say);
        health.tell(&|words| live.say(words, listeners.say));
        let shortage = dynamic.map(|dynamic| dynamic.shortage(grpo.trainer().policy_step(), groups));
        shortage.transpose()?.flatten().iter().for_each(|words| live.say(words, listeners.say));
        writer.stopwatch.end_round();
        lines.iter().try_for_each(|line| (listeners.metrics)(line))
    });
    live.finish(listeners.say);
    match taken {
        Ok(taken) => Outcome::InputEnded(taken),
        Err(err) if is_written => Outcome::Stopped(err),
        Err(err) => Outcome::Broken(err),
    }
}

/// Makes the last written step final, unless the sampler found its weights unusable, and returns the error that ended the training.
fn finish(
    outcome: Outcome,
    is_complete: bool,
    writer: &mut StepWriter<'_>,
    trainer: &mut Trainer,
    sampler: &PeerWatch,
) -> Result<()> {
    let finished = writer.finish(trainer);
    let peer = sampler.peer_state()?;
    if peer == PeerState::FoundNumerics {
        let (step, final_step) = (trainer.policy_step(), writer.final_step);
        let earlier = if writer.job.steps_ahead() > 0 { ", or of a step before," } else { "" };
        let what = format!("with the weights of step {step}{earlier} the sampler's numbers are not finite");
        return Err(Error::Numerics(format!("{what}; nothing after step {final_step} was published")));
    }
    if !matches!(outcome, Outcome::Broken(_)) {
        finished?;
        writer.commit(trainer)?;
    }
    let ended = match outcome {
        Outcome::InputEnded(Taken { steps: 0, left_over: 0, .. }) if is_complete => Ok(()),
        Outcome::InputEnded(taken) => refuse_rest(taken),
        Outcome::Stopped(err) | Outcome::Broken(err) => Err(err),
    };
    ended.map_err(|err| cause(err, peer))
}

/// Prefers the sampler's end as the cause over an input that ended early or inside a line because of it.
fn cause(err: Error, sampler: PeerState) -> Error {
    match (err, sampler) {
        (Error::Data(_), PeerState::Working | PeerState::Gone) | (Error::Record { .. }, PeerState::Gone) => {
            Error::Abandoned
        }
        (err, _) => err,
    }
}

/// Refuses an input that holds nothing, or does not end with a step.
fn refuse_rest(taken: Taken) -> Result<()> {
    match (taken.steps, taken.left_over) {
        (0, 0) => Err(Error::Data("no records in the input".into())),
        (_, 0) => Ok(()),
        (_, found) => {
            Err(Error::Data(format!("the input ended after {found} of the {} groups that a step takes", taken.due)))
        }
    }
}
