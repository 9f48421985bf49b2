//! Which checkpoint a run goes on from: its policy, or when that is damaged the youngest older one that is not.

use std::path::Path;

use super::{Run, step_of};
use crate::checkpoint::{STATE, State, WEIGHTS, entries, identity};
use crate::error::{Error, Result};
use crate::lines::jsonl::Input;

impl Run {
    /// The step of the youngest checkpoint, from the policy's back, whose files are those that were written. `say` is told what is
    /// wrong with younger ones. Sampler and trainer come to the same answer without a word between them.
    ///
    /// # Errors
    /// [`Error::Run`] when there is no policy, [`Error::Model`] when no checkpoint is whole.
    pub fn intact_step(&self, say: &dyn Fn(&str)) -> Result<u64> {
        let policy = self.policy()?;
        let Some(reached) = step_of(&policy) else {
            return Err(Error::run(self.dir(), format!("`policy` points to {}, no checkpoint", policy.display())));
        };
        let older = entries(&self.checkpoints())?.into_iter().filter_map(|path| step_of(&path));
        let mut steps: Vec<u64> = older.filter(|step| *step < reached).collect();
        steps.sort_unstable();
        steps.push(reached);
        let mut damage: Vec<String> = Vec::new();
        for step in steps.into_iter().rev() {
            match self.check(step) {
                Ok(()) if damage.is_empty() => return Ok(step),
                Ok(()) => {
                    say(&format!("{}; going on from {}", damage.join("; "), self.checkpoint(step).display()));
                    return Ok(step);
                }
                Err(err) => damage.push(err.to_string()),
            }
        }
        let what = format!("{}; no older checkpoint is whole", damage.join("; "));
        Err(Error::run(self.dir(), what))
    }

    fn check(&self, step: u64) -> Result<()> {
        let dir = self.checkpoint(step);
        match State::load(&dir)? {
            Some(state) if state.step == step => state.verify(&dir),
            Some(state) => Err(Error::model(&dir, format!("its state is of step {}", state.step))),
            None if step == 0 => self.check_start(&dir),
            None => Err(Error::model(dir.join(STATE), "missing")),
        }
    }

    /// The start has no state; but what was sampled from it says which weights it had.
    fn check_start(&self, dir: &Path) -> Result<()> {
        let first = Input::open(&self.rollouts(1)).ok().and_then(|mut lines| lines.next()?.ok());
        let sampled_from: Option<String> = first.and_then(|line| line.record().ok()?.get("policy_id").ok());
        let found = identity(dir)?.policy_id;
        if sampled_from.is_some_and(|wanted| wanted != found) {
            return Err(Error::model(dir.join(WEIGHTS), "damaged: not the weights that step 1 was sampled from"));
        }
        Ok(())
    }
}
