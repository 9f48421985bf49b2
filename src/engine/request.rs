//! What an engine is asked for: prompts, some with settings of their own, and who follows their samples.

use std::fmt::Debug;
use std::sync::Arc;

use super::Settings;
use crate::model::Sampling;
use crate::numbers::rng::Stream;

/// A prompt to sample from.
#[derive(Debug)]
pub struct Request<T> {
    /// Seeds the draws, and names the prompt in errors.
    pub prompt_id: String,
    /// At least one token, and together with [`Settings::max_completion_tokens`] no more than the model has positions; callers check
    /// both.
    pub tokens: Vec<u32>,
    /// Returned with the completions.
    pub payload: T,
    /// How to sample for it, if not as [`Settings`] say.
    pub own: Option<OwnSettings>,
}

/// How to sample for one request.
#[derive(Debug, Clone)]
pub struct OwnSettings {
    /// Samples, at least 1.
    pub group_size: usize,
    /// Longest completion, from 1 to [`Settings::max_completion_tokens`] (tokens).
    pub max_completion_tokens: usize,
    /// The distribution, with the repetition penalty of [`Settings::sampling`].
    pub sampling: Sampling,
    /// Seed of its draws.
    pub seed: u64,
    /// Who follows the sampling.
    pub listener: Arc<dyn Listener>,
}

/// Follows the samples of a request while they are drawn.
pub trait Listener: Debug + Send + Sync {
    /// Takes the next token of a sample, on the thread that samples: it must not wait. Returns whether the sample is still wanted; if it
    /// is not, it ends here.
    fn hear(&self, token: Heard) -> bool;
}

/// A token of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heard {
    /// The sample's number in its group.
    pub sample: usize,
    /// The token.
    pub token: u32,
    /// Its log-probability (nats).
    pub logprob: f32,
    /// For the last token, whether it is an end token; if not, the completion reached its longest length.
    pub end: Option<bool>,
}

impl<T> Request<T> {
    pub(super) fn group_size(&self, settings: &Settings) -> usize {
        self.own.as_ref().map_or(settings.group_size, |own| own.group_size)
    }

    pub(super) fn sampling(&self, settings: &Settings) -> Sampling {
        self.own.as_ref().map_or(settings.sampling, |own| own.sampling)
    }

    pub(super) fn stream(&self, settings: &Settings) -> Stream {
        let seed = self.own.as_ref().map_or(settings.seed, |own| own.seed);
        Stream::new(seed, settings.step, &self.prompt_id)
    }

    pub(super) fn max_completion_tokens(&self, settings: &Settings) -> usize {
        let limit = settings.max_completion_tokens;
        self.own.as_ref().map_or(limit, |own| own.max_completion_tokens.min(limit))
    }
}
