//! Trains a policy on one input and publishes what comes out as a new directory: GRPO on scored rollouts, or cross-entropy on
//! demonstrations.

use std::path::{Path, PathBuf};

use crate::checkpoint;
use crate::command::Report;
use crate::error::{Error, Result};
use crate::grpo::groups::{Group, Groups};
use crate::grpo::health::Health;
use crate::grpo::metrics::Metrics;
use crate::lines::batches::read_ahead;
use crate::lines::jsonl::Input;
use crate::lines::record::{Line, Message};
use crate::optim::OptimizerConfig;
use crate::process::message::note;
use crate::process::progress::Progress;
use crate::tokenizer::{TemplateArgs, Tokenizer, stop_ids};
use crate::train::config::{GrpoConfig, SupervisedConfig};
use crate::train::grpo_step::GrpoTrainer;
use crate::train::supervised::{self, Encode};
use crate::train::trainer::{OpenBackend, Trainer, notice};
use crate::train::{COMMAND, Taken, in_steps};

/// What to train, on what, and where the result goes.
#[derive(Debug, Clone)]
pub struct OnceJob {
    /// Model directory to start from.
    pub policy: PathBuf,
    /// Start from random weights; `policy` then has `config.json` and the tokenizer only.
    pub init: bool,
    /// Directory to make; `None` makes none.
    pub out: Option<PathBuf>,
    /// Leave optimizer and state out of `out`: a starting model, at step 0.
    pub weights_only: bool,
    /// Groups or demonstrations per step; `None` takes the whole input for one step.
    pub groups_per_step: Option<usize>,
    /// The most tokens in the model at once; `None` leaves it to the device.
    pub micro_batch_tokens: Option<usize>,
    /// Seed of the run; `None` keeps a checkpoint's own.
    pub seed: Option<u64>,
    /// The loss.
    pub objective: Objective,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Recorded in `out` as the command that made it.
    pub command_line: Vec<String>,
}

/// What a step minimises.
#[derive(Debug, Clone)]
pub enum Objective {
    /// The clipped surrogate loss on scored rollouts.
    Grpo {
        /// Numbers of the step.
        config: Box<GrpoConfig>,
        /// Measure each step, and change nothing.
        dry_run: bool,
    },
    /// Cross-entropy on demonstrations.
    Supervised {
        /// Learn the tokens of the prompt too.
        loss_on_prompt: bool,
        /// Another chat template than the model's, and variables for it.
        template: TemplateArgs,
    },
}

/// Trains on `input` until it ends; each step's metrics go to `report`.
///
/// # Errors
/// [`Error::Data`] when the input holds no step, [`Error::Record`] for a record that cannot be trained on, [`Error::Numerics`] as
/// [`GrpoTrainer::step`], and those of opening the policy and of publishing.
pub fn train(job: &OnceJob, input: Input, open: OpenBackend<'_>, report: &mut Report) -> Result<()> {
    let mut trainer = match job.init {
        true => Trainer::random(&job.policy, job.optimizer.clone(), job.seed.unwrap_or_default(), open)?,
        false => Trainer::open(&job.policy, job.optimizer.clone(), job.seed, open)?,
    };
    checkpoint::verify(&job.policy)?;
    let mut told = Told { report, progress: Progress::new(COMMAND) };
    let taken = match &job.objective {
        Objective::Grpo { config, dry_run } => train_grpo(job, input, &mut trainer, config, *dry_run, &mut told)?,
        Objective::Supervised { loss_on_prompt, template } => {
            train_supervised(job, input, &mut trainer, (*loss_on_prompt, template), &mut told)?
        }
    };
    drop(told);
    if taken.steps == 0 && !job.init {
        return Err(Error::Data("no records in the input".into()));
    }
    if taken.left_over > 0 {
        note(COMMAND, &format!("left over at the end of the input, too few for a step: {}", taken.left_over));
    }
    if let Some(out) = &job.out {
        match job.weights_only {
            true => trainer.publish_weights(out)?,
            false => trainer.publish(out, &[], job.command_line.clone())?,
        }
    }
    Ok(())
}

/// Where the metrics of a step are told: on the output, and in short to a person who watches.
struct Told<'a> {
    report: &'a mut Report,
    progress: Progress,
}

impl Told<'_> {
    fn step(&mut self, line: &Metrics) {
        notice(line).iter().for_each(|words| self.progress.note(words));
        self.report.write(&line.to_json());
        self.progress.update(|| line.brief());
    }
}

fn train_grpo(
    job: &OnceJob,
    input: Input,
    trainer: &mut Trainer,
    config: &GrpoConfig,
    dry_run: bool,
    told: &mut Told<'_>,
) -> Result<Taken> {
    let groups = Groups::new(input, trainer.model_config().into());
    let tokens = trainer.micro_batch_tokens(job.micro_batch_tokens);
    let dynamic = config.dynamic_sampling(job.groups_per_step)?;
    let mut grpo = GrpoTrainer::new(trainer, config.clone(), tokens, dry_run)?.choosing_groups(dynamic.clone());
    let mut health = Health::of_steps(config.logprob_band);
    let more = &mut |groups: &[Group]| dynamic.as_ref().map_or(Ok(0), |dynamic| dynamic.more(groups));
    in_steps(groups, job.groups_per_step, more, &mut |groups| {
        grpo.step(groups, &mut |line| told.step(&health.mark(line, groups)))?;
        health.tell(&|words| told.progress.note(words));
        let shortage = dynamic.as_ref().map(|dynamic| dynamic.shortage(grpo.trainer().policy_step(), groups));
        shortage.transpose()?.flatten().iter().for_each(|words| told.progress.note(words));
        Ok(())
    })
}

fn train_supervised(
    job: &OnceJob,
    input: Input,
    trainer: &mut Trainer,
    (loss_on_prompt, template): (bool, &TemplateArgs),
    told: &mut Told<'_>,
) -> Result<Taken> {
    let limits = trainer.model_config().into();
    let micro_batch_tokens = trainer.micro_batch_tokens(job.micro_batch_tokens);
    let config = SupervisedConfig { loss_on_prompt, micro_batch_tokens };
    let (encode, salt) = (encoder(&job.policy, template)?, template.identity()?);
    let example = move |line: Line| {
        let mut example = supervised::example(&line, limits, &*encode)?;
        if let Some(salt) = &salt {
            example.digest = blake3::keyed_hash(salt, &example.digest).into();
        }
        Ok(Some(example))
    };
    in_steps(read_ahead(input, example), job.groups_per_step, &mut |_| Ok(0), &mut |examples| {
        told.step(&supervised::step(trainer, config, examples)?);
        Ok(())
    })
}

/// Encodes a demonstration as `rollout` would have sampled it: the chat as prompt, then the text and the token that ends a turn.
fn encoder(dir: &Path, template: &TemplateArgs) -> Result<Box<Encode>> {
    let tokenizer = Tokenizer::with_template(dir, template)?;
    let end = tokenizer.end_of_turn(&stop_ids(dir)?);
    Ok(Box::new(move |messages: &[Message], text: &str| {
        let chat = tokenizer.chat(messages).map_err(|what| Error::Data(format!("chat template: {what}")))?;
        let completion = tokenizer.encode(text)?.into_iter().chain([end]).collect();
        Ok((tokenizer.encode(&chat)?, completion))
    }))
}
