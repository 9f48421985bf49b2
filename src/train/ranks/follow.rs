//! What a rank after the first does: what it is told, until it is told to end.

use std::path::Path;
use std::sync::Arc;

use super::orders::{Order, SentLine};
use super::{Ranks, agree};
use crate::error::{Error, Result};
use crate::grpo::groups::Group;
use crate::lines::record::Line;
use crate::optim::OptimizerConfig;
use crate::process::cancel::Stop;
use crate::train::config::SupervisedConfig;
use crate::train::grpo_step::GrpoTrainer;
use crate::train::once::Objective;
use crate::train::supervised;
use crate::train::trainer::{OpenBackend, Trainer};

/// What a rank knows of the work from its own command line.
#[derive(Debug, Clone)]
pub struct FollowJob {
    /// Start from random weights.
    pub init: bool,
    /// The loss.
    pub objective: Objective,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The most tokens in the model at once; `None` leaves it to the device.
    pub micro_batch_tokens: Option<usize>,
    /// Seed of the run; `None` keeps a checkpoint's own.
    pub seed: Option<u64>,
    /// Ends a step early, on all ranks.
    pub stop: Stop,
}

/// Does what the first rank tells this one, until it says that this is the end. An error that all ranks know is the first one's to
/// report.
///
/// # Errors
/// One that the first rank does not know of, because it goes on.
pub fn follow(job: &FollowJob, ranks: &dyn Ranks, open: OpenBackend<'_>) -> Result<()> {
    let Order::Open { dir, policy_id } = Order::hear(ranks) else { return Ok(()) };
    let mut trainer = match agree(ranks, job.open(Path::new(&dir), &policy_id, open)) {
        Ok(trainer) => trainer,
        Err(err) => return end_together(ranks, err),
    };
    trainer.stop_with(&job.stop);
    if matches!(job.objective, Objective::Grpo { .. }) && !matches!(Order::hear(ranks), Order::Begin) {
        return Ok(());
    }
    match Follower::new(job, &mut trainer) {
        Ok(mut follower) => follower.obey(ranks),
        Err(err) => end_together(ranks, err),
    }
}

/// After an error that the first rank should know, and so have no orders any more.
fn end_together(ranks: &dyn Ranks, err: Error) -> Result<()> {
    match Order::hear(ranks) {
        Order::End => Ok(()),
        _ => Err(err),
    }
}

impl FollowJob {
    /// Opens the policy of the first rank, by the way that it takes.
    fn open(&self, dir: &Path, policy_id: &str, open: OpenBackend<'_>) -> Result<Trainer> {
        let optimizer = self.optimizer.clone();
        let trainer = match self.init {
            true => Trainer::random(dir, optimizer, self.seed.unwrap_or_default(), open),
            false => Trainer::open(dir, optimizer, self.seed, open),
        }?;
        if trainer.identity().policy_id != policy_id {
            return Err(Error::model(dir, "holds other weights here than on the first rank; all ranks need the same"));
        }
        Ok(trainer)
    }
}

/// A rank after the first, with its policy.
enum Follower<'t> {
    Grpo(Box<GrpoTrainer<'t>>),
    Supervised(&'t mut Trainer, SupervisedConfig),
}

impl<'t> Follower<'t> {
    fn new(job: &FollowJob, trainer: &'t mut Trainer) -> Result<Self> {
        let micro_batch_tokens = trainer.micro_batch_tokens(job.micro_batch_tokens);
        Ok(match &job.objective {
            Objective::Grpo { config, dry_run } => {
                Self::Grpo(Box::new(GrpoTrainer::new(trainer, (**config).clone(), micro_batch_tokens, *dry_run)?))
            }
            Objective::Supervised { loss_on_prompt, .. } => {
                Self::Supervised(trainer, SupervisedConfig { loss_on_prompt: *loss_on_prompt, micro_batch_tokens })
            }
        })
    }

    /// Makes step after step. After one that failed the first rank may still want the moments for a checkpoint, but no other step.
    fn obey(&mut self, ranks: &dyn Ranks) -> Result<()> {
        let mut failed = None;
        loop {
            match Order::hear(ranks) {
                Order::End => return Ok(()),
                Order::Moments => self.trainer().share_moments()?,
                order => match failed {
                    Some(err) => return Err(err),
                    None => failed = self.step(order).err(),
                },
            }
        }
    }

    fn trainer(&mut self) -> &mut Trainer {
        match self {
            Self::Grpo(grpo) => grpo.trainer(),
            Self::Supervised(trainer, _) => trainer,
        }
    }

    fn step(&mut self, order: Order) -> Result<()> {
        match (self, order) {
            (Self::Grpo(grpo), Order::Groups(groups)) => {
                let limits = grpo.trainer().model_config().into();
                let line = |(path, number, text)| Line { path: Arc::from(path), number, text };
                let group = |(id, lines): (String, Vec<SentLine>)| {
                    Group::of(id, &lines.into_iter().map(line).collect::<Vec<_>>(), limits)
                };
                let groups = groups.into_iter().map(group).collect::<Result<Vec<_>>>()?;
                grpo.step(&groups, &mut |_| ())
            }
            (Self::Supervised(trainer, config), Order::Examples(examples)) => {
                supervised::step(trainer, *config, &examples).map(|_| ())
            }
            _ => unreachable!("all ranks have one objective"),
        }
    }
}
