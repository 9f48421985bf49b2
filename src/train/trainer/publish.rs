//! Writes checkpoints and what a sampler follows: never a weight that is not finite, never a directory that is incomplete.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Trainer, reference};
use crate::checkpoint::{self, Identity, Publication, State};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::numbers::dtype::Dtype;
use crate::optim::Moments;

/// Weights up to this size are copied, with their moments, for a checkpoint that is written while training goes on (bytes). Larger
/// ones are copied only from a GPU: on the CPU the copy would take as much memory again as training does, to save the time of a write
/// that is short beside a step.
const COPIED_UP_TO: u64 = 64 << 20;

impl Trainer {
    /// Writes a starting model, at step 0: the weights without optimizer and state. It appears as `out` when it is complete.
    ///
    /// # Errors
    /// [`Error::Usage`] when `out` exists, [`Error::Io`] when it cannot be written, [`Error::Numerics`] when a weight is not finite.
    pub fn publish_weights(&mut self, out: &Path) -> Result<()> {
        let publication = Publication::begin(out)?;
        write_model(publication.dir(), &self.source, self.backend.weights()?)?;
        publication.publish()
    }

    /// Writes a checkpoint, which appears as `out` when it is complete. `older` are directories with weights of earlier steps, named
    /// by their step, that it holds too: see [`checkpoint::OLDER`]. Before the first update there is only a starting model to write.
    ///
    /// # Errors
    /// As [`Trainer::publish_weights`].
    pub fn publish(&mut self, out: &Path, older: &[PathBuf], command_line: Vec<String>) -> Result<()> {
        let publication = Publication::begin(out)?;
        let dir = publication.dir();
        write_model(dir, &self.source, self.backend.weights()?)?;
        let parameters = self.backend.trained();
        if let Some(moments) = self.backend.moments()? {
            self.state.sign(command_line);
            write_training(dir, &moments, &parameters, older)?;
            reference::write(self.reference.as_ref(), &self.source, dir)?;
            self.state.seal(dir)?;
        }
        publication.publish()
    }

    /// Whether a checkpoint is to be written from a [`Snapshot`] while training goes on.
    #[must_use]
    pub fn writes_aside(&self) -> bool {
        !self.backend.is_on_host() || self.backend.config().weight_bytes() <= COPIED_UP_TO
    }

    /// A copy of what the checkpoint of this step holds, to be written while training goes on; `None` before the first update.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn snapshot(&mut self, command_line: Vec<String>) -> Result<Option<Snapshot>> {
        let Some(moments) = self.backend.moments()?.map(Cow::into_owned) else { return Ok(None) };
        self.state.sign(command_line);
        let (parameters, state, source) = (self.backend.trained(), self.state.clone(), self.source.clone());
        let (model, reference) = (self.backend.weights()?.clone(), self.reference.clone());
        Ok(Some(Snapshot { model, reference, moments, parameters, state, source }))
    }

    /// Reads companions and moments from the checkpoint `out` from now on: the directory before may be removed.
    pub fn set_source(&mut self, out: &Path) {
        self.source = out.to_path_buf();
    }

    /// Writes what the sampler needs into `dir`, without waiting for the disk. The bytes depend on the step alone, not on where the run
    /// was interrupted. Without `by_file` the sampler copies the weights by [`crate::train::backend::Backend::share_weights`]; they are
    /// up to date when this returns.
    ///
    /// # Errors
    /// [`Error::Io`], and those of the backend.
    pub fn save_for_sampling(&mut self, dir: &Path, by_file: bool) -> Result<()> {
        checkpoint::write_config(&self.source, dir, Dtype::F32.torch_name())?;
        let Identity { policy_id, step } = self.identity();
        State { policy_id, step, ..State::default() }.save(dir)?;
        if !by_file {
            return self.backend.wait_for_update();
        }
        self.backend.weights()?.hand_over(&dir.join(checkpoint::WEIGHTS))
    }
}

/// What a checkpoint holds, copied by [`Trainer::snapshot`].
pub struct Snapshot {
    model: Model,
    reference: Option<Model>,
    moments: Moments,
    parameters: Vec<(String, Vec<usize>)>,
    state: State,
    source: PathBuf,
}

impl Snapshot {
    /// Writes the checkpoint, which appears as `out` when it is complete.
    ///
    /// # Errors
    /// As [`Trainer::publish`].
    pub fn publish(&self, out: &Path) -> Result<()> {
        let publication = Publication::begin(out)?;
        write_model(publication.dir(), &self.source, &self.model)?;
        write_training(publication.dir(), &self.moments, &self.parameters, &[])?;
        reference::write(self.reference.as_ref(), &self.source, publication.dir())?;
        self.state.seal(publication.dir())?;
        publication.publish()
    }
}

fn write_model(dir: &Path, source: &Path, weights: &Model) -> Result<()> {
    checkpoint::copy_companions(source, dir, Dtype::F32.torch_name())?;
    refuse_not_finite(weights)?;
    weights.save_trained(dir)
}

fn write_training(dir: &Path, moments: &Moments, parameters: &[(String, Vec<usize>)], older: &[PathBuf]) -> Result<()> {
    moments.save(&dir.join(checkpoint::OPTIMIZER), parameters)?;
    older.iter().try_for_each(|weights| {
        let name = weights.file_name().expect("a directory named by its step");
        checkpoint::copy_files(weights, &dir.join(checkpoint::OLDER).join(name))
    })
}

/// Refuses weights that an update took out of range: loss and gradients were finite, and only the next step would fail.
fn refuse_not_finite(weights: &Model) -> Result<()> {
    let named = weights.config().stored().named().into_iter().zip(weights.parameters());
    let mut bad = named.filter(|(_, numbers)| !numbers.par_iter().all(|number| number.is_finite()));
    let Some(((name, _), _)) = bad.next() else { return Ok(()) };
    Err(Error::Numerics(format!("the update made {name} not finite, lower --learning-rate; nothing was published")))
}
