//! The trainer of a run: a step for each so many groups, its weights handed back at once, a checkpoint now and then.
//!
//! A step is final when the run's policy link is renamed, with everything before it on the disk. What a killed run had done beyond
//! that is removed when it goes on, and comes again with the same bytes.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::grpo::batch::{Group, Groups};
use crate::grpo::health::Health;
use crate::grpo::order::Order;
use crate::grpo::step::{GrpoConfig, GrpoTrainer};
use crate::grpo::trainer::{Place, Trainer};
use crate::grpo::{Taken, in_steps};
use crate::jsonl::{Input, write_zst};
use crate::optim::OptimizerConfig;
use crate::policy::sync;
use crate::run::{Holder, Keep, Live, Lock, PartnerWatch, Role, Run};
use crate::stop::Stop;

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
/// [`Error::Usage`] when somebody else trains the run, [`Error::Record`] and [`Error::Data`] for an input that is not the run's
/// rollouts in their order, [`Error::Numerics`] as [`GrpoTrainer::step`] and when the sampler found such numbers, [`Error::Io`]
/// when the disk refuses, [`Error::Interrupted`] and [`Error::Abandoned`].
pub fn train(job: &Job, input: Input, place: Place<'_>, listeners: Listeners<'_>) -> Result<()> {
    let run = &job.run;
    let _lock = Lock::take(run, Role::Train)?;
    let sampler = PartnerWatch::start(run, Role::Sample, &job.stop);
    let step = run.intact_step(listeners.say)?;
    let mut trainer = Trainer::open(&run.checkpoint(step), job.optimizer.clone(), job.seed, place)?;
    if run.policy()? != run.checkpoint(step) {
        run.point_policy_at(step)?;
    }
    trainer.machine.stop_with(&job.stop);
    let state = &trainer.state;
    run.recover(state.step, job.keep)?;
    let order = Order::new(&run.prompts(), state.prompts_consumed)?;
    let over = order.is_over();
    let bytes = trainer.machine.weights()?.weight_bytes() as u64;
    let mut keeper = Keeper {
        job,
        sampler: &sampler,
        live: Live::create(run, bytes, listeners.say)?,
        metrics: open_to_append(run.metrics())?,
        health: Health::of_run(job.grpo.logprob_band, &run.metrics())?,
        committed: state.step,
        written: Vec::new(),
    };
    let shape = trainer.machine.config().clone();
    let tokens = job.micro_batch_tokens.unwrap_or_else(|| trainer.machine.default_tokens());
    let groups = Groups::new(input, &shape).in_order(order);
    let mut grpo = GrpoTrainer::new(&mut trainer, job.grpo.clone(), tokens, false)?;
    let (taken, whole) = steps(&mut grpo, groups, &mut keeper, listeners);
    let ended = match taken {
        Ok(Taken { steps: 0, left_over: 0 }) if over => Ok(()), // a run that is done
        taken => taken.and_then(|taken| all_taken(taken, job.groups_per_step)),
    };
    let holder = sampler.became()?;
    if holder == Holder::FoundNumerics {
        let (step, committed) = (grpo.trainer().state.step, keeper.committed);
        let what = format!("with the weights of step {step} the sampler's numbers are not finite");
        return Err(Error::Numerics(format!("{what}; nothing after step {committed} was published")));
    }
    if whole {
        keeper.commit(grpo.trainer())?;
    }
    ended.map_err(|err| cause(err, holder))
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
    groups: Groups<'_>,
    keeper: &mut Keeper<'_>,
    listeners: Listeners<'_>,
) -> (Result<Taken>, bool) {
    let mut whole = true;
    let taken = in_steps(groups, Some(keeper.job.groups_per_step), &mut |groups| {
        let (mut lines, updates) = (Vec::new(), grpo.trainer().state.optimizer_steps);
        let stepped = grpo.step(groups, &mut |line| lines.push(keeper.health.mark(line, groups).to_json()));
        // A record that is refused, or a wish to end before the update, has changed nothing; any other failure leaves weights that
        // are worth nothing.
        let harmless = matches!(stepped, Err(Error::Record { .. } | Error::Interrupted { .. } | Error::Abandoned));
        whole = harmless && grpo.trainer().state.optimizer_steps == updates;
        stepped?;
        keeper.keep(grpo.trainer(), groups, &lines)?;
        whole = true;
        keeper.health.tell(listeners.say);
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

fn open_to_append(path: PathBuf) -> Result<File> {
    OpenOptions::new().append(true).create(true).open(&path).map_err(Error::io(path))
}

/// Writes what remains of a step.
struct Keeper<'a> {
    job: &'a Job,
    sampler: &'a PartnerWatch,
    live: Live,
    metrics: File,
    health: Health,
    /// The policy's step.
    committed: u64,
    /// Rollouts of the steps since.
    written: Vec<PathBuf>,
}

impl Keeper<'_> {
    /// After each step: the weights first, because somebody may be waiting for them.
    fn keep(&mut self, trainer: &mut Trainer, groups: &[Group], metrics: &[Vec<u8>]) -> Result<()> {
        let step = trainer.state.step;
        trainer.state.command_line.clone_from(&self.job.command_line);
        // Who waits for these weights is known from here on, however short its work then is.
        if self.sampler.became()? == Holder::Working {
            self.live.publish(step, |dir| trainer.save_for_sampling(dir))?;
        }
        let rollouts = self.job.run.rollouts(step);
        let completions = groups.iter().flat_map(|group| &group.completions);
        write_zst(&rollouts, completions.map(|completion| completion.line.text.as_str()))?;
        self.written.push(rollouts);
        let lines: Vec<u8> = metrics.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
        self.metrics.write_all(&lines).map_err(Error::io(self.job.run.metrics()))?;
        if step.is_multiple_of(self.job.keep.every) { self.commit(trainer) } else { Ok(()) }
    }

    /// Makes all steps so far final; nothing to do when they are.
    fn commit(&mut self, trainer: &mut Trainer) -> Result<()> {
        let (run, step) = (&self.job.run, trainer.state.step);
        if step == self.committed {
            return Ok(());
        }
        for rollouts in self.written.drain(..) {
            sync(&rollouts)?;
        }
        sync(&run.rollouts_dir())?;
        self.metrics.sync_all().map_err(Error::io(run.metrics()))?;
        trainer.publish(&run.checkpoint(step), false, self.job.command_line.clone())?;
        run.point_policy_at(step)?;
        self.committed = step;
        run.leave_behind(step, self.job.keep)
    }
}
