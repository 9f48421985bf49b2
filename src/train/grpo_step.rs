//! Makes one GRPO step: from groups to advantages, gradients, updated weights, and metrics.

use std::path::Path;

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::grpo::advantage::{Advantages, Spread};
use crate::grpo::completion::{ScoredCompletion, Staleness};
use crate::grpo::groups::{self, Group};
use crate::grpo::loss::{Known, LossConfig, SequenceLoss, Survey, TokenLoss, token_weights};
use crate::grpo::metrics::{self, Metrics};
use crate::grpo::pass_stats::PassStats;
use crate::model::{Model, TokenSlope, TokenStats};
use crate::train::backend::Which;
use crate::train::config::GrpoConfig;
use crate::train::dynamic::DynamicSampling;
use crate::train::identity::StepNumbers;
use crate::train::microbatch::{MicroBatch, Sequence};
use crate::train::ranks::{self, Order, agree};
use crate::train::trainer::{Trained, Trainer, Update};
use crate::train::work::Work;

impl GrpoConfig {
    /// Refuses options that contradict each other.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        if (self.loss.beta > 0.0) != self.reference.is_some() {
            return Err(Error::Usage("--beta above 0 needs --reference, and --reference needs --beta above 0".into()));
        }
        if (self.loss.distill > 0.0) != self.teacher.is_some() {
            return Err(Error::Usage(
                "--distill above 0 needs --teacher, and --teacher needs --distill above 0".into(),
            ));
        }
        if !(self.reference_mixup_alpha > 0.0 && self.reference_mixup_alpha <= 1.0) {
            return Err(Error::Usage("--reference-mixup-alpha must be above 0 and at most 1".into()));
        }
        self.loss.check()
    }

    /// How steps of so many groups gather them, if not just those that come.
    ///
    /// # Errors
    /// [`Error::Usage`] without a number of groups.
    pub fn dynamic_sampling(&self, groups_per_step: Option<usize>) -> Result<Option<DynamicSampling>> {
        match (self.dynamic_sampling, groups_per_step) {
            (None, _) => Ok(None),
            (Some(budget), Some(groups)) => Ok(Some(DynamicSampling::new(&self.advantage, groups, budget))),
            (Some(_), None) => Err(Error::Usage("--dynamic-sampling needs --groups-per-step, which it fills".into())),
        }
    }
}

/// Trains a policy by GRPO, a batch of groups at a time.
pub struct GrpoTrainer<'a> {
    trainer: &'a mut Trainer,
    config: GrpoConfig,
    /// Policy id of the reference model.
    reference: Option<String>,
    /// Policy id of the teacher.
    teacher: Option<String>,
    micro_batch_tokens: usize,
    dry_run: bool,
    /// How the groups of a step are chosen, if not all are trained on.
    dynamic: Option<DynamicSampling>,
}

/// The index of the silent members' list among [`Plan::lists`].
const SILENT: usize = 1;

/// What a token that has a slope costs, as a multiple of one that is only measured: a backward pass is twice the products of a forward
/// pass.
const TEACHING_COST: usize = 3;

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
    /// The rank of each member's group.
    owners: Vec<usize>,
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
    /// The same under the teacher.
    teacher: Vec<f32>,
}

impl<'t> GrpoTrainer<'t> {
    /// Loads the reference model and the teacher, as far as there are any.
    ///
    /// # Errors
    /// [`Error::Usage`] when options contradict each other or one of these has another vocabulary, else as [`Model::load`].
    pub fn new(trainer: &'t mut Trainer, config: GrpoConfig, micro_batch_tokens: usize, dry_run: bool) -> Result<Self> {
        ranks::send(trainer.ranks(), || Order::Begin);
        config.check()?;
        let mut reference = None;
        if let Some(dir) = &config.reference {
            let opened = hold_reference(trainer, dir, config.reference_sync_steps.is_some());
            reference = Some(agree(trainer.ranks(), opened)?);
        }
        let mut teacher = None;
        if let Some(dir) = &config.teacher {
            let opened = hold_teacher(trainer, dir);
            teacher = Some(agree(trainer.ranks(), opened)?);
        }
        Ok(Self { trainer, config, reference, teacher, micro_batch_tokens, dry_run, dynamic: None })
    }

    /// Trains on those groups of a step that `dynamic` chooses; without it on all.
    #[must_use]
    pub fn choosing_groups(self, dynamic: Option<DynamicSampling>) -> Self {
        Self { dynamic, ..self }
    }

    /// The policy in training.
    pub fn trainer(&mut self) -> &mut Trainer {
        self.trainer
    }

    /// Trains on `groups`, or those of them that are chosen: `num_iterations` optimizer steps, the metrics of each passed to `emit`.
    /// Rewards and lengths are reported of all. A dry run measures one step, and changes nothing.
    ///
    /// # Errors
    /// [`Error::Record`] when these weights may not be trained on a record, [`Error::Numerics`] when numbers are not finite or sampler
    /// and trainer disagree: the weights must then not be published. That of the model's [`crate::process::cancel::Stop`].
    pub fn step(&mut self, groups: &[Group], emit: &mut dyn FnMut(&Metrics)) -> Result<()> {
        let learned = match &self.dynamic {
            Some(dynamic) => dynamic.choose(groups)?,
            None => groups.iter().collect(),
        };
        ranks::send(self.trainer.ranks(), || Order::step(&learned));
        let plan = self.plan(&learned)?;
        let sampled = self.config.advantage.of(groups)?;
        let trained = plan.trained(self.dynamic.as_ref().map_or(groups.len(), DynamicSampling::prompts));
        let mut first: Option<Vec<Vec<f32>>> = None;
        for _ in 0..if self.dry_run { 1 } else { self.config.num_iterations } {
            let mut stats = self.pass(&plan, first.as_deref())?;
            stats.check(&|member| plan.members[member].completion.place(), self.config.logprob_band)?;
            let update = self.update(stats.learned)?;
            self.refresh_reference()?;
            let mut line = self.lead(&stats, update, trained);
            rewards_of(&mut line, groups, &sampled);
            stats.report(&mut line, self.reference.is_some());
            if self.config.max_staleness != Staleness::Steps(0) {
                metrics::staleness(&mut line, groups, self.trainer.policy_step());
            }
            metrics::completions(&mut line, groups);
            if self.dynamic.is_some() {
                line.count("dynamic_sampling/groups_sampled", groups.len() as u64);
                line.count("dynamic_sampling/groups_trained", learned.len() as u64);
            }
            emit(&line);
            first.get_or_insert_with(|| std::mem::take(&mut stats.logprobs));
        }
        if !self.dry_run {
            let numbers = StepNumbers::Grpo {
                config: &self.config,
                reference: self.reference.as_deref(),
                teacher: self.teacher.as_deref(),
                micro_batch_tokens: self.micro_batch_tokens,
            };
            self.trainer.advance(groups::digest(&learned).as_bytes(), numbers, trained);
        }
        Ok(())
    }

    fn plan<'a>(&mut self, groups: &[&'a Group]) -> Result<Plan<'a>> {
        let held = self.trainer.identity();
        let advantages = self.config.advantage.of(groups)?;
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
                teacher: Vec::new(),
            });
        }
        let temperature = groups::temperature(groups)?;
        let lengths: Vec<usize> = counting.iter().map(|length| length.unwrap_or(0)).collect();
        let weights = token_weights(&self.config.loss, &lengths);
        let (mut teaching, mut silent) = (Vec::new(), Vec::new());
        for (index, member) in members.iter_mut().enumerate() {
            member.weight = counting[index].map(|_| weights[index]);
            let LossConfig { beta, distill, entropy_coef, .. } = self.config.loss;
            let always = beta > 0.0 || distill > 0.0 || entropy_coef != 0.0;
            let has_slope = member.weight.is_some() && (member.advantage != 0.0 || always);
            if has_slope { teaching.push(index) } else { silent.push(index) }
        }
        let mut plan = Plan { members, sequences, temperature, teaching, silent, owners: Vec::new() };
        plan.deal(groups, self.trainer.ranks().count());
        if self.reference.is_some() {
            let logprobs = self.all_logprobs(&plan, Which::Reference)?;
            plan.members.iter_mut().zip(logprobs).for_each(|(member, logprobs)| member.reference = logprobs);
        }
        if self.teacher.is_some() {
            let logprobs = self.all_logprobs(&plan, Which::Teacher)?;
            plan.members.iter_mut().zip(logprobs).for_each(|(member, logprobs)| member.teacher = logprobs);
        }
        Ok(plan)
    }

    /// Log-probabilities of each member's tokens under a frozen model (nats).
    fn all_logprobs(&mut self, plan: &Plan<'_>, which: Which) -> Result<Vec<Vec<f32>>> {
        let all: Vec<usize> = (0..plan.sequences.len()).collect();
        let work = plan.work(self.micro_batch_tokens);
        let measure =
            &mut |trainer: &mut Trainer, _, batch: &MicroBatch| trainer.logprobs(which, batch, plan.temperature);
        let stats = work.run(self.trainer, &[&all], measure)?;
        Ok(stats.iter().map(|stats| stats.iter().map(|token| token.logprob).collect()).collect())
    }

    /// Adds up the gradients of the step's loss at the current weights, and statistics of its tokens. `first` are the
    /// log-probabilities of the step's first iteration.
    fn pass(&mut self, plan: &Plan<'_>, first: Option<&[Vec<f32>]>) -> Result<PassStats> {
        let survey = self.survey(plan, first)?;
        let sequences = plan.losses(&self.config.loss, first, survey.as_deref());
        let loss = |member: usize, index, logprob| Some(sequences[member].as_ref()?.token(index, logprob));
        let work = plan.work(self.micro_batch_tokens);
        let stats = work.run(self.trainer, &plan.lists(), &mut |trainer, list, batch| {
            if list == SILENT {
                return trainer.logprobs(Which::Policy, batch, plan.temperature);
            }
            let slope = |target: usize, logprob| {
                let (member, index) = batch.origins[target];
                loss(member, index, logprob).map_or(
                    TokenSlope::default(),
                    |TokenLoss { slope, entropy_slope, .. }| TokenSlope {
                        logprob: slope as f32,
                        entropy: entropy_slope as f32,
                    },
                )
            };
            trainer.accumulate(batch, plan.temperature, &slope)
        })?;
        let mut pass = PassStats::new(plan.sequences.len());
        for &member in plan.lists().into_iter().flatten() {
            let Member { completion, is_fresh, .. } = &plan.members[member];
            for (index, stats) in stats[member].iter().enumerate() {
                let recorded = (*is_fresh && first.is_none()).then(|| completion.logprobs[index]);
                pass.add(member, stats, recorded, loss(member, index, stats.logprob));
            }
        }
        Ok(pass)
    }

    /// What the policy makes of each member's tokens, where the loss of one depends on others.
    fn survey(&mut self, plan: &Plan<'_>, first: Option<&[Vec<f32>]>) -> Result<Option<Vec<Vec<TokenStats>>>> {
        let loss = &self.config.loss;
        let has_old = plan.members.iter().any(|member| member.old(loss, None).is_some());
        if !loss.needs_survey(first.is_some() || has_old) {
            return Ok(None);
        }
        let work = plan.work(self.micro_batch_tokens);
        let measure = &mut |trainer: &mut Trainer, _, batch: &MicroBatch| {
            trainer.logprobs(Which::Policy, batch, plan.temperature)
        };
        work.run(self.trainer, &plan.lists(), measure).map(Some)
    }

    fn update(&mut self, learned: bool) -> Result<Update> {
        if self.dry_run { self.trainer.measure(learned) } else { self.trainer.update(learned) }
    }

    /// The log-probabilities of a step's tokens under the reference stay those from before its first update.
    fn refresh_reference(&mut self) -> Result<()> {
        match self.config.reference_sync_steps {
            Some(steps) if !self.dry_run && self.trainer.updates().is_multiple_of(steps) => {
                self.trainer.mix_reference(self.config.reference_mixup_alpha)
            }
            _ => Ok(()),
        }
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

impl Member<'_> {
    /// Log-probabilities under the policy that the ratio is to; `None` if it is the one in training. That is the policy that sampled the
    /// tokens. With importance sampling that one has a factor of its own, and the ratio is to the policy that the step began with.
    fn old<'a>(&'a self, config: &LossConfig, first: Option<&'a [f32]>) -> Option<&'a [f32]> {
        let is_to_sampler = config.importance_sampling_clip_max.is_none() && !self.is_fresh;
        if is_to_sampler { Some(&self.completion.logprobs) } else { first }
    }
}

impl Plan<'_> {
    /// All members: those to learn from, and those that are [`SILENT`].
    fn lists(&self) -> [&[usize]; 2] {
        [&self.teaching, &self.silent]
    }

    fn work(&self, max_tokens: usize) -> Work<'_> {
        Work { sequences: &self.sequences, owners: &self.owners, max_tokens }
    }

    /// Deals the groups out to `ranks`, by what they cost.
    fn deal(&mut self, groups: &[&Group], ranks: usize) {
        let mut costs: Vec<usize> = self.sequences.iter().map(|one| one.completion.len()).collect();
        self.teaching.iter().for_each(|&member| costs[member] *= TEACHING_COST);
        let (mut of_groups, mut start) = (Vec::new(), 0);
        for group in groups {
            let members = start..start + group.completions.len();
            start = members.end;
            of_groups.push(self.sequences[members.start].prompt.len() + costs[members].iter().sum::<usize>());
        }
        let owners = ranks::deal(&of_groups, ranks).into_iter().zip(groups);
        self.owners = owners.flat_map(|(owner, group)| std::iter::repeat_n(owner, group.completions.len())).collect();
    }

    /// The losses of each member's tokens; `None` where it does not count. `first` are the log-probabilities of the step's first
    /// iteration.
    fn losses<'a>(
        &'a self,
        config: &'a LossConfig,
        first: Option<&'a [Vec<f32>]>,
        survey: Option<&'a [Vec<TokenStats>]>,
    ) -> Vec<Option<SequenceLoss<'a>>> {
        let counting = || self.members.iter().enumerate().filter(|(_, member)| member.weight.is_some());
        let entropies = survey.map(|survey| -> Vec<f32> {
            counting().flat_map(|(index, _)| survey[index].iter().map(|token| token.entropy)).collect()
        });
        let least_entropy = entropies.as_deref().map_or(0.0, |all| quantile(all, 1.0 - config.top_entropy_quantile));
        let acting = match &entropies {
            Some(all) => all.iter().filter(|entropy| **entropy >= least_entropy).count(),
            None => counting().map(|(_, member)| member.completion.tokens.len()).sum(),
        };
        let entropy_weight = -config.entropy_coef / acting.max(1) as f64;
        let one = |(index, member): (usize, &'a Member<'a>)| {
            let known = Known {
                advantage: member.advantage,
                weight: member.weight?,
                entropy_weight,
                old: member.old(config, first.map(|first| &first[index][..])),
                sampled: &member.completion.logprobs,
                reference: (!member.reference.is_empty()).then_some(&member.reference[..]),
                teacher: (!member.teacher.is_empty()).then_some(&member.teacher[..]),
            };
            let survey = survey.map(|survey| Survey { tokens: &survey[index], least_entropy });
            Some(SequenceLoss::new(config, known, survey))
        };
        self.members.iter().enumerate().map(one).collect()
    }

    fn trained(&self, prompts: usize) -> Trained {
        let tokens: usize = self.sequences.iter().map(|one| one.prompt.len() + one.completion.len()).sum();
        Trained { prompts: prompts as u64, tokens: tokens as u64 }
    }
}

/// Loads the reference model, as far as training has changed it, and returns the policy id that it began with.
fn hold_reference(trainer: &mut Trainer, dir: &Path, changes: bool) -> Result<String> {
    let model = frozen("--reference", trainer.own_reference().as_deref().unwrap_or(dir), trainer)?;
    trainer.hold_reference(model, changes)?;
    Ok(checkpoint::identity(dir)?.policy_id)
}

/// Loads the teacher, and returns its policy id.
fn hold_teacher(trainer: &mut Trainer, dir: &Path) -> Result<String> {
    let model = frozen("--teacher", dir, trainer)?;
    trainer.hold_teacher(model)?;
    Ok(checkpoint::identity(dir)?.policy_id)
}

/// Loads a model whose tokens are to be the policy's.
fn frozen(option: &str, dir: &Path, trainer: &Trainer) -> Result<Model> {
    let model = Model::load(dir)?;
    if model.config().vocab_size != trainer.model_config().vocab_size {
        return Err(Error::Usage(format!("{option} has another vocabulary than --policy")));
    }
    Ok(model)
}

fn rewards_of(line: &mut Metrics, groups: &[Group], advantages: &Advantages) {
    line.real("reward", advantages.reward_mean);
    line.real("reward_std", advantages.reward_std);
    line.real("frac_reward_zero_std", advantages.zero_std_frac);
    for (name, values) in groups::parts(groups) {
        let spread = Spread::of(&values);
        line.real(&format!("rewards/{name}/mean"), spread.mean);
        line.real(&format!("rewards/{name}/std"), spread.std);
    }
    let unscored = groups.iter().flat_map(|group| &group.completions).filter(|one| one.reward.is_none()).count();
    line.count("num_unscored", unscored as u64);
}

/// The number below which this fraction of `values` lies, between two of them if need be, as `torch.quantile` has it.
fn quantile(values: &[f32], fraction: f64) -> f32 {
    let mut values = values.to_vec();
    values.sort_by(f32::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return 0.0 };
    let place = fraction * last as f64;
    let (below, above) = (values[place as usize], values[(place.ceil() as usize).min(last)]);
    below + (above - below) * place.fract() as f32
}
