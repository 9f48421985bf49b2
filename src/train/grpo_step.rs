//! One GRPO step: groups to advantages, to gradients, to updated weights and their metrics.

use std::path::PathBuf;

use serde::Serialize;

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::grpo::advantage::{Advantages, ScaleRewards, advantages};
use crate::grpo::groups::{self, Completion, Group, Staleness};
use crate::grpo::loss::{Logprobs, LossConfig, TokenLoss, token_loss, token_weights};
use crate::grpo::metrics::{self, Metrics};
use crate::grpo::pass_stats::Tally;
use crate::model::Model;
use crate::train::backend::Of;
use crate::train::microbatch::{self, Sequence};
use crate::train::trainer::{Trained, Trainer, Update};

/// Numbers of a GRPO step.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct GrpoConfig {
    #[command(flatten)]
    /// Of the loss.
    pub loss: LossConfig,
    /// What the difference of a reward from its group's mean is divided by
    #[arg(long, value_enum, value_name = "BY", default_value = "group")]
    pub scale_rewards: ScaleRewards,
    /// Optimizer steps on each batch of groups
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub num_iterations: u64,
    /// Model directory that --beta measures the KL divergence from
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub reference: Option<PathBuf>,
    /// Train on rollouts of weights up to N steps older, or `any` for records made elsewhere. With --follow that is how many steps
    /// `rollout --max-staleness N` may be ahead
    #[arg(long, value_name = "N|any", default_value = "0")]
    #[serde(skip)]
    pub max_staleness: Staleness,
    /// Largest mean difference between the recorded log-probabilities and those recomputed by the same weights [nats]
    #[arg(long, value_name = "NATS", default_value_t = 0.05)]
    #[serde(skip)]
    pub logprob_band: f64,
}

impl GrpoConfig {
    /// Refuses numbers that contradict each other.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        if (self.loss.beta > 0.0) != self.reference.is_some() {
            return Err(Error::Usage("--beta above 0 and --reference need each other".into()));
        }
        self.loss.check()
    }
}

/// The policy, and what it is trained with.
pub struct GrpoTrainer<'a> {
    trainer: &'a mut Trainer,
    config: GrpoConfig,
    /// Which model it is.
    reference: Option<String>,
    micro_batch_tokens: usize,
    dry_run: bool,
}

/// The data of a step, one entry a completion.
struct Plan<'a> {
    completions: Vec<&'a Completion>,
    sequences: Vec<Sequence<'a>>,
    advantages: Vec<f64>,
    /// Weight of each token in the loss; `None` where the completion is masked.
    weights: Vec<Option<f64>>,
    fresh: Vec<bool>,
    reference: Vec<Vec<f32>>,
    temperature: f32,
    /// Completions that can have a slope, then those that only are looked at.
    teaching: Vec<usize>,
    silent: Vec<usize>,
}

impl<'t> GrpoTrainer<'t> {
    /// Loads the reference model, if there is one.
    ///
    /// # Errors
    /// [`Error::Usage`] when numbers contradict each other or the reference is of another shape, else as [`Model::load`].
    pub fn new(trainer: &'t mut Trainer, config: GrpoConfig, micro_batch_tokens: usize, dry_run: bool) -> Result<Self> {
        config.check()?;
        let mut hold = |dir: &PathBuf| -> Result<_> {
            let model = Model::load(dir)?;
            if model.config().vocab_size != trainer.machine.config().vocab_size {
                return Err(Error::Usage("--reference has another vocabulary than --policy".into()));
            }
            trainer.machine.hold_reference(model)?;
            Ok(checkpoint::identity(dir)?.policy_id)
        };
        let reference = config.reference.as_ref().map(&mut hold).transpose()?;
        Ok(Self { trainer, config, reference, micro_batch_tokens, dry_run })
    }

    /// The weights, and what belongs to them.
    pub fn trainer(&mut self) -> &mut Trainer {
        self.trainer
    }

    /// Trains on `groups`: `num_iterations` optimizer steps, each told to `emit`. A dry run measures one, and changes nothing.
    ///
    /// # Errors
    /// [`Error::Record`] when a record may not be trained on by these weights, [`Error::Numerics`] when numbers are not finite or
    /// sampler and trainer disagree: the weights are then worth nothing and must not be published. That of the model's
    /// [`crate::process::cancel::Stop`].
    pub fn step(&mut self, groups: &[Group], emit: &mut dyn FnMut(&Metrics)) -> Result<()> {
        let rewards: Vec<Vec<_>> =
            groups.iter().map(|group| group.completions.iter().map(|one| one.reward).collect()).collect();
        let advantages = advantages(&rewards, self.config.scale_rewards);
        let plan = self.plan(groups, &advantages)?;
        let trained = plan.trained(groups);
        let mut first: Option<Vec<Vec<f32>>> = None;
        for _ in 0..if self.dry_run { 1 } else { self.config.num_iterations } {
            let mut tally = self.pass(&plan, first.as_deref())?;
            tally.check(&plan.completions, self.config.logprob_band)?;
            let update = self.update(tally.learned)?;
            let mut line = self.lead(&tally, update, trained);
            rewards_of(&mut line, groups, &advantages);
            tally.report(&mut line, self.reference.is_some());
            if self.config.max_staleness != Staleness::Steps(0) {
                metrics::staleness(&mut line, groups, self.trainer.state.step);
            }
            metrics::completions(&mut line, groups);
            emit(&line);
            first.get_or_insert_with(|| std::mem::take(&mut tally.logprobs));
        }
        if !self.dry_run {
            let numbers = (&self.config, self.reference.as_ref(), self.micro_batch_tokens);
            self.trainer.advance(groups::digest(groups).as_bytes(), &numbers, trained);
        }
        Ok(())
    }

    fn plan<'a>(&mut self, groups: &'a [Group], advantages: &Advantages) -> Result<Plan<'a>> {
        let completions: Vec<&Completion> = groups.iter().flat_map(|group| &group.completions).collect();
        let held = self.trainer.identity();
        completions.iter().try_for_each(|one| one.check_policy(&held, self.config.max_staleness))?;
        let counts = |one: &&Completion| one.reward.is_some() && !(self.config.loss.mask_truncated && one.truncated);
        let counting: Vec<usize> =
            completions.iter().map(|one| if counts(one) { one.tokens.len() } else { 0 }).collect();
        let weights = token_weights(&self.config.loss, &counting);
        let with_weight = weights.into_iter().zip(&completions);
        let weights: Vec<Option<f64>> = with_weight.map(|(weight, one)| counts(one).then_some(weight)).collect();
        let advantages: Vec<f64> = advantages.groups.iter().flatten().copied().collect();
        let has_slope =
            |index: &usize| weights[*index].is_some() && (advantages[*index] != 0.0 || self.config.loss.beta > 0.0);
        let (teaching, silent) = (0..completions.len()).partition(has_slope);
        let mut plan = Plan {
            sequences: completions
                .iter()
                .map(|one| Sequence { prompt: &one.prompt, completion: &one.tokens })
                .collect(),
            fresh: completions.iter().map(|one| one.is_fresh(&held)).collect(),
            temperature: groups::temperature(groups)?,
            reference: Vec::new(),
            completions,
            advantages,
            weights,
            teaching,
            silent,
        };
        if self.reference.is_some() {
            plan.reference = self.reference_logprobs(&plan)?;
        }
        Ok(plan)
    }

    /// Log-probabilities of every completion under the reference.
    fn reference_logprobs(&mut self, plan: &Plan<'_>) -> Result<Vec<Vec<f32>>> {
        let mut all: Vec<Vec<f32>> = vec![Vec::new(); plan.sequences.len()];
        let members: Vec<usize> = (0..plan.sequences.len()).collect();
        for run in microbatch::cut(&plan.sequences, &members, self.micro_batch_tokens) {
            let batch = microbatch::pack(&plan.sequences, &run);
            let stats = self.trainer.machine.logprobs(Of::Reference, &batch, plan.temperature)?;
            for ((member, _), stats) in batch.origins.iter().zip(stats) {
                all[*member].push(stats.logprob);
            }
        }
        Ok(all)
    }

    /// Gradients of the step's loss at the current weights, and what was seen on the way. `first` are the log-probabilities of
    /// the step's first iteration.
    fn pass(&mut self, plan: &Plan<'_>, first: Option<&[Vec<f32>]>) -> Result<Tally> {
        let mut tally = Tally::new(plan.sequences.len());
        let loss = &self.config.loss;
        for (members, learn) in [(&plan.teaching, true), (&plan.silent, false)] {
            for run in microbatch::cut(&plan.sequences, members, self.micro_batch_tokens) {
                let batch = microbatch::pack(&plan.sequences, &run);
                let part = |target: usize, logprob| plan.part(loss, batch.origins[target], logprob, first);
                let machine = &mut self.trainer.machine;
                let stats = if learn {
                    let slope = |target, logprob| part(target, logprob).map_or(0.0, |part| part.slope as f32);
                    machine.accumulate(&batch, plan.temperature, &slope)?
                } else {
                    machine.logprobs(Of::Policy, &batch, plan.temperature)?
                };
                for (target, (&(member, index), stats)) in batch.origins.iter().zip(&stats).enumerate() {
                    let recorded = || plan.completions[member].logprobs[index];
                    let recorded = (plan.fresh[member] && first.is_none()).then(recorded);
                    tally.add(member, stats, recorded, part(target, stats.logprob));
                }
            }
        }
        Ok(tally)
    }

    fn update(&mut self, learned: bool) -> Result<Update> {
        if self.dry_run { self.trainer.measure(learned) } else { self.trainer.update(learned) }
    }

    fn lead(&self, tally: &Tally, update: Update, trained: Trained) -> Metrics {
        let mut line = Metrics::default();
        line.count("step", self.trainer.updates() + u64::from(self.dry_run));
        line.count("policy_step", self.trainer.state.step + 1);
        line.real("loss", tally.loss);
        update.report(&mut line);
        line.count("num_tokens", self.trainer.state.tokens_consumed + trained.tokens);
        line
    }
}

impl Plan<'_> {
    /// A token's part of the loss, if its completion counts.
    fn part(
        &self,
        loss: &LossConfig,
        (member, index): (usize, usize),
        logprob: f32,
        first: Option<&[Vec<f32>]>,
    ) -> Option<TokenLoss> {
        let weight = self.weights[member]?;
        let sampled = self.completions[member].logprobs[index];
        // The policy that sampled is the old one, unless its difference from the one that the step began with has a weight.
        let old = match first {
            _ if loss.importance_sampling_clip_max.is_none() && !self.fresh[member] => Some(sampled),
            Some(first) => Some(first[member][index]),
            None => None,
        };
        let reference = self.reference.get(member).map(|logprobs| logprobs[index]);
        let logprobs = Logprobs { now: logprob, old, sampled, reference };
        Some(token_loss(loss, self.advantages[member], logprobs).weighted(weight))
    }

    fn trained(&self, groups: &[Group]) -> Trained {
        let tokens: usize = self.sequences.iter().map(|one| one.prompt.len() + one.completion.len()).sum();
        Trained { prompts: groups.len() as u64, tokens: tokens as u64 }
    }
}

fn rewards_of(line: &mut Metrics, groups: &[Group], advantages: &Advantages) {
    line.real("reward", advantages.reward_mean);
    line.real("reward_std", advantages.reward_std);
    line.real("frac_reward_zero_std", advantages.zero_std_frac);
    for (name, mean) in groups::part_means(groups) {
        line.real(&format!("rewards/{name}/mean"), mean);
    }
    let unscored = groups.iter().flat_map(|group| &group.completions).filter(|one| one.reward.is_none()).count();
    line.count("num_unscored", unscored as u64);
}
