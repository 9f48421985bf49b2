//! The interface between the engine and a model on a device.

use super::scheduler::Start;
use crate::error::Result;
use crate::model::Sampling;
use crate::numbers::rng::Stream;

/// A prompt to prefill before its samples start.
#[derive(Debug, Clone, Copy)]
pub struct Prefill<'a> {
    /// Its group's number.
    pub group: usize,
    /// At least one.
    pub tokens: &'a [u32],
    /// Draws of its samples.
    pub stream: Stream,
    /// The distribution they are drawn from.
    pub sampling: Sampling,
}

/// A token drawn for a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// Where the sequence runs.
    pub slot: usize,
    /// The token and its log-probability (nats); `None` when the logits are not finite.
    pub drawn: Option<(u32, f32)>,
}

/// A model on a device, with the KV caches of the sequences in its slots.
///
/// The tokens of a slot are returned in order, but possibly by a later call than the one that drew them: a GPU is not waited for at
/// every step.
///
/// # Errors
/// Methods return [`crate::Error::Device`] when the device fails, and the error of a [`crate::process::cancel::Stop`] that is requested
/// during long work.
pub trait Decoder: Send {
    /// Whether samples of this distribution can run now, beside those that do; always if none does (`is_idle`).
    fn admits(&mut self, _sampling: &Sampling, _is_idle: bool) -> Result<bool> {
        Ok(true)
    }

    /// Computes the keys and values of prompts, each of a new group, and keeps them until [`Decoder::forget`].
    fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<()>;

    /// Starts samples of prefilled groups in free slots and draws their first tokens.
    fn begin(&mut self, starts: &[Start], drawn: &mut Vec<Drawn>) -> Result<()>;

    /// Draws one more token for each running slot.
    fn step(&mut self, drawn: &mut Vec<Drawn>) -> Result<()>;

    /// Frees a slot: its sequence has finished, by an end token or at [`super::Settings::max_completion_tokens`].
    fn end(&mut self, slot: usize);

    /// Frees a slot whose sequence is not to go on, though it could.
    fn cut(&mut self, slot: usize) {
        self.end(slot);
    }

    /// Frees the keys and values of a group's prompt: all its samples have finished.
    fn forget(&mut self, group: usize);

    /// Finds the first layer in which these tokens produce numbers that are not finite.
    fn first_not_finite(&mut self, tokens: &[u32]) -> Result<Option<usize>>;
}
