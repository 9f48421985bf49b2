//! Writes completions as records.

use std::sync::Arc;

use crate::checkpoint::Identity;
use crate::engine::{Completion, Request, Sink, Work};
use crate::error::Result;
use crate::lines::jsonl::Output;
use crate::lines::record::{Line, Record};
use crate::process::progress::Progress;
use crate::tokenizer::Tokenizer;

/// The fields that all records of a step share.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The weights sampled from.
    pub identity: Identity,
    /// Step of the policy that will be trained on the samples: that of the weights, or later where sampling runs ahead of training.
    pub step: u64,
    /// Seed of all draws.
    pub seed: u64,
    /// Temperature of the distribution sampled from.
    pub temperature: f32,
}

/// Writes each group as it is sampled.
pub struct RecordWriter<'a> {
    origin: Origin,
    tokenizer: Arc<Tokenizer>,
    out: &'a mut Output,
    progress: &'a mut Progress,
}

impl<'a> RecordWriter<'a> {
    /// Starts a writer; nothing is written yet.
    #[must_use]
    pub fn new(origin: Origin, tokenizer: Arc<Tokenizer>, out: &'a mut Output, progress: &'a mut Progress) -> Self {
        Self { origin, tokenizer, out, progress }
    }

    /// Prints a summary on stderr.
    pub fn finish(&self, work: Work, skipped: usize) {
        if skipped > 0 {
            self.progress.note(&format!("{skipped} prompts left out: too long"));
        }
        self.progress.detail(&speed(work, self.progress.seconds()));
    }
}

impl Origin {
    /// Writes the records of a group, one per completion.
    ///
    /// # Errors
    /// Those of the output, and of the tokenizer.
    pub fn write_group(
        &self,
        tokenizer: &Tokenizer,
        request: &Request<Line>,
        completions: &[Completion],
        out: &mut Output,
    ) -> Result<()> {
        let mut record = request.payload.record()?;
        self.set_shared(&mut record, request, completions.len());
        for (sample, completion) in completions.iter().enumerate() {
            let text = &completion.tokens[..completion.tokens.len() - usize::from(completion.stopped)];
            record.set("sample_index", &sample);
            record.set("completion_token_ids", &completion.tokens);
            record.set("logprobs", &completion.logprobs);
            record.set("finish_reason", if completion.stopped { "stop" } else { "length" });
            record.set("completion", &tokenizer.decode(text)?);
            out.write_line(&record.to_json())?;
        }
        out.flush()
    }

    /// Sets the fields that all samples of a group share. `sample_index` gets its place among them.
    fn set_shared(&self, record: &mut Record<'_>, request: &Request<Line>, group_size: usize) {
        let Self { identity, step, seed, temperature } = self;
        record.set("group_id", &format!("{step}:{}", request.prompt_id));
        record.set("group_size", &group_size);
        record.set("sample_index", &0);
        record.set("policy_id", &identity.policy_id);
        record.set("policy_step", &identity.step);
        record.set("seed", seed);
        record.set("temperature", temperature);
        record.set("prompt_token_ids", &request.tokens);
    }
}

impl Sink<Line> for RecordWriter<'_> {
    fn group(&mut self, request: Request<Line>, completions: Vec<Completion>) -> Result<()> {
        self.origin.write_group(&self.tokenizer, &request, &completions, self.out)
    }

    fn progress(&mut self, work: Work) -> Result<()> {
        let seconds = self.progress.seconds();
        self.progress.update(|| speed(work, seconds));
        Ok(())
    }
}

pub(super) fn speed(work: Work, seconds: f64) -> String {
    let rate = work.tokens as f64 / seconds.max(1e-9);
    format!("{} sequences, {} tokens, {seconds:.1} s, {rate:.0} tokens/s", work.sequences, work.tokens)
}
