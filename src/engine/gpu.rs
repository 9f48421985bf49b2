//! Decodes on a GPU.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::Settings;
use super::cpu::in_runs;
use super::decoder::{Decoder, Drawn, Prefill};
use super::scheduler::Start;
use crate::error::{Error, Result};
use crate::gpu::decode::{DecodeStep, LogEntry, SampleStart, SamplingPlan, SlotCapacity, Slots};
use crate::gpu::driver::{Driver, Mark};
use crate::gpu::kernels::{cache_rows, check, head_rows, mark_seen};
use crate::gpu::packed::{ForwardPass, KeptActivations};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer, OpenedWeights, WeightsOffer};
use crate::model::{Config, Model, Packed, Sampling};
use crate::numbers::dtype::Dtype;

/// Most tokens of prompts prefilled together (tokens). Enough for matrix products at full speed; bounds memory.
const PREFILL_TOKENS: usize = 8192;

/// Decode steps launched beyond the one whose tokens are awaited, so that the GPU never idles.
const AHEAD: usize = 1;

/// A model on a GPU, with KV caches for each slot.
pub struct GpuDecoder {
    driver: Arc<dyn Driver>,
    weights: DeviceWeights,
    /// Weights that a trainer offered.
    offered: Option<OpenedWeights>,
    forward: ForwardPass,
    slots: Slots,
    stepper: DecodeStep,
    /// Logits of each prompt's last token, `(slots, V)`.
    prompt_logits: Buffer<f32>,
    prompts: HashMap<usize, Placed>,
    free: Vec<usize>,
    /// Tokens read from the log of each running slot.
    taken: Vec<Option<usize>>,
    under_way: VecDeque<Mark>,
    limit: usize,
    batch_invariant: bool,
    /// Whether a step under way may still draw for a sequence that was cut.
    has_cut: bool,
}

/// How to sample on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct GpuOptions {
    /// Type of weights and KV caches.
    pub dtype: Dtype,
    /// Longest prompt (tokens).
    pub max_prompt_tokens: usize,
    /// Whether a completion must be bit-identical whatever else is sampled. If not, cuBLASLt chooses the order of sums in products of
    /// more than 128 rows, and prompts are prefilled together.
    pub batch_invariant: bool,
}

/// A prefilled prompt.
#[derive(Clone, Copy)]
struct Placed {
    at: usize,
    len: usize,
    key: [u32; 2],
}

impl GpuOptions {
    /// Plans the GPU memory for sampling with these settings.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the kernels do not suit the model.
    pub fn plan(&self, config: &Config, settings: &Settings) -> Result<SamplingPlan> {
        SamplingPlan::new(config, self.shape(settings), self.dtype, PREFILL_TOKENS)
    }

    fn shape(&self, settings: &Settings) -> SlotCapacity {
        SlotCapacity {
            slots: settings.max_sequences,
            max_prompt_tokens: self.max_prompt_tokens,
            max_completion_tokens: settings.max_completion_tokens,
        }
    }
}

impl GpuDecoder {
    /// Copies the model to the GPU and allocates slots for the sequences of `settings`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the kernels do not suit the model, or memory is short.
    pub fn new(driver: &Arc<dyn Driver>, model: &Model, settings: &Settings, on: GpuOptions) -> Result<Self> {
        let (shape, GpuOptions { dtype, batch_invariant, .. }) = (on.shape(settings), on);
        let (slots, limit) = (shape.slots, shape.max_completion_tokens);
        let weights = DeviceWeights::new(driver, model, dtype, shape.max_prompt_tokens + limit)?;
        check(&weights)?;
        let ends = (settings.sampling, &settings.stop_ids[..]);
        let penalised = settings.sampling.repetition_penalty != 1.0;
        Ok(Self {
            driver: Arc::clone(driver),
            forward: ForwardPass::new(driver, &weights, KeptActivations::Nothing)?,
            slots: Slots::new(driver, model.config(), shape, dtype, penalised)?,
            stepper: DecodeStep::new(driver, &weights, shape, ends, batch_invariant)?,
            prompt_logits: Buffer::new(driver, slots * model.config().vocab_size)?,
            weights,
            offered: None,
            prompts: HashMap::new(),
            free: (0..slots).rev().collect(),
            taken: vec![None; slots],
            under_way: VecDeque::new(),
            limit,
            batch_invariant,
            has_cut: false,
        })
    }

    /// Waits for all steps that were launched.
    fn catch_up(&mut self) -> Result<()> {
        self.under_way.drain(..).try_for_each(|mark| self.driver.wait(&mark))
    }

    /// Copies the weights of a model of the same shape. No sequence may be running.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn set_weights(&mut self, model: &Model) -> Result<()> {
        self.weights.upload(model)
    }

    /// Opens weights that a trainer offers on the same GPU.
    ///
    /// # Errors
    /// [`crate::Error::Device`] saying why they cannot be used.
    pub fn accept(&mut self, offer: &WeightsOffer) -> Result<()> {
        self.offered = Some(self.weights.open(&*self.driver, offer)?);
        Ok(())
    }

    /// Copies the weights that were accepted, as they are now. No sequence may be running.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn take_offered_weights(&mut self) -> Result<()> {
        let none = || Error::Device("the trainer handed weights over that were not accepted".into());
        self.weights.copy_from(self.offered.as_ref().ok_or_else(none)?)
    }

    /// Prefills prompts together, and leaves keys, values and logits in `places`.
    fn run_prompts(&mut self, prompts: &[&[u32]], places: &[usize]) -> Result<()> {
        let mut packed = Packed::default();
        prompts.iter().for_each(|prompt| packed.lay(*prompt, None));
        let positions = prompts.iter().zip(places);
        let rows = positions.flat_map(|(prompt, &at)| (0..prompt.len() as u32).flat_map(move |i| [at as u32, i]));
        let rows = Buffer::from_slice(&self.driver, &rows.collect::<Vec<u32>>())?;
        let last: Vec<u32> = packed.starts[1..].iter().map(|&end| end as u32 - 1).collect();
        let batch = self.forward.batch(&packed)?;
        let Self { driver, weights, forward, slots, .. } = self;
        forward.run(weights, &batch, &mut |layer, qkv| cache_rows(&**driver, weights, (slots, layer), qkv, &rows))?;
        self.logits_of(&Buffer::from_slice(&self.driver, &last)?, places)
    }

    /// Computes the logits of these rows of the last batch, each into its prompt's place.
    fn logits_of(&self, rows: &Buffer<u32>, places: &[usize]) -> Result<()> {
        let (d, v) = (self.weights.config.hidden_size, self.weights.config.vocab_size);
        let hidden = DynBuffer::new(&self.driver, self.slots.dtype(), rows.len() * d)?;
        self.forward.hidden(&self.weights, rows, &hidden)?;
        let logits = Buffer::new(&self.driver, rows.len() * v)?;
        head_rows(&*self.driver, (self.weights.head(), &hidden), &logits, None, [rows.len(), v, d])?;
        for (row, at) in places.iter().enumerate() {
            self.prompt_logits.copy_from(at * v, &logits, row * v, v)?;
        }
        Ok(())
    }

    /// Collects the tokens that were drawn since the last call.
    fn collect(&mut self, drawn: &mut Vec<Drawn>) {
        for (slot, taken) in self.taken.iter_mut().enumerate() {
            let Some(taken) = taken else { continue };
            while *taken < self.limit
                && let Some(entry) = self.stepper.log().entry(slot, *taken)
            {
                *taken += 1;
                let token = match entry {
                    LogEntry::Token(token, logprob) => Some((token, logprob)),
                    LogEntry::NotFinite => None,
                };
                drawn.push(Drawn { slot, drawn: token });
            }
        }
    }
}

impl Decoder for GpuDecoder {
    /// All samples share one distribution, because a step is recorded with its numbers.
    fn admits(&mut self, sampling: &Sampling, is_idle: bool) -> Result<bool> {
        if self.stepper.sampling() == sampling {
            return Ok(true);
        }
        if is_idle {
            self.catch_up()?;
            self.stepper.set_sampling(*sampling, self.weights.config.vocab_size)?;
        }
        Ok(is_idle)
    }

    fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<()> {
        let tokens: Vec<&[u32]> = prompts.iter().map(|prompt| prompt.tokens).collect();
        let mut places = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let at = self.free.pop().expect("there are as many places as slots, and each group has a sample in one");
            places.push(at);
            let placed = Placed { at, len: prompt.tokens.len(), key: prompt.stream.key() };
            self.prompts.insert(prompt.group, placed);
            if self.slots.words > 0 {
                let tokens = Buffer::from_slice(&self.driver, prompt.tokens)?;
                mark_seen(&*self.driver, &self.slots, at, &tokens)?;
            }
        }
        let mut from = 0;
        let together = if self.batch_invariant { 1 } else { PREFILL_TOKENS };
        for run in in_runs(&tokens, together) {
            self.run_prompts(run, &places[from..from + run.len()])?;
            from += run.len();
        }
        Ok(())
    }

    fn begin(&mut self, starts: &[Start], _: &mut Vec<Drawn>) -> Result<()> {
        if std::mem::take(&mut self.has_cut) {
            self.catch_up()?; // or what such a step draws would be taken for a token of the next sequence
        }
        let samples = starts.iter().map(|start| {
            let Placed { at, len, key } = self.prompts[&start.group];
            SampleStart { slot: start.slot, prompt: at, prompt_len: len, key, sample: start.sample }
        });
        self.slots.begin(&*self.driver, &samples.collect::<Vec<_>>())?;
        for start in starts {
            self.stepper.log().clear(start.slot);
            self.taken[start.slot] = Some(0);
        }
        self.stepper.first(&self.slots, starts.len(), &self.prompt_logits, self.weights.config.vocab_size)
    }

    fn step(&mut self, drawn: &mut Vec<Drawn>) -> Result<()> {
        let running: Vec<usize> = (0..self.taken.len()).filter(|&slot| self.taken[slot].is_some()).collect();
        self.stepper.step(&self.weights, &self.slots, &running)?;
        self.under_way.push_back(self.driver.mark()?);
        if self.under_way.len() > AHEAD {
            let oldest = self.under_way.pop_front().expect("more than none");
            self.driver.wait(&oldest)?;
        }
        self.collect(drawn);
        Ok(())
    }

    fn end(&mut self, slot: usize) {
        self.taken[slot] = None;
    }

    fn cut(&mut self, slot: usize) {
        self.end(slot);
        self.has_cut = true;
    }

    fn forget(&mut self, group: usize) {
        if let Some(placed) = self.prompts.remove(&group) {
            self.free.push(placed.at);
        }
    }

    fn first_not_finite(&mut self, tokens: &[u32]) -> Result<Option<usize>> {
        let mut packed = Packed::default();
        packed.lay(tokens, None);
        let batch = self.forward.batch(&packed)?;
        let mut first = None;
        self.forward.run(&self.weights, &batch, &mut |layer, qkv| {
            let width = qkv.len() / batch.rows.max(1);
            if first.is_none() && !qkv.to_vec()?.iter().take(batch.rows * width).all(|x| x.is_finite()) {
                first = Some(layer);
            }
            Ok(())
        })?;
        Ok(first)
    }
}
