//! The trainer of a run: a step for each so many groups, its weights handed back at once, a checkpoint now and then.
//!
//! A step is final when the run's policy link is renamed, with everything before it on the disk. What a killed run had done beyond
//! that is removed when it goes on, and comes again with the same bytes.
//!
//! Where sampling may be N steps ahead, the N steps after a checkpoint are sampled from weights of before it. So a checkpoint
//! holds these too: N times the weights more, beside weights and two moments. The other way would be to let nobody be ahead right
//! after a checkpoint; but a signal, and a run made step by step, leave one at any step, and a run that was interrupted would not end
//! as one that was not.

use crate::checkpoint::State;
use crate::error::{Error, Result};
use crate::grpo::groups::{Group, Groups, Staleness};
use crate::grpo::health::Health;
use crate::grpo::metrics::Metrics;
use crate::lines::jsonl::Input;
use crate::lines::read_ahead::Ahead;
use crate::model::Config;
use crate::optim::OptimizerConfig;
use crate::process::cancel::Stop;
use crate::run::record_order::Order;
use crate::run::{Holder, Keep, Live, Lock, MOST_AHEAD, PartnerWatch, Role, Run};
use crate::train::grpo_step::{GrpoConfig, GrpoTrainer};
use crate::train::step_line::StepLines;
use crate::train::step_writer::Keeper;
use crate::train::trainer::{Place, Trainer, notice};
use crate::train::{Taken, in_steps};

/// How a run is trained.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its directory.
    pub run: Run,
    /// Groups a step.
    pub groups_per_step: usize,
    /// Steps between checkpoints, and how many are kept.
    pub keep: Keep,
    /// Numbers of a step.
    pub grpo: GrpoConfig,
    /// Numbers of the optimizer.
    pub optimizer: OptimizerConfig,
    /// Most tokens in the model at once, where somebody has decided.
    pub micro_batch_tokens: Option<usize>,
    /// Of the run; a checkpoint knows its own.
    pub seed: Option<u64>,
    /// What the checkpoints say made them.
    pub command_line: Vec<String>,
    /// Ends the training early, with a checkpoint of the step reached.
    pub stop: Stop,
}

/// Who hears of what happens.
pub struct Listeners<'a> {
    /// Takes each line of metrics.
    pub metrics: &'a mut dyn FnMut(&[u8]) -> Result<()>,
    /// Takes words for the user.
    pub say: &'a dyn Fn(&str),
}

/// Trains as many steps as `input` holds. What was finished when the input ends is kept, however it ends; a step that is under way
/// when the job is stopped, or when the run's sampler dies, is dropped.
///
/// # Errors
/// [`Error::Usage`] when somebody else trains the run, or sampling is to be too far ahead, [`Error::Record`] and [`Error::Data`] for
/// an input that is not the run's rollouts in their order, [`Error::Numerics`] as [`GrpoTrainer::step`] and when the sampler found
/// such numbers, [`Error::Io`] when the disk refuses, [`Error::Interrupted`] and [`Error::Abandoned`].
pub fn train(job: &Job, input: Input, place: Place<'_>, listeners: Listeners<'_>) -> Result<()> {
    let (run, ahead) = (&job.run, job.grpo.max_staleness.ahead());
    if ahead > MOST_AHEAD {
        return Err(Error::Usage(format!("--max-staleness {ahead}: with --follow at most {MOST_AHEAD}")));
    }
    let _lock = Lock::take(run, Role::Train)?;
    let sampler = PartnerWatch::start(run, Role::Sample, &job.stop);
    let step = run.intact_step(listeners.say)?;
    let start = run.checkpoint(step);
    if run.policy()? != start {
        run.point_policy_at(step)?;
    }
    run.recover(step, job.keep)?;
    let shape = Config::load(&start)?;
    let consumed = State::load(&start)?.map_or(0, |state| state.prompts_consumed);
    let order = Order::new(&run.prompts(), consumed, job.groups_per_step)?;
    let over = order.is_over();
    let live = Live::create(run, shape.weight_bytes(), ahead, listeners.say)?;
    let mut keeper = Keeper::new(job, &sampler, live, step)?;
    // A sampler that is ahead is not to wait for a trainer at work to read.
    let groups = Groups::new(input, shape).in_order(order);
    let mut groups = Ahead::of(groups, ahead as usize * job.groups_per_step).peekable();
    if ahead == 0 {
        groups.peek(); // who has sampled has its part of a GPU's memory; what is left can be planned for
    }
    let mut trainer = Trainer::open(&start, job.optimizer.clone(), job.seed, place)?;
    trainer.machine.stop_with(&job.stop);
    let health = Health::of_run(job.grpo.logprob_band, &run.metrics())?;
    offer_weights(&mut trainer, job, &mut keeper.live, listeners.say)?;
    keeper.publish_start(&mut trainer)?;
    let tokens = job.micro_batch_tokens.unwrap_or_else(|| trainer.machine.default_tokens());
    let mut grpo = GrpoTrainer::new(&mut trainer, job.grpo.clone(), tokens, false)?;
    let say = listeners.say;
    let (taken, whole) = steps(&mut grpo, groups, (&mut keeper, health), listeners);
    let ended = match taken {
        Ok(Taken { steps: 0, left_over: 0 }) if over => Ok(()), // a run that is done
        taken => taken.and_then(|taken| all_taken(taken, job.groups_per_step)),
    };
    let finished = keeper.finish(grpo.trainer());
    let holder = sampler.became()?;
    if holder == Holder::FoundNumerics {
        let (step, committed) = (grpo.trainer().state.step, keeper.committed);
        let earlier = if ahead > 0 { ", or of a step before," } else { "" };
        let what = format!("with the weights of step {step}{earlier} the sampler's numbers are not finite");
        return Err(Error::Numerics(format!("{what}; nothing after step {committed} was published")));
    }
    if whole {
        finished.and_then(|()| keeper.commit(grpo.trainer()))?;
    }
    ended.map(|()| keeper.spent.tell(say)).map_err(|err| cause(err, holder))
}

/// A sampler on the same card may copy the weights from where they are trained. They hold still while it does: the next update waits
/// for records that it makes from them. With staleness allowed it does not.
fn offer_weights(trainer: &mut Trainer, job: &Job, live: &mut Live, say: &dyn Fn(&str)) -> Result<()> {
    if job.grpo.max_staleness != Staleness::Steps(0) {
        return Ok(());
    }
    match trainer.machine.offer() {
        Ok(offer) => offer.map_or(Ok(()), |offer| live.offer(offer)),
        Err(why) => {
            say(&format!("the weights of each step go through files in memory: {why}"));
            Ok(())
        }
    }
}

/// An input that ends early while there is more to come, or that is cut off where its maker was, is the lesser news.
fn cause(err: Error, sampler: Holder) -> Error {
    match (err, sampler) {
        (Error::Data(_), Holder::Working | Holder::Gone) | (Error::Record { .. }, Holder::Gone) => Error::Abandoned,
        (err, _) => err,
    }
}

/// Also says whether the weights are those of the last step that was kept.
fn steps(
    grpo: &mut GrpoTrainer<'_>,
    groups: impl Iterator<Item = Result<Group>>,
    (keeper, mut health): (&mut Keeper<'_>, Health),
    listeners: Listeners<'_>,
) -> (Result<Taken>, bool) {
    let mut whole = true;
    let updates_per_step = keeper.job.grpo.num_iterations;
    let step_lines = StepLines::new(keeper.job.optimizer.total_steps.map(|updates| updates / updates_per_step));
    let taken = in_steps(groups, Some(keeper.job.groups_per_step), &mut |groups| {
        let (mut lines, updates, mut progress) = (Vec::new(), grpo.trainer().updates(), None);
        let mut line = |line: &Metrics| {
            notice(line).iter().for_each(|words| (listeners.say)(words));
            lines.push(health.mark(line, groups).to_json());
            progress = step_lines.of(line);
        };
        let stepped = keeper.spent.time("training", || grpo.step(groups, &mut line));
        // A record that is refused, or a wish to end before the update, has changed nothing; any other failure leaves weights that
        // are worth nothing.
        let harmless = matches!(stepped, Err(Error::Record { .. } | Error::Interrupted { .. } | Error::Abandoned));
        whole = harmless && grpo.trainer().updates() == updates;
        stepped?;
        keeper.keep(grpo.trainer(), groups, &lines)?;
        whole = true;
        progress.iter().for_each(|words| (listeners.say)(words));
        health.tell(listeners.say);
        keeper.spent.end_round();
        lines.iter().try_for_each(|line| (listeners.metrics)(line))
    });
    (taken, whole)
}

/// An input that ends where no step does, or at once, is not what was meant.
fn all_taken(taken: Taken, groups_per_step: usize) -> Result<()> {
    match (taken.steps, taken.left_over) {
        (0, 0) => Err(Error::Data("no records in the input".into())),
        (_, 0) => Ok(()),
        (_, found) => {
            Err(Error::Data(format!("the input ended after {found} of the {groups_per_step} groups that a step takes")))
        }
    }
}
