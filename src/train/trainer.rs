//! The weights in training, with their gradients, moments and lineage: what every kind of step shares.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::{self, Identity, Publication, State};
use crate::error::{Error, Result};
use crate::grpo::metrics::Metrics;
use crate::model::{Config, Model, ParameterList, has_weights};
use crate::numbers::aligned;
use crate::numbers::dtype::Dtype;
use crate::optim::{self, LossScale, Moments, OptimizerConfig, Rule};
use crate::train::backend::{Cpu, Machine};

/// A policy that learns.
pub struct Trainer {
    /// Where it computes: holds weights, gradients and moments.
    pub machine: Box<dyn Machine>,
    /// What the next checkpoint will remember.
    pub state: State,
    /// Directories with weights of earlier steps, named by them, that the next checkpoint keeps: see [`checkpoint::OLDER`].
    pub older: Vec<PathBuf>,
    config: OptimizerConfig,
    source: PathBuf,
}

/// Makes the machine that a model is trained on.
pub type Place<'a> = &'a dyn Fn(Model) -> Result<Box<dyn Machine>>;

/// The processor, which any model fits.
///
/// # Errors
/// Never.
pub fn on_cpu(model: Model) -> Result<Box<dyn Machine>> {
    Ok(Box::new(Cpu::new(model)))
}

/// What an update was.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Norm of all gradients, before clipping; `None` when they overflowed f16, and the update was left out.
    pub grad_norm: Option<f64>,
    /// Learning rate used.
    pub learning_rate: f64,
    /// What the loss was multiplied by, and how many updates were left out since the run's start.
    pub loss_scale: Option<(u32, u64)>,
}

impl Update {
    /// Adds it to a line of metrics.
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

/// What a user should hear of a step.
#[must_use]
pub fn notice(line: &Metrics) -> Option<String> {
    let (step, factor) = (line.get("step")?, line.get("loss_scale")?);
    let next = factor / 2.0;
    let what = "the gradients overflow f16, the update is left out";
    line.get("grad_norm")
        .is_none()
        .then(|| format!("step {step}: at loss scale {factor} {what}; the next step tries {next}"))
}

impl Trainer {
    /// Opens the policy in `dir` at a place: a starting model, or a checkpoint with its moments. `seed` names the run's seed; a
    /// checkpoint knows its own.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`] when the directory holds no usable policy, and those of `place`.
    pub fn open(dir: &Path, config: OptimizerConfig, seed: Option<u64>, place: Place<'_>) -> Result<Self> {
        Config::load(dir)?; // says what is wrong before gigabytes are hashed
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
        state.files.clear(); // of that directory alone
        state.seed = seed.unwrap_or(state.seed);
        Ok(Self::new(place(Model::load(dir)?)?, state, config, dir))
    }

    /// Starts from random weights in the shape of `dir`'s `config.json`.
    ///
    /// # Errors
    /// [`Error::Usage`] when the directory has weights, [`Error::Io`] or [`Error::Model`] when it has no usable config, and those of
    /// `place`.
    pub fn random(dir: &Path, config: OptimizerConfig, seed: u64, place: Place<'_>) -> Result<Self> {
        if has_weights(dir) {
            return Err(Error::Usage(format!("{}: has weights; --init is for a directory without", dir.display())));
        }
        let shape = Config::load(dir)?;
        refuse_too_large(&shape, dir)?;
        let text = serde_json::to_vec(&shape).expect("plain data serialises");
        let mut state = start(checkpoint::derive_id(&[b"random", &text, &seed.to_le_bytes()]));
        state.seed = seed;
        Ok(Self::new(place(Model::random(shape, seed))?, state, config, dir))
    }

    fn new(mut machine: Box<dyn Machine>, state: State, config: OptimizerConfig, source: &Path) -> Self {
        if let (Some(scale), Some(reached)) = (machine.loss_scale(), state.loss_scale) {
            *scale = reached;
        }
        Self { machine, state, older: Vec::new(), config, source: source.to_path_buf() }
    }

    /// Which weights it holds.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity { policy_id: self.state.policy_id.clone(), step: self.state.step }
    }

    /// Updates made and left out.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.state.optimizer_steps + self.state.loss_scale.map_or(0, |scale| scale.skipped_updates)
    }

    /// The norm of the gradients; `None` when they overflowed f16 and half the loss scale may do.
    ///
    /// `learned` says that some token had a slope. Before the first update of a run every parameter must then have a gradient:
    /// one without is cut off from the loss.
    fn grad_norm(&mut self, learned: bool) -> Result<Option<f64>> {
        let norms = self.machine.gradient_norms()?;
        for ((name, _), norm) in self.machine.config().trainable().named().iter().zip(&norms) {
            if !norm.is_finite() {
                let at = match self.machine.loss_scale() {
                    Some(scale) if scale.after_overflow().is_some() => return Ok(None),
                    Some(_) => " even at loss scale 1; --dtype bf16 or f32 reaches further",
                    None => "",
                };
                return Err(Error::Numerics(format!(
                    "the gradient of {name} is not finite{at}; nothing was published"
                )));
            }
            if learned && self.state.optimizer_steps == 0 && *norm == 0.0 {
                return Err(Error::Numerics(format!(
                    "{name} got no gradient in the first step; nothing was published"
                )));
            }
        }
        Ok(Some(optim::global_norm(&norms)))
    }

    /// What an update by the gradients would be. Empties these.
    ///
    /// # Errors
    /// As [`Trainer::update`].
    pub fn measure(&mut self, learned: bool) -> Result<Update> {
        let grad_norm = self.grad_norm(learned)?;
        self.machine.clear_gradients()?;
        let loss_scale = self.machine.loss_scale().map(|scale| (scale.factor, scale.skipped_updates));
        Ok(Update { grad_norm, learning_rate: self.learning_rate(), loss_scale })
    }

    /// Updates the weights by the gradients, unless these overflowed, and empties them.
    ///
    /// # Errors
    /// [`Error::Numerics`] with the parameter whose gradient is not finite, or missing; those of the machine; [`Error::Io`] or
    /// [`Error::Model`] when the moments cannot be read.
    pub fn update(&mut self, learned: bool) -> Result<Update> {
        let grad_norm = self.grad_norm(learned)?;
        // Moments are read only now: until here their memory serves the activations. Those of a run whose first updates are left
        // out are zero, and belong to its checkpoints all the same.
        if !self.machine.has_moments() {
            let moments = self.load_moments()?;
            self.machine.take_moments(moments)?;
        }
        let learning_rate = self.learning_rate();
        match grad_norm {
            Some(norm) => {
                let step = self.state.optimizer_steps + 1;
                self.machine.update(Rule::new(&self.config, norm, step, self.state.seed))?;
                self.state.optimizer_steps = step;
            }
            None => self.machine.clear_gradients()?,
        }
        let loss_scale = self.adapt_loss_scale(grad_norm.is_none());
        Ok(Update { grad_norm, learning_rate, loss_scale })
    }

    /// The factor that was used, and the count of updates left out.
    fn adapt_loss_scale(&mut self, overflowed: bool) -> Option<(u32, u64)> {
        let scale = self.machine.loss_scale()?;
        let LossScale { factor, .. } = *scale;
        *scale = if overflowed { scale.after_overflow().expect("there is half of it") } else { scale.after_update() };
        self.state.loss_scale = Some(*scale);
        Some((factor, scale.skipped_updates))
    }

    /// The learning rate of the next update.
    #[must_use]
    pub fn learning_rate(&self) -> f64 {
        self.config.learning_rate_at(self.state.optimizer_steps)
    }

    fn with_moments(&self) -> Vec<(String, Vec<usize>)> {
        self.machine.config().with_moments().named()
    }

    fn load_moments(&self) -> Result<Moments> {
        let held_in = self.config.optimizer_state;
        let parameters = self.with_moments();
        if self.state.step == 0 {
            return Ok(Moments::zeros(&parameters, held_in));
        }
        let path = self.source.join(checkpoint::OPTIMIZER);
        let moments = Moments::load(&path, &parameters, held_in)?;
        if moments.steps != self.state.optimizer_steps {
            let (found, expected) = (moments.steps, self.state.optimizer_steps);
            return Err(Error::model(
                &path,
                format!("after {found} updates, but {} says {expected}", checkpoint::STATE),
            ));
        }
        Ok(moments)
    }

    /// Ends a step: the weights get the name that follows from their parent's, the records, and the numbers of the step.
    pub fn advance(&mut self, records: &[u8], numbers: &impl Serialize, trained: Trained) {
        let mut numbers = serde_json::to_vec(&(numbers, &self.config)).expect("plain data serialises");
        numbers.extend(self.machine.kind().unwrap_or_default().as_bytes());
        let parent = std::mem::take(&mut self.state.policy_id);
        self.state.policy_id = checkpoint::derive_id(&[parent.as_bytes(), records, &numbers]);
        self.state.parent_policy_id = parent;
        self.state.step += 1;
        self.state.prompts_consumed += trained.prompts;
        self.state.tokens_consumed += trained.tokens;
    }

    /// Writes a checkpoint that appears as `out` when it is whole: with `weights_only` a starting model, else with what further
    /// training needs.
    ///
    /// # Errors
    /// [`Error::Usage`] when `out` exists, [`Error::Io`] when the disk refuses, [`Error::Numerics`] when a weight is not finite.
    pub fn publish(&mut self, out: &Path, weights_only: bool, command_line: Vec<String>) -> Result<()> {
        let (publication, parameters) = (Publication::begin(out)?, self.with_moments());
        let dir = publication.dir();
        write_model(dir, &self.source, self.machine.weights()?)?;
        if !weights_only && let Some(moments) = self.machine.moments()? {
            self.state.sign(command_line);
            write_training(dir, &moments, &parameters, &self.older)?;
            self.state.seal(dir)?;
        }
        publication.publish()
    }

    /// A copy of what the checkpoint of this step holds, to be written while training goes on; `None` before the first update.
    ///
    /// # Errors
    /// Those of the machine.
    pub fn snapshot(&mut self, command_line: Vec<String>) -> Result<Option<Snapshot>> {
        let Some(moments) = self.machine.moments()?.map(Cow::into_owned) else { return Ok(None) };
        self.state.sign(command_line);
        let (parameters, state, source) = (self.with_moments(), self.state.clone(), self.source.clone());
        Ok(Some(Snapshot { model: self.machine.weights()?.clone(), moments, parameters, state, source }))
    }

    /// What it was opened from may go away: `out` holds a checkpoint now.
    pub fn goes_on_from(&mut self, out: &Path) {
        self.source = out.to_path_buf();
    }

    /// Writes what sampling needs into `dir`, and not to the disk: it is for a reader of this moment. The bytes are the same whatever the
    /// run went through on its way to this step. Without `weights` the reader has taken the offer of [`Machine::offer`], and these are
    /// whole when this returns.
    ///
    /// # Errors
    /// [`Error::Io`], and those of the machine.
    pub fn save_for_sampling(&mut self, dir: &Path, weights: bool) -> Result<()> {
        checkpoint::write_config(&self.source, dir, Dtype::F32.torch_name())?;
        let Identity { policy_id, step } = self.identity();
        State { policy_id, step, ..State::default() }.save(dir)?;
        if !weights {
            return self.machine.settle();
        }
        self.machine.weights()?.hand_over(&dir.join(checkpoint::WEIGHTS))
    }
}

/// See [`Trainer::snapshot`].
pub struct Snapshot {
    model: Model,
    moments: Moments,
    parameters: Vec<(String, Vec<usize>)>,
    state: State,
    source: PathBuf,
}

impl Snapshot {
    /// Writes the checkpoint, which appears as `out` when it is whole.
    ///
    /// # Errors
    /// As [`Trainer::publish`].
    pub fn publish(&self, out: &Path) -> Result<()> {
        let publication = Publication::begin(out)?;
        write_model(publication.dir(), &self.source, &self.model)?;
        write_training(publication.dir(), &self.moments, &self.parameters, &[])?;
        self.state.seal(publication.dir())?;
        publication.publish()
    }
}

fn write_model(dir: &Path, source: &Path, weights: &Model) -> Result<()> {
    checkpoint::copy_companions(source, dir, Dtype::F32.torch_name())?;
    refuse_not_finite(weights)?;
    weights.save(&dir.join(checkpoint::WEIGHTS), Dtype::F32)
}

fn write_training(dir: &Path, moments: &Moments, parameters: &[(String, Vec<usize>)], older: &[PathBuf]) -> Result<()> {
    moments.save(&dir.join(checkpoint::OPTIMIZER), parameters)?;
    older.iter().try_for_each(|weights| {
        let name = weights.file_name().expect("a step has a name");
        checkpoint::copy_files(weights, &dir.join(checkpoint::OLDER).join(name))
    })
}

/// An update can leave the numbers' range though loss and gradients are in it; nobody would see it before the next step.
fn refuse_not_finite(weights: &Model) -> Result<()> {
    let named = weights.config().stored().named().into_iter().zip(weights.parameters());
    let mut bad = named.filter(|(_, numbers)| !numbers.par_iter().all(|number| number.is_finite()));
    let Some(((name, _), _)) = bad.next() else { return Ok(()) };
    Err(Error::Numerics(format!("the update made {name} not finite, lower --learning-rate; nothing was published")))
}

/// Nothing vouches for the sizes of a model that has no weights, so the memory they take is asked for first: of weights, gradients and
/// two moments in f32.
fn refuse_too_large(shape: &Config, dir: &Path) -> Result<()> {
    let numbers = |(_, shape): (_, &[usize])| shape.iter().product::<usize>();
    let bytes = |list: &ParameterList| list.iter().map(numbers).fold(0, usize::saturating_add).saturating_mul(4);
    let (weights, gradients, moments) = (shape.stored(), shape.trainable(), shape.with_moments());
    let bytes = [&weights, &gradients, &moments, &moments].map(bytes).into_iter().fold(0, usize::saturating_add);
    if aligned::is_room_for(bytes) {
        return Ok(());
    }
    let what = format!("a model of these sizes takes {} GiB to train, which this machine does not have", bytes >> 30);
    Err(Error::model(dir.join("config.json"), what))
}

/// What a step was trained on.
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
