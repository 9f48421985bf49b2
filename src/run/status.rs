//! Reports how far a run is.

use super::{Run, step_of};
use crate::checkpoint::State;
use crate::error::{Error, Result};

impl Run {
    /// Lines of `NAME=VALUE`: the step that the policy has reached and, if its state can be read, the number of prompts it was trained on.
    ///
    /// # Errors
    /// [`Error::Run`] when there is no policy yet.
    pub fn status(&self) -> Result<Vec<String>> {
        let policy = self.policy()?;
        let step = step_of(&policy).ok_or_else(|| Error::run(self.dir(), "`policy` points to no checkpoint"))?;
        let consumed = State::load(&policy).ok().map(|state| state.map_or(0, |state| state.prompts_consumed));
        let consumed = consumed.map(|prompts| format!("PROMPTS_CONSUMED={prompts}"));
        Ok([format!("STEP={step}")].into_iter().chain(consumed).collect())
    }
}
