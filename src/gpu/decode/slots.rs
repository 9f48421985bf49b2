//! The sequences being sampled: their state, and the keys and values of their prompts and of themselves.

use std::sync::Arc;

use super::super::buffer::{Buffer, DynBuffer};
use super::super::driver::{Address, Argument, Driver, Grid};
use crate::error::Result;
use crate::model::Config;
use crate::numbers::dtype::Dtype;

/// Numbers of state a slot has, as `kernels/slots.cuh` names them.
const FIELDS: usize = 8;

/// Numbers that `start_slots` of `kernels/decode.cu` takes of a sample.
const START: usize = 6;

/// How much there is room for.
#[derive(Debug, Clone, Copy)]
pub struct SlotCapacity {
    /// Sequences at once, and prompts they may come from.
    pub slots: usize,
    /// The longest prompt.
    pub max_prompt_tokens: usize,
    /// The longest completion.
    pub max_completion_tokens: usize,
}

/// State and caches on the device.
pub struct Slots {
    /// What there is room for.
    pub shape: SlotCapacity,
    /// `(FIELDS, slots)`.
    pub state: Buffer<u32>,
    /// What samples start with, as last uploaded: their slots, then the rest.
    pub starts: Buffer<u32>,
    /// Tokens seen, a bit each: `(slots, words)`; empty without a repetition penalty.
    pub seen: Buffer<u32>,
    /// The same of the prompts.
    pub prompt_seen: Buffer<u32>,
    /// Words of 32 tokens, or 0.
    pub words: usize,
    /// Keys, then values, `(2, L, slots, K, max_prompt_tokens, E)`.
    prompts: DynBuffer,
    /// Keys, then values, `(2, L, slots, K, max_completion_tokens, E)`.
    own: DynBuffer,
    layers: usize,
}

/// A sample that starts.
#[derive(Debug, Clone, Copy)]
pub struct SampleStart {
    /// Where.
    pub slot: usize,
    /// Its prompt's place.
    pub prompt: usize,
    /// Its prompt's length.
    pub prompt_len: usize,
    /// Names its draws.
    pub key: [u32; 2],
    /// Its number in its group.
    pub sample: usize,
}

impl Slots {
    /// Bytes of keys and values.
    #[must_use]
    pub fn cache_bytes(config: &Config, shape: SlotCapacity, dtype: Dtype) -> usize {
        let tokens = shape.slots * (shape.max_prompt_tokens + shape.max_completion_tokens);
        2 * config.num_hidden_layers * tokens * config.kv_width() * dtype.size()
    }

    /// Idle slots.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is no room.
    pub fn new(
        driver: &Arc<dyn Driver>,
        config: &Config,
        shape: SlotCapacity,
        dtype: Dtype,
        penalised: bool,
    ) -> Result<Self> {
        let cache = |tokens: usize| {
            DynBuffer::new(driver, dtype, 2 * config.num_hidden_layers * shape.slots * tokens * config.kv_width())
        };
        let words = if penalised { config.vocab_size.div_ceil(32) } else { 0 };
        Ok(Self {
            shape,
            state: Buffer::zeros(driver, FIELDS * shape.slots)?,
            starts: Buffer::new(driver, START * shape.slots)?,
            seen: Buffer::zeros(driver, shape.slots * words)?,
            prompt_seen: Buffer::zeros(driver, shape.slots * words)?,
            words,
            prompts: cache(shape.max_prompt_tokens)?,
            own: cache(shape.max_completion_tokens)?,
            layers: config.num_hidden_layers,
        })
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shape.slots
    }

    /// Of the caches.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.own.dtype()
    }

    /// Keys and values of prompts in a layer, `(slots, K, max_prompt_tokens, E)` each.
    #[must_use]
    pub fn prompt_caches(&self, layer: usize) -> [Address; 2] {
        self.halves(&self.prompts, layer)
    }

    /// Keys and values of completions in a layer, `(slots, K, max_completion_tokens, E)` each.
    #[must_use]
    pub fn caches(&self, layer: usize) -> [Address; 2] {
        self.halves(&self.own, layer)
    }

    fn halves(&self, cache: &DynBuffer, layer: usize) -> [Address; 2] {
        let a_layer = cache.len() / 2 / self.layers;
        [cache.at(layer * a_layer), cache.at((self.layers + layer) * a_layer)]
    }

    /// Starts samples.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn begin(&self, driver: &dyn Driver, samples: &[SampleStart]) -> Result<()> {
        assert!(samples.iter().all(|begin| begin.slot < self.count() && begin.prompt < self.count()));
        let numbers = |begin: &SampleStart| -> [u32; START] {
            let [slot, prompt, len, sample] =
                [begin.slot, begin.prompt, begin.prompt_len, begin.sample].map(|n| n as u32);
            [slot, prompt, len, begin.key[0], begin.key[1], sample]
        };
        let table: Vec<u32> = (0..START).flat_map(|i| samples.iter().map(move |begin| numbers(begin)[i])).collect();
        self.starts.upload(0, &table)?;
        let arguments = [
            self.state.at(0).into(),
            self.count().into(),
            self.starts.at(0).into(),
            self.prompt_seen.at(0).into(),
            self.seen.at(0).into(),
            Argument::from(self.words),
        ];
        let grid = Grid { blocks: [samples.len() as u32, 1, 1], threads: 128, shared: 0, early: false };
        driver.launch("start_slots", grid, &arguments)
    }

    /// Remembers which tokens the prompt at `prompt` has.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn mark_seen(&self, driver: &dyn Driver, prompt: usize, tokens: (Address, usize)) -> Result<()> {
        let seen = self.prompt_seen.at(prompt * self.words);
        let arguments = [tokens.0.into(), tokens.1.into(), seen.into(), Argument::from(self.words)];
        driver.launch("mark_seen", Grid { blocks: [1, 1, 1], threads: 256, shared: 0, early: false }, &arguments)
    }
}
