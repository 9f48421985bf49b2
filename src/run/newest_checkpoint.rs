//! Finds the checkpoint that a run resumes from: its policy, or if that is damaged the newest intact one before it.

use std::path::Path;

use super::{Run, step_of};
use crate::checkpoint::{STATE, State, WEIGHTS, entries, identity};
use crate::error::{Error, Result};
use crate::lines::jsonl::Input;

impl Run {
    /// The step of the newest checkpoint, up to the policy's, whose files are as they were written; tells `say` what is wrong with newer
    /// ones. Sampler and trainer find the same step independently.
    ///
    /// # Errors
    /// [`Error::Run`] when there is no policy or no intact checkpoint.
    pub fn newest_intact_step(&self, say: &dyn Fn(&str)) -> Result<u64> {
        let policy = self.policy()?;
        let Some(reached) = step_of(&policy) else {
            return Err(Error::run(
                self.dir(),
                format!("`policy` points to {}, which is not a checkpoint", policy.display()),
            ));
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
        let what = format!("{}; no older checkpoint is intact", damage.join("; "));
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

    /// Checks the start, which has no state, against the policy id in the first rollouts.
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
