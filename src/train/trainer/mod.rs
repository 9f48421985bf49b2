//! A policy in training: its weights, optimizer and lineage.

mod publish;
mod reference;

use std::path::{Path, PathBuf};

use crate::checkpoint::{self, Identity, State};
use crate::directory::{self, has_weights};
use crate::error::{Error, Result};
use crate::grpo::metrics::Metrics;
use crate::model::{Config, Model, ParameterList, Slope, TokenStats};
use crate::numbers::aligned;
use crate::optim::{self, LossScale, Moments, OptimizerConfig, Rule};
use crate::process::cancel::Stop;
use crate::train::backend::{Backend, Which};
use crate::train::identity::{StepIdentity, StepNumbers};
use crate::train::microbatch::MicroBatch;
use crate::train::ranks::{self, Ranks, agree};

pub use publish::Snapshot;

/// A policy in training.
pub struct Trainer {
    backend: Box<dyn Backend>,
    /// The `state.json` of the next checkpoint.
    state: State,
    config: OptimizerConfig,
    /// The directory it was opened from, or its last checkpoint.
    source: PathBuf,
    /// The reference model, if it changes.
    reference: Option<Model>,
}

/// Makes the backend that trains a model.
pub type OpenBackend<'a> = &'a dyn Fn(Model) -> Result<Box<dyn Backend>>;

/// What an update did.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Norm of all gradients before clipping; `None` when they overflowed f16 and the update was skipped.
    pub grad_norm: Option<f64>,
    /// The learning rate.
    pub learning_rate: f64,
    /// The factor on the loss, and the number of updates skipped since the start of the run.
    pub loss_scale: Option<(u32, u64)>,
}

impl Update {
    /// Adds these numbers to a line of metrics.
    pub fn report(&self, line: &mut Metrics) {
        if let Some(norm) = self.grad_norm {
            line.real("grad_norm", norm);
        }
        line.real("learning_rate", self.learning_rate);
        if let Some((factor, skipped)) = self.loss_scale {
            line.count("loss_scale", factor.into());
            line.count("skipped_updates", skipped);
        }
    }
}

/// A message for the user when the update of this line of metrics was skipped.
#[must_use]
pub fn notice(line: &Metrics) -> Option<String> {
    let (step, factor) = (line.get("step")?, line.get("loss_scale")?);
    let next = factor / 2.0;
    let what = "the gradients overflow f16, the update is skipped";
    line.get("grad_norm")
        .is_none()
        .then(|| format!("step {step}: at loss scale {factor} {what}; the next step tries {next}"))
}

impl Trainer {
    /// Opens the policy in `dir`: a starting model, or a checkpoint with its moments. `seed` overrides the seed of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`] when the directory holds no usable policy, and those of `open`.
    pub fn open(dir: &Path, config: OptimizerConfig, seed: Option<u64>, open: OpenBackend<'_>) -> Result<Self> {
        Config::load(dir)?; // reports a bad config before gigabytes are hashed
        let identity = checkpoint::identity(dir)?;
        let state = State::load(dir)?;
        if state.is_some() && !dir.join(checkpoint::OPTIMIZER).exists() {
            return Err(Error::model(
                dir,
                format!(
                    "no {}: copy it without {} to start a new run from it",
                    checkpoint::OPTIMIZER,
                    checkpoint::STATE
                ),
            ));
        }
        let mut state = state.unwrap_or_else(|| start(identity.policy_id));
        state.files.clear(); // those of `dir`
        state.seed = seed.unwrap_or(state.seed);
        let backend = open(Model::load(dir)?)?;
        if backend.adapter().is_some() && state.base_policy_id.is_none() {
            state.base_policy_id = Some(match directory::base_of(dir)? {
                Some(base) => checkpoint::identity(&base)?.policy_id,
                None if state.step == 0 => state.policy_id.clone(),
                None => {
                    let what = format!("a checkpoint; copy it without {} to start an adapter of it", checkpoint::STATE);
                    return Err(Error::model(dir, what));
                }
            });
        }
        Self::new(backend, state, config, dir)
    }

    /// Starts from random weights of the shape in `dir`'s `config.json`.
    ///
    /// # Errors
    /// [`Error::Usage`] when the directory has weights, [`Error::Io`] or [`Error::Model`] when it has no usable config, and those of
    /// `open`.
    pub fn random(dir: &Path, config: OptimizerConfig, seed: u64, open: OpenBackend<'_>) -> Result<Self> {
        if has_weights(dir) {
            return Err(Error::Usage(format!("{}: has weights; --init is for a directory without", dir.display())));
        }
        let shape = Config::load(dir)?;
        refuse_too_large(&shape, dir)?;
        let text = serde_json::to_vec(&shape).expect("plain data serialises");
        let mut state = start(checkpoint::derive_id(&[b"random", &text, &seed.to_le_bytes()]));
        state.seed = seed;
        Self::new(open(Model::random(shape, seed))?, state, config, dir)
    }

    fn new(mut backend: Box<dyn Backend>, state: State, config: OptimizerConfig, source: &Path) -> Result<Self> {
        ranks::announce_policy(backend.ranks(), source, &state.policy_id)?;
        if let (Some(scale), Some(reached)) = (backend.loss_scale(), state.loss_scale) {
            *scale = reached;
        }
        Ok(Self { backend, state, config, source: source.to_path_buf(), reference: None })
    }

    /// The processes that train together.
    #[must_use]
    pub fn ranks(&self) -> &dyn Ranks {
        self.backend.ranks()
    }

    /// Gives the first rank the moments that are held here.
    pub(super) fn share_moments(&mut self) -> Result<()> {
        self.backend.moments().map(drop)
    }

    /// The policy id and the step of the weights.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity { policy_id: self.state.policy_id.clone(), step: self.state.step }
    }

    /// Steps of training since the starting model.
    #[must_use]
    pub fn policy_step(&self) -> u64 {
        self.state.step
    }

    /// Tokens trained on since the starting model.
    #[must_use]
    pub fn tokens_consumed(&self) -> u64 {
        self.state.tokens_consumed
    }

    /// The model's shape.
    #[must_use]
    pub fn model_config(&self) -> &Config {
        self.backend.config()
    }

    /// The current weights.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn weights(&mut self) -> Result<&Model> {
        self.backend.weights()
    }

    /// Tokens per micro-batch: `chosen`, or what suits the backend.
    #[must_use]
    pub fn micro_batch_tokens(&self, chosen: Option<usize>) -> usize {
        chosen.unwrap_or_else(|| self.backend.default_tokens())
    }

    /// Lets `stop` end a pass early, with its error.
    pub fn stop_with(&mut self, stop: &Stop) {
        self.backend.stop_with(stop);
    }

    /// See [`Backend::share_weights`].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn share_weights(&mut self) -> Result<Option<Vec<u8>>> {
        self.backend.share_weights()
    }

    /// See [`Backend::logprobs`].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn logprobs(&mut self, which: Which, batch: &MicroBatch, temperature: f32) -> Result<Vec<TokenStats>> {
        self.backend.logprobs(which, batch, temperature)
    }

    /// See [`Backend::accumulate`].
    ///
    /// # Errors
    /// Those of the backend.
    pub fn accumulate(&mut self, batch: &MicroBatch, temperature: f32, slope: Slope<'_>) -> Result<Vec<TokenStats>> {
        self.backend.accumulate(batch, temperature, slope)
    }

    /// See [`Backend::loss_scale`].
    pub fn loss_scale(&mut self) -> Option<&mut LossScale> {
        self.backend.loss_scale()
    }

    /// See [`Backend::compute_dtype`].
    #[must_use]
    pub fn compute_dtype(&self) -> Option<&'static str> {
        self.backend.compute_dtype()
    }

    /// Updates made and skipped.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.state.optimizer_steps + self.state.loss_scale.map_or(0, |scale| scale.skipped_updates)
    }

    /// The norm of the gradients; `None` when they overflowed f16 and a smaller loss scale may help.
    ///
    /// `learned` says that some token had a slope. Before the first update of a run every parameter must then have a gradient: one
    /// that has none is not connected to the loss.
    fn grad_norm(&mut self, learned: bool) -> Result<Option<f64>> {
        let norms = self.backend.gradient_norms()?;
        for ((name, _), norm) in self.backend.trained().iter().zip(&norms) {
            if !norm.is_finite() {
                let at = match self.backend.loss_scale() {
                    Some(scale) if scale.after_overflow().is_some() => return Ok(None),
                    Some(_) => " even at loss scale 1; --dtype bf16 or f32 reaches further",
                    None => "",
                };
                return Err(Error::Numerics(format!(
                    "the gradient of {name} is not finite{at}; nothing was published"
                )));
            }
            // That of an adapter's A is a product with B, which begins at zero.
            if learned && self.state.optimizer_steps == 0 && *norm == 0.0 && !name.ends_with("lora_A.weight") {
                return Err(Error::Numerics(format!(
                    "{name} got no gradient in the first step; nothing was published"
                )));
            }
        }
        Ok(Some(optim::global_norm(&norms)))
    }

    /// What an update by the gradients would do; sets them to zero.
    ///
    /// # Errors
    /// As [`Trainer::update`].
    pub fn measure(&mut self, learned: bool) -> Result<Update> {
        let grad_norm = self.grad_norm(learned)?;
        self.backend.clear_gradients()?;
        let loss_scale = self.backend.loss_scale().map(|scale| (scale.factor, scale.skipped_updates));
        Ok(Update { grad_norm, learning_rate: self.learning_rate(), loss_scale })
    }

    /// Updates the weights by the gradients unless these overflowed, and sets them to zero.
    ///
    /// # Errors
    /// [`Error::Numerics`] naming the parameter whose gradient is not finite, or missing; those of the backend; [`Error::Io`] or
    /// [`Error::Model`] when the moments cannot be read.
    pub fn update(&mut self, learned: bool) -> Result<Update> {
        let grad_norm = self.grad_norm(learned)?;
        // Moments are read only now, because until here activations use their memory. A skipped update reads them too: they are zero,
        // and part of the next checkpoint.
        if !self.backend.has_moments() {
            let moments = agree(self.ranks(), self.load_moments())?;
            self.backend.take_moments(moments)?;
        }
        let learning_rate = self.learning_rate();
        match grad_norm {
            Some(norm) => {
                let step = self.state.optimizer_steps + 1;
                self.backend.update(Rule::new(&self.config, norm, step, self.state.seed))?;
                self.state.optimizer_steps = step;
            }
            None => self.backend.clear_gradients()?,
        }
        let loss_scale = self.adapt_loss_scale(grad_norm.is_none());
        Ok(Update { grad_norm, learning_rate, loss_scale })
    }

    /// Adapts the loss scale; returns the factor that was used and the number of updates skipped so far.
    fn adapt_loss_scale(&mut self, overflowed: bool) -> Option<(u32, u64)> {
        let scale = self.backend.loss_scale()?;
        let LossScale { factor, .. } = *scale;
        *scale = if overflowed {
            scale.after_overflow().expect("an overflow at scale 1 is an error")
        } else {
            scale.after_update()
        };
        self.state.loss_scale = Some(*scale);
        Some((factor, scale.skipped_updates))
    }

    /// The learning rate of the next update.
    #[must_use]
    pub fn learning_rate(&self) -> f64 {
        self.config.learning_rate_at(self.state.optimizer_steps)
    }

    fn load_moments(&self) -> Result<Moments> {
        let held_in = self.config.optimizer_state;
        let (parameters, held) = (self.backend.trained(), self.backend.held());
        if self.state.step == 0 {
            let shapes = parameters.into_iter().zip(held).map(|((name, _), held)| (name, vec![held.len()]));
            return Ok(Moments::zeros(&shapes.collect::<Vec<_>>(), held_in));
        }
        let path = self.source.join(checkpoint::OPTIMIZER);
        let moments = Moments::load_parts(&path, &parameters, &held, held_in)?;
        if moments.steps != self.state.optimizer_steps {
            let (found, expected) = (moments.steps, self.state.optimizer_steps);
            return Err(Error::model(
                &path,
                format!("after {found} updates, but {} says {expected}", checkpoint::STATE),
            ));
        }
        Ok(moments)
    }

    /// Ends a step: gives the weights their policy id, and counts what they were trained on.
    pub(super) fn advance(&mut self, records: &[u8], numbers: StepNumbers<'_>, trained: Trained) {
        let parent = std::mem::take(&mut self.state.policy_id);
        let (optimizer, compute_dtype) = (&self.config, self.backend.compute_dtype());
        let adapter = self.backend.adapter().map(|config| (config, self.state.seed));
        let ranks = self.ranks().count();
        let step = StepIdentity { parent: &parent, records, numbers, optimizer, compute_dtype, adapter, ranks };
        self.state.policy_id = step.policy_id();
        self.state.parent_policy_id = parent;
        self.state.step += 1;
        self.state.prompts_consumed += trained.prompts;
        self.state.tokens_consumed += trained.tokens;
    }
}

/// Refuses a model whose weights, gradients and two moments in f32 do not fit in memory. Without a file of weights nothing else checks
/// the sizes in its config.
fn refuse_too_large(shape: &Config, dir: &Path) -> Result<()> {
    let numbers = |(_, shape): (_, &[usize])| shape.iter().product::<usize>();
    let bytes = |list: &ParameterList| list.iter().map(numbers).fold(0, usize::saturating_add).saturating_mul(4);
    let (weights, trained) = (shape.stored(), shape.trainable());
    let bytes = [&weights, &trained, &trained, &trained].map(bytes).into_iter().fold(0, usize::saturating_add);
    if aligned::is_room_for(bytes) {
        return Ok(());
    }
    let what = format!("a model of these sizes takes {} GiB to train, which this machine does not have", bytes >> 30);
    Err(Error::model(dir.join("config.json"), what))
}

/// How much a step was trained on.
#[derive(Debug, Clone, Copy)]
pub struct Trained {
    /// Groups, or demonstrations.
    pub prompts: u64,
    /// Tokens of prompts and completions.
    pub tokens: u64,
}

fn start(policy_id: String) -> State {
    State { policy_id, ..State::default() }
}
