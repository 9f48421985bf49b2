//! What runs sequences for the engine: the model on some device.

use super::scheduler::Start;
use crate::error::Result;
use crate::numbers::rng::Stream;

/// A prompt whose samples will start.
#[derive(Debug, Clone, Copy)]
pub struct Prefill<'a> {
    /// Its group's number.
    pub group: usize,
    /// At least one.
    pub tokens: &'a [u32],
    /// The draws of its samples.
    pub stream: Stream,
}

/// One token of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// Where the sequence runs.
    pub slot: usize,
    /// The token and its log-probability [nats]; `None` when the logits are not finite.
    pub drawn: Option<(u32, f32)>,
}

/// The model on a device, with caches and draws of the sequences in its slots.
///
/// A slot's tokens come in their order, but may come later than the call that drew them: a device is not waited for at each step.
///
/// # Errors
/// [`crate::Error::Device`] when the device fails; that of a model's [`crate::process::cancel::Stop`] in the middle of long work.
pub trait Decoder: Send {
    /// Runs prompts, each of a new group; their keys and values stay until they are forgotten.
    fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<()>;

    /// Samples of groups whose prompts were run start in free slots: their first tokens are drawn.
    fn begin(&mut self, starts: &[Start], drawn: &mut Vec<Drawn>) -> Result<()>;

    /// One token more for each slot that runs.
    fn step(&mut self, drawn: &mut Vec<Drawn>) -> Result<()>;

    /// The sequence in `slot` has ended: with an end token, at its length, or because it is wanted no longer.
    fn end(&mut self, slot: usize);

    /// All samples of a group have ended.
    fn forget(&mut self, group: usize);

    /// The first layer in which these tokens meet numbers that are not finite, if there is one.
    fn first_not_finite(&mut self, tokens: &[u32]) -> Result<Option<usize>>;
}
