//! The reference model of a policy in training, where it does not stay as it is.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::Trainer;
use crate::checkpoint::WEIGHTS;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::numbers::dtype::Dtype;
use crate::train::backend::Which;

/// The directory of a changed reference in a checkpoint.
const REFERENCE: &str = "reference";

impl Trainer {
    /// The reference that the policy's checkpoint holds.
    #[must_use]
    pub fn own_reference(&self) -> Option<PathBuf> {
        Some(self.source.join(REFERENCE)).filter(|dir| dir.is_dir())
    }

    /// Takes the reference model. One that `changes` is held in f32 too, and becomes part of checkpoints.
    ///
    /// # Errors
    /// [`Error::Usage`] when it changes and has another shape than the policy, or when a checkpoint's own has changed and is to stay;
    /// those of the backend.
    pub fn hold_reference(&mut self, model: Model, changes: bool) -> Result<()> {
        if let (Some(own), false) = (self.own_reference(), changes) {
            let what =
                format!("{}: this reference has changed in training; give --reference-sync-steps again", own.display());
            return Err(Error::Usage(what));
        }
        if changes {
            if model.config().stored().named() != self.backend.config().stored().named() {
                return Err(Error::Usage("--reference-sync-steps needs a --reference of the shape of --policy".into()));
            }
            self.reference = Some(model.clone());
        }
        self.backend.hold(Which::Reference, model)
    }

    /// Takes the teacher.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn hold_teacher(&mut self, model: Model) -> Result<()> {
        self.backend.hold(Which::Teacher, model)
    }

    /// Makes the reference `(1 - alpha) reference + alpha policy`, each number in f32.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Source
    /// Gorbatovski et al. 2024, equation 2, <https://arxiv.org/abs/2404.09656> (TR-DPO); TRL `SyncRefModelCallback`.
    pub fn mix_reference(&mut self, alpha: f64) -> Result<()> {
        let Some(reference) = &mut self.reference else { return Ok(()) };
        let (own, new) = ((1.0 - alpha) as f32, alpha as f32);
        for (to, from) in reference.parameters_mut().into_iter().zip(self.backend.weights()?.parameters()) {
            to.par_iter_mut().zip(from).for_each(|(to, from)| *to = own * *to + new * from);
        }
        self.backend.hold(Which::Reference, reference.clone())
    }
}

/// Writes a changed reference into a checkpoint.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn write(reference: Option<&Model>, source: &Path, checkpoint: &Path) -> Result<()> {
    let Some(reference) = reference else { return Ok(()) };
    let dir = checkpoint.join(REFERENCE);
    std::fs::create_dir(&dir).map_err(Error::io(&dir))?;
    crate::checkpoint::write_config(source, &dir, Dtype::F32.torch_name())?;
    reference.save(&dir.join(WEIGHTS), Dtype::F32)
}
