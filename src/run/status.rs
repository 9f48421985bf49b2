//! Reports how far a run is.

use super::{Run, step_of};
use crate::checkpoint::State;
use crate::error::{Error, Result};

impl Run {
    /// Lines of `NAME=VALUE`: the step that the policy has reached and, if its state can be read, the number of prompts it was trained on.
    /// A run that has only begun, and has no policy, is at step 0.
    ///
    /// # Errors
    /// [`Error::Run`] when there is no run, or its `policy` points to no checkpoint.
    pub fn status(&self) -> Result<Vec<String>> {
        if self.dir().is_dir() && !self.policy_link().is_symlink() {
            return Ok(vec!["STEP=0".into()]);
        }
        let policy = self.policy()?;
        let step = step_of(&policy).ok_or_else(|| Error::run(self.dir(), "`policy` points to no checkpoint"))?;
        let consumed = State::load(&policy).ok().map(|state| state.map_or(0, |state| state.prompts_consumed));
        let consumed = consumed.map(|prompts| format!("PROMPTS_CONSUMED={prompts}"));
        Ok([format!("STEP={step}")].into_iter().chain(consumed).collect())
    }
}
