//! The sequences being sampled: their state, and the KV caches of their prompts and completions.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::driver::{Address, Driver};
use crate::gpu::kernels::start_slots;
use crate::gpu::{Buffer, DynBuffer};
use crate::model::Config;
use crate::numbers::dtype::Dtype;

/// Words of state per slot: `Field` of `slots.cuh`.
const FIELDS: usize = 8;

/// Words per sample that `start_slots` of `decode.cu` reads.
const START: usize = 6;

/// How many sequences fit, and how long they may be.
#[derive(Debug, Clone, Copy)]
pub struct SlotCapacity {
    /// Sequences sampled at once, and prompts that they may share.
    pub slots: usize,
    /// Longest prompt (tokens).
    pub max_prompt_tokens: usize,
    /// Longest completion (tokens).
    pub max_completion_tokens: usize,
}

/// State and KV caches of all slots.
pub struct Slots {
    /// The sizes of all arrays follow from it.
    pub shape: SlotCapacity,
    /// `(FIELDS, slots)`.
    pub state: Buffer<u32>,
    /// The samples that [`Slots::begin`] started last, `(START, samples)`, their slots first.
    pub starts: Buffer<u32>,
    /// One bit per token that a slot's prompt or completion contains, `(slots, words)`; empty without a repetition penalty.
    pub seen: Buffer<u32>,
    /// The same for the prompts.
    pub prompt_seen: Buffer<u32>,
    /// 32-bit words that hold a vocabulary's bits, or 0 without a repetition penalty.
    pub words: usize,
    /// Keys, then values of prompts, `(2, L, slots, K, max_prompt_tokens, E)`.
    prompts: DynBuffer,
    /// Keys, then values of completions, `(2, L, slots, K, max_completion_tokens, E)`.
    own: DynBuffer,
    layers: usize,
}

/// A sample that starts in a slot.
#[derive(Debug, Clone, Copy)]
pub struct SampleStart {
    /// The slot.
    pub slot: usize,
    /// The prompt's place in the prompt caches.
    pub prompt: usize,
    /// Length of the prompt (tokens).
    pub prompt_len: usize,
    /// Key of the random numbers of the prompt's group.
    pub key: [u32; 2],
    /// The sample's index in its group.
    pub sample: usize,
}

impl Slots {
    /// Size of the KV caches (bytes).
    #[must_use]
    pub fn cache_bytes(config: &Config, shape: SlotCapacity, dtype: Dtype) -> usize {
        let tokens = shape.slots * (shape.max_prompt_tokens + shape.max_completion_tokens);
        2 * config.num_hidden_layers * tokens * config.kv_width() * dtype.size()
    }

    /// Allocates idle slots; `penalised` says whether there is a repetition penalty.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory.
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

    /// How many slots there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shape.slots
    }

    /// The number type of the caches.
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
        let layer_len = cache.len() / 2 / self.layers;
        [cache.at(layer * layer_len), cache.at((self.layers + layer) * layer_len)]
    }

    /// Starts samples in their slots, with nothing drawn yet.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub fn begin(&self, driver: &dyn Driver, samples: &[SampleStart]) -> Result<()> {
        assert!(samples.iter().all(|begin| begin.slot < self.count() && begin.prompt < self.count()));
        let numbers = |begin: &SampleStart| -> [u32; START] {
            let [slot, prompt, len, sample] =
                [begin.slot, begin.prompt, begin.prompt_len, begin.sample].map(|n| n as u32);
            [slot, prompt, len, begin.key[0], begin.key[1], sample]
        };
        let table: Vec<u32> = (0..START).flat_map(|i| samples.iter().map(move |begin| numbers(begin)[i])).collect();
        self.starts.upload(0, &table)?;
        start_slots(driver, self, samples.len())
    }
}
