//! One decode step: from the last token of every slot to its next, without the host. Recorded once per number of rows, then replayed.

use std::collections::HashMap;
use std::sync::Arc;

use super::log::DrawLog;
use super::slots::{SlotCapacity, Slots};
use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Matrix, Recording};
use crate::gpu::kernels::{
    AttentionWarps, DrawOutput, DrawRows, Logits, ModelShape, PartialSums, SoftmaxSums, add_norm, decode_attention,
    draw, embed_slots, head_rows, linear, linear_rows, splits, swiglu, swiglu_rows,
};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer};
use crate::model::{Config, Sampling};
use crate::numbers::dtype::Dtype;

/// A row that has no slot.
const NONE: u32 = u32::MAX;

/// Up to this many rows the time goes into reading the weights, and our own products read them once. For more rows the library's
/// products are faster.
const FEW_ROWS: usize = 128;

/// The decode step of a model, with its buffers.
pub struct DecodeStep {
    driver: Arc<dyn Driver>,
    sampling: Sampling,
    ends: DrawOutput,
    buffers: StepBuffers,
    shape: ModelShape,
    /// Whether a row's result must not depend on the number of rows.
    batch_invariant: bool,
    /// By number of rows.
    recordings: HashMap<usize, RecordedStep>,
}

/// The step for one number of rows.
struct RecordedStep {
    /// The slot of each row, as the device reads it.
    slot_of_row: Buffer<u32>,
    /// The same on the host, as last uploaded.
    slots: Vec<u32>,
    recording: Recording,
    /// Where the weights and the slots were when the step was recorded.
    uses: [Address; 7],
}

/// Buffers of a step with the most rows.
struct StepBuffers {
    /// The residual stream, `(rows, D)`.
    x: Buffer<f32>,
    /// `(rows, D)`.
    normed: DynBuffer,
    /// Partial sums of the products.
    sums: Buffer<f32>,
    /// `(rows, H E)`.
    attended: DynBuffer,
    /// `(rows, 2 F)`, if the library multiplies.
    gate_up: Option<DynBuffer>,
    /// `(rows, F)`.
    act: DynBuffer,
    /// `(rows, V)`.
    logits: Buffer<f32>,
    /// What the draw needs to know of the logits, unless the distribution is truncated or penalised.
    summed: Option<SoftmaxSums>,
}

/// Where a recording finds the weights and the slots.
fn addresses(weights: &DeviceWeights, slots: &Slots) -> [Address; 7] {
    let [prompt_keys, _] = slots.prompt_caches(0);
    let [keys, _] = slots.caches(0);
    let DeviceWeights { matrices, vectors, rope, .. } = weights;
    [matrices.at(0), vectors.at(0), rope.at(0), slots.state.at(0), slots.seen.at(0), prompt_keys, keys]
}

impl StepBuffers {
    fn sums_len(config: &Config, rows: usize) -> usize {
        let (d, f, attended) = (config.hidden_size, config.intermediate_size, config.attention_width());
        let products = [(attended + 2 * config.kv_width(), d), (d, attended), (d, f)];
        products.iter().map(|&(width, depth)| splits(width, depth) * rows * width).max().expect("three")
    }

    fn new(
        driver: &Arc<dyn Driver>,
        weights: &DeviceWeights,
        rows: usize,
        [by_library, plain]: [bool; 2],
    ) -> Result<Self> {
        let (config, dtype) = (&weights.config, weights.matrices.dtype());
        let summed = || SoftmaxSums::new(driver, rows, config.vocab_size);
        let gate_up = || DynBuffer::new(driver, dtype, rows * 2 * config.intermediate_size);
        Ok(Self {
            gate_up: by_library.then(gate_up).transpose()?,
            x: Buffer::new(driver, rows * config.hidden_size)?,
            normed: DynBuffer::new(driver, dtype, rows * config.hidden_size)?,
            sums: Buffer::new(driver, Self::sums_len(config, rows))?,
            attended: DynBuffer::new(driver, dtype, rows * config.attention_width())?,
            act: DynBuffer::new(driver, dtype, rows * config.intermediate_size)?,
            logits: Buffer::new(driver, rows * config.vocab_size)?,
            summed: plain.then(summed).transpose()?,
        })
    }
}

impl DecodeStep {
    /// Size of the buffers of steps of up to `slots` rows (bytes).
    #[must_use]
    pub fn buffer_bytes(config: &Config, dtype: Dtype, slots: usize) -> usize {
        let (d, f, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let gate_up = if slots > FEW_ROWS { 2 * f } else { 0 };
        let numbers = 4 * (slots * (d + v) + StepBuffers::sums_len(config, slots)) + SoftmaxSums::bytes(slots, v);
        numbers + dtype.size() * slots * (d + config.attention_width() + f + gate_up)
    }

    /// Allocates buffers for `shape.slots` rows; `stops` are the tokens that end a completion. With `batch_invariant` the bits of a
    /// row never depend on the number of rows.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory.
    pub fn new(
        driver: &Arc<dyn Driver>,
        weights: &DeviceWeights,
        shape: SlotCapacity,
        (sampling, stops): (Sampling, &[u32]),
        batch_invariant: bool,
    ) -> Result<Self> {
        let log = DrawLog::new(driver, shape.slots, shape.max_completion_tokens)?;
        let by_library = !batch_invariant && shape.slots > FEW_ROWS;
        let plain = SoftmaxSums::suits(&sampling, weights.config.vocab_size);
        Ok(Self {
            driver: Arc::clone(driver),
            sampling,
            ends: DrawOutput { stops: Buffer::from_slice(driver, stops)?, log },
            buffers: StepBuffers::new(driver, weights, shape.slots, [by_library, plain])?,
            shape: ModelShape::new(&weights.config)?,
            batch_invariant,
            recordings: HashMap::new(),
        })
    }

    /// The distribution that tokens are drawn from.
    #[must_use]
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Draws from another distribution, with the same repetition penalty. No step may be under way.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory.
    pub fn set_sampling(&mut self, sampling: Sampling, vocabulary: usize) -> Result<()> {
        assert_eq!(sampling.repetition_penalty, self.sampling.repetition_penalty, "the slots were made for one");
        self.recordings.clear();
        self.sampling = sampling;
        let rows = self.buffers.logits.len() / vocabulary;
        let summed = || SoftmaxSums::new(&self.driver, rows, vocabulary);
        self.buffers.summed = SoftmaxSums::suits(&sampling, vocabulary).then(summed).transpose()?;
        Ok(())
    }

    /// The log of drawn tokens.
    #[must_use]
    pub fn log(&self) -> &DrawLog {
        &self.ends.log
    }

    /// Draws the first tokens of the `count` samples that [`Slots::begin`] started last, from their prompts' rows of
    /// `logits (slots, V)`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    pub fn first(&self, slots: &Slots, count: usize, logits: &Buffer<f32>, vocabulary: usize) -> Result<()> {
        let logits = Logits { of: logits, vocabulary, summed: None };
        draw(&*self.driver, slots, DrawRows::Started(count), logits, &self.sampling, &self.ends)
    }

    /// Draws one more token for each slot of `running`, which is not empty; a slot that has ended on the device draws nothing. `weights`
    /// and `slots` are the same in every call.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails.
    #[allow(unsafe_code)] // replays the recording
    pub fn step(&mut self, weights: &DeviceWeights, slots: &Slots, running: &[usize]) -> Result<()> {
        let rows = running.len().next_power_of_two().min(slots.count());
        let fits = |step: &RecordedStep| running.iter().all(|&slot| step.slots.contains(&(slot as u32)));
        if !self.recordings.contains_key(&rows) {
            let recorded = self.record(weights, slots, rows)?;
            self.recordings.insert(rows, recorded);
        }
        let step = self.recordings.get_mut(&rows).expect("recorded above");
        if !fits(step) {
            step.slots.fill(NONE);
            step.slots.iter_mut().zip(running).for_each(|(row, &slot)| *row = slot as u32);
            step.slot_of_row.upload(0, &step.slots)?;
        }
        assert_eq!(step.uses, addresses(weights, slots), "recorded with the same weights and slots");
        // SAFETY: the recording uses buffers of this struct, and the weights and slots, which are still where they were.
        unsafe { self.driver.replay(&step.recording) }
    }

    fn record(&self, weights: &DeviceWeights, slots: &Slots, rows: usize) -> Result<RecordedStep> {
        let none = vec![NONE; rows];
        let slot_of_row = Buffer::from_slice(&self.driver, &none)?;
        let recording = self.driver.record(&mut || self.launch(weights, slots, &slot_of_row))?;
        Ok(RecordedStep { slot_of_row, slots: none, recording, uses: addresses(weights, slots) })
    }

    fn launch(&self, weights: &DeviceWeights, slots: &Slots, slot_of_row: &Buffer<u32>) -> Result<()> {
        let (driver, buffers, config) = (&*self.driver, &self.buffers, &weights.config);
        let (rows, d, f) = (slot_of_row.len(), config.hidden_size, config.intermediate_size);
        let (attended_width, qkv_width) = (config.attention_width(), config.attention_width() + 2 * config.kv_width());
        let norm = |weight, partial| {
            add_norm(driver, &buffers.x, partial, (weight, config.rms_norm_eps), &buffers.normed, [rows, d])
        };
        let warps = if self.by_library(rows) { AttentionWarps::Two } else { AttentionWarps::Eight };
        embed_slots(driver, weights, slots, slot_of_row, &buffers.x, self.largest())?;
        let mut pending = PartialSums { sums: &buffers.sums, splits: 0 };
        for layer in 0..config.num_hidden_layers {
            let w = weights.layer(layer);
            norm(w.input_norm, pending)?;
            let qkv = self.linear((w.qkv, &buffers.normed), &buffers.sums, [rows, qkv_width, d])?;
            decode_attention(driver, weights, (slots, layer), (slot_of_row, warps), qkv, &buffers.attended)?;
            let attended = self.linear((w.o, &buffers.attended), &buffers.sums, [rows, d, attended_width])?;
            norm(w.post_norm, attended)?;
            self.swiglu((w.gate_up, &buffers.normed), [rows, f, d])?;
            pending = self.linear((w.down, &buffers.act), &buffers.sums, [rows, d, f])?;
        }
        norm(weights.final_norm(), pending)?;
        self.head(weights, [rows, config.vocab_size, d])?;
        self.draw(slots, slot_of_row, config.vocab_size)
    }

    fn largest(&self) -> Option<&Buffer<u32>> {
        self.buffers.summed.as_ref().map(|summed| &summed.largest)
    }

    /// Computes the logits, and the largest of each row if the draw needs it.
    fn head(&self, weights: &DeviceWeights, [rows, v, d]: [usize; 3]) -> Result<()> {
        let (driver, StepBuffers { normed, logits, summed, .. }) = (&*self.driver, &self.buffers);
        if !self.by_library(rows) {
            return head_rows(driver, (weights.head(), normed), logits, self.largest(), [rows, v, d]);
        }
        self.linear((weights.head(), normed), logits, [rows, v, d])?;
        summed.as_ref().map_or(Ok(()), |summed| summed.find_largest(driver, logits, [rows, v]))
    }

    fn draw(&self, slots: &Slots, slot_of_row: &Buffer<u32>, vocabulary: usize) -> Result<()> {
        let (driver, buffers, sampling) = (&*self.driver, &self.buffers, &self.sampling);
        if let Some(summed) = &buffers.summed {
            summed.sum(driver, slots, slot_of_row, (&buffers.logits, vocabulary), sampling.temperature)?;
        }
        let logits = Logits { of: &buffers.logits, vocabulary, summed: buffers.summed.as_ref() };
        draw(driver, slots, DrawRows::Rows(slot_of_row), logits, sampling, &self.ends)
    }

    fn by_library(&self, rows: usize) -> bool {
        rows > FEW_ROWS && !self.batch_invariant
    }

    /// See [`linear_rows`].
    fn linear<'o>(
        &self,
        (weight, x): (Address, &DynBuffer),
        out: &'o Buffer<f32>,
        [rows, width, depth]: [usize; 3],
    ) -> Result<PartialSums<'o>> {
        if !self.by_library(rows) {
            return linear_rows(&*self.driver, (weight, x), out, [rows, width, depth]);
        }
        let weight = Matrix { at: weight, stride: depth, dtype: x.dtype() };
        let sums = Matrix { at: out.at(0), stride: width, dtype: Dtype::F32 };
        linear(&*self.driver, x.matrix(0, depth), weight, sums, [rows, width, depth])?;
        Ok(PartialSums { sums: out, splits: 1 })
    }

    /// See [`swiglu_rows`]; writes `act`.
    fn swiglu(&self, (weight, x): (Address, &DynBuffer), [rows, width, depth]: [usize; 3]) -> Result<()> {
        let (driver, act) = (&*self.driver, &self.buffers.act);
        let Some(gate_up) = self.buffers.gate_up.as_ref().filter(|_| self.by_library(rows)) else {
            return swiglu_rows(driver, (weight, x), act, [rows, width, depth]);
        };
        let weight = Matrix { at: weight, stride: depth, dtype: x.dtype() };
        let out = gate_up.matrix(0, 2 * width);
        linear(driver, x.matrix(0, depth), weight, out, [rows, 2 * width, depth])?;
        swiglu(driver, rows, gate_up, act, &self.shape)
    }
}
