//! Makes one GRPO step: from groups to advantages, gradients, updated weights, and metrics.

use std::sync::OnceLock;

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::grpo::advantage::{Advantages, advantages};
use crate::grpo::groups::{self, Group, ScoredCompletion, Staleness};
use crate::grpo::loss::{Logprobs, LossConfig, TokenLoss, token_loss, token_weights};
use crate::grpo::metrics::{self, Metrics};
use crate::grpo::pass_stats::PassStats;
use crate::model::Model;
use crate::train::backend::Which;
use crate::train::config::GrpoConfig;
use crate::train::identity::StepNumbers;
use crate::train::microbatch::{self, Sequence};
use crate::train::trainer::{Trained, Trainer, Update};

impl GrpoConfig {
    /// Refuses options that contradict each other.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        if (self.loss.beta > 0.0) != self.reference.is_some() {
            return Err(Error::Usage("--beta above 0 needs --reference, and --reference needs --beta above 0".into()));
        }
        self.loss.check()
    }
}

/// Trains a policy by GRPO, a batch of groups at a time.
pub struct GrpoTrainer<'a> {
    trainer: &'a mut Trainer,
    config: GrpoConfig,
    /// Policy id of the reference model.
    reference: Option<String>,
    micro_batch_tokens: usize,
    dry_run: bool,
}

/// The data of a step.
struct Plan<'a> {
    members: Vec<Member<'a>>,
    /// The tokens of each member.
    sequences: Vec<Sequence<'a>>,
    temperature: f32,
    /// Indices of the members whose tokens can have a slope.
    teaching: Vec<usize>,
    /// Indices of the others, which are only measured.
    silent: Vec<usize>,
}

/// A completion in a step.
struct Member<'a> {
    completion: &'a ScoredCompletion,
    advantage: f64,
    /// Weight of each of its tokens in the loss; `None` where it does not count.
    weight: Option<f64>,
    /// Whether the policy in training sampled it.
    is_fresh: bool,
    /// Log-probabilities under the reference model (nats); empty without one.
    reference: Vec<f32>,
}

impl<'t> GrpoTrainer<'t> {
    /// Loads the reference model, if there is one.
    ///
    /// # Errors
    /// [`Error::Usage`] when options contradict each other or the reference has another vocabulary, else as [`Model::load`].
    pub fn new(trainer: &'t mut Trainer, config: GrpoConfig, micro_batch_tokens: usize, dry_run: bool) -> Result<Self> {
        config.check()?;
        let mut reference = None;
        if let Some(dir) = &config.reference {
            let model = Model::load(dir)?;
            if model.config().vocab_size != trainer.model_config().vocab_size {
                return Err(Error::Usage("--reference has another vocabulary than --policy".into()));
            }
            trainer.hold_reference(model)?;
            reference = Some(checkpoint::identity(dir)?.policy_id);
        }
        Ok(Self { trainer, config, reference, micro_batch_tokens, dry_run })
    }

    /// The policy in training.
    pub fn trainer(&mut self) -> &mut Trainer {
        self.trainer
    }

    /// Trains on `groups`: `num_iterations` optimizer steps, the metrics of each passed to `emit`. A dry run measures one, and changes
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Record`] when these weights may not be trained on a record, [`Error::Numerics`] when numbers are not finite or sampler
    /// and trainer disagree: the weights must then not be published. That of the model's [`crate::process::cancel::Stop`].
    pub fn step(&mut self, groups: &[Group], emit: &mut dyn FnMut(&Metrics)) -> Result<()> {
        let rewards: Vec<Vec<_>> =
            groups.iter().map(|group| group.completions.iter().map(|one| one.reward).collect()).collect();
        let advantages = advantages(&rewards, self.config.scale_rewards);
        let plan = self.plan(groups, &advantages)?;
        let trained = plan.trained(groups);
        let mut first: Option<Vec<Vec<f32>>> = None;
        for _ in 0..if self.dry_run { 1 } else { self.config.num_iterations } {
            let mut stats = self.pass(&plan, first.as_deref())?;
            stats.check(&|member| plan.members[member].completion.place(), self.config.logprob_band)?;
            let update = self.update(stats.learned)?;
            let mut line = self.lead(&stats, update, trained);
            rewards_of(&mut line, groups, &advantages);
            stats.report(&mut line, self.reference.is_some());
            if self.config.max_staleness != Staleness::Steps(0) {
                metrics::staleness(&mut line, groups, self.trainer.policy_step());
            }
            metrics::completions(&mut line, groups);
            emit(&line);
            first.get_or_insert_with(|| std::mem::take(&mut stats.logprobs));
        }
        if !self.dry_run {
            let numbers = StepNumbers::Grpo {
                config: &self.config,
                reference: self.reference.as_deref(),
                micro_batch_tokens: self.micro_batch_tokens,
            };
            self.trainer.advance(groups::digest(groups).as_bytes(), numbers, trained);
        }
        Ok(())
    }

    fn plan<'a>(&mut self, groups: &'a [Group], advantages: &Advantages) -> Result<Plan<'a>> {
        let held = self.trainer.identity();
        let (mut members, mut sequences, mut counting) = (Vec::new(), Vec::new(), Vec::new());
        let completions = groups.iter().flat_map(|group| &group.completions);
        for (completion, advantage) in completions.zip(advantages.groups.iter().flatten()) {
            completion.check_policy(&held.policy_id, held.step, self.config.max_staleness)?;
            let masked = self.config.loss.mask_truncated && completion.truncated;
            counting.push((completion.reward.is_some() && !masked).then_some(completion.tokens.len()));
            sequences.push(Sequence { prompt: &completion.prompt, completion: &completion.tokens });
            members.push(Member {
                completion,
                advantage: *advantage,
                weight: None,
                is_fresh: completion.is_fresh(&held.policy_id),
                reference: Vec::new(),
            });
        }
        let temperature = groups::temperature(groups)?;
        let lengths: Vec<usize> = counting.iter().map(|length| length.unwrap_or(0)).collect();
        let weights = token_weights(&self.config.loss, &lengths);
        let (mut teaching, mut silent) = (Vec::new(), Vec::new());
        for (index, member) in members.iter_mut().enumerate() {
            member.weight = counting[index].map(|_| weights[index]);
            let has_slope = member.weight.is_some() && (member.advantage != 0.0 || self.config.loss.beta > 0.0);
            if has_slope { teaching.push(index) } else { silent.push(index) }
        }
        let mut plan = Plan { members, sequences, temperature, teaching, silent };
        if self.reference.is_some() {
            self.add_reference_logprobs(&mut plan)?;
        }
        Ok(plan)
    }

    fn add_reference_logprobs(&mut self, plan: &mut Plan<'_>) -> Result<()> {
        let all: Vec<usize> = (0..plan.sequences.len()).collect();
        for run in microbatch::cut(&plan.sequences, &all, self.micro_batch_tokens) {
            let batch = microbatch::pack(&plan.sequences, &run);
            let stats = self.trainer.logprobs(Which::Reference, &batch, plan.temperature)?;
            for ((member, _), stats) in batch.origins.iter().zip(stats) {
                plan.members[*member].reference.push(stats.logprob);
            }
        }
        Ok(())
    }

    /// Adds up the gradients of the step's loss at the current weights, and statistics of its tokens. `first` are the
    /// log-probabilities of the step's first iteration.
    fn pass(&mut self, plan: &Plan<'_>, first: Option<&[Vec<f32>]>) -> Result<PassStats> {
        let mut pass = PassStats::new(plan.sequences.len());
        for (members, learn) in [(&plan.teaching, true), (&plan.silent, false)] {
            for run in microbatch::cut(&plan.sequences, members, self.micro_batch_tokens) {
                let batch = microbatch::pack(&plan.sequences, &run);
                // The backward pass needs a token's loss before its statistics are complete; it is kept for them.
                let losses: Vec<OnceLock<Option<TokenLoss>>> = vec![OnceLock::new(); batch.targets.len()];
                let loss = |target: usize, logprob| {
                    *losses[target].get_or_init(|| plan.loss(&self.config.loss, batch.origins[target], logprob, first))
                };
                let stats = if learn {
                    let slope = |target, logprob| loss(target, logprob).map_or(0.0, |loss| loss.slope as f32);
                    self.trainer.accumulate(&batch, plan.temperature, &slope)?
                } else {
                    self.trainer.logprobs(Which::Policy, &batch, plan.temperature)?
                };
                for (target, (&(member, index), stats)) in batch.origins.iter().zip(&stats).enumerate() {
                    let Member { completion, is_fresh, .. } = &plan.members[member];
                    let recorded = (*is_fresh && first.is_none()).then(|| completion.logprobs[index]);
                    pass.add(member, stats, recorded, loss(target, stats.logprob));
                }
            }
        }
        Ok(pass)
    }

    fn update(&mut self, learned: bool) -> Result<Update> {
        if self.dry_run { self.trainer.measure(learned) } else { self.trainer.update(learned) }
    }

    fn lead(&self, stats: &PassStats, update: Update, trained: Trained) -> Metrics {
        let mut line = Metrics::default();
        line.count("step", self.trainer.updates() + u64::from(self.dry_run));
        line.count("policy_step", self.trainer.policy_step() + 1);
        line.real("loss", stats.loss);
        update.report(&mut line);
        line.count("num_tokens", self.trainer.tokens_consumed() + trained.tokens);
        line
    }
}

impl Plan<'_> {
    /// The loss of token `index` of a member, times its weight; `None` where the member does not count.
    fn loss(
        &self,
        config: &LossConfig,
        (member, index): (usize, usize),
        logprob: f32,
        first: Option<&[Vec<f32>]>,
    ) -> Option<TokenLoss> {
        let Member { completion, advantage, weight, is_fresh, reference } = &self.members[member];
        let weight = (*weight)?;
        let sampled = completion.logprobs[index];
        // The ratio is to the policy that sampled the token. With importance sampling that one has a factor of its own, and the
        // ratio is to the policy that the step began with.
        let old = match first {
            _ if config.importance_sampling_clip_max.is_none() && !is_fresh => Some(sampled),
            Some(first) => Some(first[member][index]),
            None => None,
        };
        let logprobs = Logprobs { now: logprob, old, sampled, reference: reference.get(index).copied() };
        Some(token_loss(config, *advantage, logprobs).weighted(weight))
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
