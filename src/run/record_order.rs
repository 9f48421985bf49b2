//! Checks the order of a run's records: its prompts one after the other, the samples of each from 0 on.
//!
//! Without this check a stage between sampler and trainer that loses, repeats or reorders records would make the run wait for ever, or
//! end with other bytes each time.

use std::path::Path;

use crate::error::{Error, Result};
use crate::lines::jsonl::Input;
use crate::lines::prompt::Names;
use crate::lines::record::{Line, Record};

/// The record that must come next.
pub struct RecordOrder {
    prompts: Input,
    names: Names,
    /// The prompt of the next group.
    next: Option<Line>,
    /// The prompt of the current group.
    prompt_id: String,
    /// The next sample; 0 between groups.
    sample: u64,
    prompts_per_step: usize,
    /// Prompts of the current step so far.
    begun: usize,
    /// The step of the weights that sampled the current step, where steps may pass over their last prompts.
    sampled_from: Option<u64>,
    may_end_early: bool,
}

impl RecordOrder {
    /// Expects the prompts of a file in order, after the `consumed` ones that were trained on already.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Data`] when it has fewer prompts.
    pub fn new(prompts: &Path, consumed: u64, prompts_per_step: usize) -> Result<Self> {
        let mut prompts = Input::open(prompts)?;
        prompts.skip_consumed(consumed)?;
        let next = prompts.next().transpose()?;
        Ok(Self {
            prompts,
            next,
            names: Names::new(Some(prompts_per_step)),
            prompt_id: String::new(),
            sample: 0,
            prompts_per_step,
            begun: 0,
            sampled_from: None,
            may_end_early: false,
        })
    }

    /// Lets a step pass over its last prompts: records of other weights are those of the next step.
    #[must_use]
    pub fn with_steps_that_may_end_early(self) -> Self {
        Self { may_end_early: true, ..self }
    }

    /// Whether the last prompt is complete.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.next.is_none() && self.sample == 0
    }

    /// Checks the next record, one of `group_size` of its prompt.
    ///
    /// # Errors
    /// [`Error::Record`] naming the record that came and the one expected.
    pub fn check(&mut self, record: &Record<'_>, sample: u64, group_size: usize) -> Result<()> {
        if self.sample == 0 {
            self.find_step(record)?;
            let next = self.next.take().ok_or_else(|| self.no_more(record))?;
            self.prompt_id = self.names.name_of(&next.record()?)?;
            self.next = self.prompts.next().transpose()?;
            self.begun = self.begun % self.prompts_per_step + 1;
        }
        let prompt_id: String = record.get("prompt_id")?;
        if (&prompt_id, sample) != (&self.prompt_id, self.sample) {
            let came = format!("prompt {prompt_id}, sample {sample}");
            let due = format!("prompt {}, sample {}", self.prompt_id, self.sample);
            return Err(record.error(format!(
                "{came}, where {due} comes next; an earlier stage lost, repeated or reordered records"
            )));
        }
        self.sample = (sample + 1) % group_size.max(1) as u64;
        Ok(())
    }

    /// Passes over the rest of a step's prompts when a record is the next step's.
    fn find_step(&mut self, record: &Record<'_>) -> Result<()> {
        if !self.may_end_early {
            return Ok(());
        }
        let sampled_from = record.get_optional("policy_step")?;
        if sampled_from != self.sampled_from {
            let passed_over = if self.begun == 0 { 0 } else { self.prompts_per_step - self.begun };
            for _ in 0..passed_over {
                self.next = self.prompts.next().transpose()?;
            }
            (self.begun, self.sampled_from) = (0, sampled_from);
            self.names = Names::new(Some(self.prompts_per_step));
        }
        Ok(())
    }

    fn no_more(&self, record: &Record<'_>) -> Error {
        record.error(format!("a record after the last prompt of {}", self.prompts.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt and the number of a sample of it.
    type Sample = (&'static str, u64);

    fn refusal(records: &[Sample]) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        let prompts = dir.path().join("prompts.jsonl");
        std::fs::write(&prompts, "{\"prompt_id\":\"old\"}\n{\"prompt_id\":\"a\"}\n{\"prompt_id\":\"b\"}\n").unwrap();
        let mut order = RecordOrder::new(&prompts, 1, 2).unwrap();
        records.iter().find_map(|(prompt, sample)| {
            let text = format!("{{\"prompt_id\":\"{prompt}\"}}");
            let line = Line { path: "-".into(), number: 1, text };
            order.check(&line.record().unwrap(), *sample, 2).err().map(|err| err.to_string())
        })
    }

    #[test]
    fn what_is_lost_repeated_or_reordered_is_named() {
        assert_eq!(refusal(&[("a", 0), ("a", 1), ("b", 0), ("b", 1)]), None);
        let cases: [(&[Sample], &str, &str); 5] = [
            (&[("a", 0), ("b", 0)], "b, sample 0", "a, sample 1"),
            (&[("a", 1)], "a, sample 1", "a, sample 0"),
            (&[("b", 0)], "b, sample 0", "a, sample 0"),
            (&[("a", 0), ("a", 0)], "a, sample 0", "a, sample 1"),
            (&[("a", 0), ("a", 1), ("a", 1)], "a, sample 1", "b, sample 0"),
        ];
        for (records, came, due) in cases {
            let message = refusal(records).unwrap();
            assert!(message.starts_with(&format!("-:1: prompt {came}, where prompt {due} comes next; ")), "{message}");
        }
        let message = refusal(&[("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)]).unwrap();
        assert!(message.starts_with("-:1: a record after the last prompt of "), "{message}");
    }

    #[test]
    fn a_step_may_pass_over_its_last_prompts_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let prompts = dir.path().join("prompts.jsonl");
        let lines: String = ["a", "b", "c", "d", "e", "f"].map(|id| format!("{{\"prompt_id\":\"{id}\"}}\n")).concat();
        std::fs::write(&prompts, lines).unwrap();
        let refused = |records: &[(u64, &str)]| {
            let mut order = RecordOrder::new(&prompts, 0, 3).unwrap().with_steps_that_may_end_early();
            records.iter().find_map(|(step, prompt)| {
                let text = format!("{{\"prompt_id\":\"{prompt}\",\"policy_step\":{step}}}");
                let line = Line { path: "-".into(), number: 1, text };
                order.check(&line.record().unwrap(), 0, 1).err().map(|err| err.to_string())
            })
        };
        assert_eq!(refused(&[(0, "a"), (1, "d"), (1, "e")]), None);
        assert_eq!(refused(&[(0, "a"), (0, "b"), (0, "c"), (1, "d")]), None);
        assert!(refused(&[(0, "a"), (0, "c")]).unwrap().contains("where prompt b"));
        assert!(refused(&[(0, "a"), (1, "b")]).unwrap().contains("where prompt d"));
        assert!(refused(&[(0, "a"), (1, "d"), (2, "a")]).unwrap().contains("after the last prompt"));
    }

    #[test]
    fn prompts_without_an_id_have_the_names_that_rollout_gives_them_also_after_a_resume() {
        let dir = tempfile::tempdir().unwrap();
        let prompts = dir.path().join("prompts.jsonl");
        std::fs::write(&prompts, "{\"prompt\":\"a\"}\n".repeat(6)).unwrap();
        for consumed in [0, 2, 4] {
            let mut order = RecordOrder::new(&prompts, consumed, 2).unwrap();
            for name in ["80e4477e72d4f291", "80e4477e72d4f291-2"].repeat((6 - consumed as usize) / 2) {
                let line = Line { path: "-".into(), number: 1, text: format!("{{\"prompt_id\":\"{name}\"}}") };
                order.check(&line.record().unwrap(), 0, 1).unwrap();
            }
            assert!(order.is_over());
        }
    }
}
