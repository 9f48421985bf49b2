//! Completions as records on the output.

use std::sync::Arc;

use crate::checkpoint::Identity;
use crate::engine::{Completion, Request, Sink, Work};
use crate::error::Result;
use crate::lines::jsonl::Output;
use crate::lines::record::Line;
use crate::process::progress::Progress;
use crate::tokenizer::Tokenizer;

/// What all records of a run share.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The weights.
    pub identity: Identity,
    /// Of the policy that the samples are to teach: that of the weights, or a later one where sampling is ahead of training.
    pub step: u64,
    /// Of everything random.
    pub seed: u64,
    /// Of the distribution sampled from.
    pub temperature: f32,
}

/// Writes each group as it comes.
pub struct Records<'a> {
    origin: Origin,
    tokenizer: Arc<Tokenizer>,
    out: &'a mut Output,
    progress: &'a mut Progress,
}

impl<'a> Records<'a> {
    /// Nothing written yet.
    #[must_use]
    pub fn new(origin: Origin, tokenizer: Arc<Tokenizer>, out: &'a mut Output, progress: &'a mut Progress) -> Self {
        Self { origin, tokenizer, out, progress }
    }

    /// The last lines on stderr.
    pub fn finish(&self, work: Work, skipped: usize) {
        if skipped > 0 {
            self.progress.note(&format!("{skipped} prompts left out: too long"));
        }
        self.progress.detail(&speed(work, self.progress.seconds()));
    }

    fn write(&mut self, request: &Request<Line>, sample: usize, group_size: usize, one: &Completion) -> Result<()> {
        let Origin { identity, step, seed, temperature } = &self.origin;
        let text = &one.tokens[..one.tokens.len() - usize::from(one.stopped)];
        let mut record = request.payload.record()?;
        record.set("group_id", &format!("{step}:{}", request.prompt_id));
        record.set("group_size", &group_size);
        record.set("sample_index", &sample);
        record.set("policy_id", &identity.policy_id);
        record.set("policy_step", &identity.step);
        record.set("seed", seed);
        record.set("temperature", temperature);
        record.set("prompt_token_ids", &request.tokens);
        record.set("completion_token_ids", &one.tokens);
        record.set("logprobs", &one.logprobs);
        record.set("finish_reason", if one.stopped { "stop" } else { "length" });
        record.set("completion", &self.tokenizer.decode(text)?);
        self.out.write_line(&record.to_json())
    }
}

impl Sink<Line> for Records<'_> {
    fn group(&mut self, request: Request<Line>, completions: Vec<Completion>) -> Result<()> {
        for (sample, completion) in completions.iter().enumerate() {
            self.write(&request, sample, completions.len(), completion)?;
        }
        self.out.flush()
    }

    fn progress(&mut self, work: Work) -> Result<()> {
        let seconds = self.progress.seconds();
        self.progress.tell(|| speed(work, seconds));
        Ok(())
    }
}

fn speed(work: Work, seconds: f64) -> String {
    let rate = work.tokens as f64 / seconds.max(1e-9);
    format!("{} sequences, {} tokens, {seconds:.1} s, {rate:.0} tokens/s", work.sequences, work.tokens)
}
