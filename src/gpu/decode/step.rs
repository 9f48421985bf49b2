//! The whole step, from the slots' last tokens to their next ones, recorded once for each number of rows and replayed.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::buffer::{Buffer, DynBuffer};
use super::super::driver::{Address, Driver, Matrix, Recording};
use super::super::kernels::{PartialSums, add_norm};
use super::super::packed::kernels as packed;
use super::super::weights::DeviceWeights;
use super::draw::{DrawOutput, DrawRows, Logits, SoftmaxSums, draw};
use super::kernels::{AttentionWarps, decode_attention, embed_slots, head_rows, linear_rows, splits, swiglu_rows};
use super::log::DrawLog;
use super::slots::{SlotCapacity, Slots};
use crate::error::Result;
use crate::model::Config;
use crate::model::Sampling;
use crate::numbers::dtype::Dtype;

/// A row that has no slot.
const NONE: u32 = u32::MAX;

/// Up to so many rows the weights' bytes are what takes time, and our products read them once; beyond, the card's library is for.
const FEW_ROWS: usize = 128;

/// Steps of a model's sequences.
pub struct DecodeStep {
    driver: Arc<dyn Driver>,
    sampling: Sampling,
    ends: DrawOutput,
    room: StepBuffers,
    shape: packed::ModelShape,
    /// Whether a row's result must not depend on how many there are.
    batch_invariant: bool,
    /// By their number of rows.
    recordings: HashMap<usize, RecordedStep>,
}

/// A step for so many rows.
struct RecordedStep {
    /// What the device reads.
    slot_of_row: Buffer<u32>,
    /// The same, as last uploaded.
    slots: Vec<u32>,
    recording: Recording,
}

/// Memory of a step for the most rows.
struct StepBuffers {
    /// Residual stream, `(rows, D)`.
    x: Buffer<f32>,
    /// `(rows, D)`.
    normed: DynBuffer,
    /// Parts of products.
    sums: Buffer<f32>,
    /// `(rows, H E)`.
    attended: DynBuffer,
    /// `(rows, 2 F)`, for many rows.
    gate_up: Option<DynBuffer>,
    /// `(rows, F)`.
    act: DynBuffer,
    /// `(rows, V)`.
    logits: Buffer<f32>,
    /// Of the logits, where the distribution is plain.
    summed: Option<SoftmaxSums>,
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
    /// Bytes that steps of up to `slots` rows work in.
    #[must_use]
    pub fn room_bytes(config: &Config, dtype: Dtype, slots: usize) -> usize {
        let (d, f, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let gate_up = if slots > FEW_ROWS { 2 * f } else { 0 };
        let numbers = 4 * (slots * (d + v) + StepBuffers::sums_len(config, slots)) + SoftmaxSums::bytes(slots, v);
        numbers + dtype.size() * slots * (d + config.attention_width() + f + gate_up)
    }

    /// Room for `shape.slots` rows; `stops` are the tokens that end a completion. With `batch_invariant` a row's bits never depend
    /// on how many there are.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is no room.
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
            room: StepBuffers::new(driver, weights, shape.slots, [by_library, plain])?,
            shape: packed::ModelShape::new(&weights.config)?,
            batch_invariant,
            recordings: HashMap::new(),
        })
    }

    /// What was drawn.
    #[must_use]
    pub fn log(&self) -> &DrawLog {
        &self.ends.log
    }

    /// Draws the first tokens of the `count` samples that [`Slots::begin`] started last, from their prompts' rows of
    /// `logits (slots, V)`.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn first(&self, slots: &Slots, count: usize, logits: &Buffer<f32>, vocabulary: usize) -> Result<()> {
        let logits = Logits { of: logits, vocabulary, summed: None };
        draw(&*self.driver, slots, DrawRows::Started(count), logits, &self.sampling, &self.ends)
    }

    /// One token more for each slot of `running`, which is not empty; a slot that has ended on the device draws nothing.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
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
        self.driver.replay(&step.recording)
    }

    fn record(&self, weights: &DeviceWeights, slots: &Slots, rows: usize) -> Result<RecordedStep> {
        let none = vec![NONE; rows];
        let slot_of_row = Buffer::from_slice(&self.driver, &none)?;
        let recording = self.driver.record(&mut || self.launch(weights, slots, &slot_of_row))?;
        Ok(RecordedStep { slot_of_row, slots: none, recording })
    }

    fn launch(&self, weights: &DeviceWeights, slots: &Slots, slot_of_row: &Buffer<u32>) -> Result<()> {
        let (driver, room, config) = (&*self.driver, &self.room, &weights.config);
        let (rows, d, f) = (slot_of_row.len(), config.hidden_size, config.intermediate_size);
        let (attended_width, qkv_width) = (config.attention_width(), config.attention_width() + 2 * config.kv_width());
        let norm = |weight, partial| {
            add_norm(driver, &room.x, partial, (weight, config.rms_norm_eps), &room.normed, [rows, d])
        };
        let warps = if self.by_library(rows) { AttentionWarps::Two } else { AttentionWarps::Eight };
        embed_slots(driver, weights, slots, slot_of_row, &room.x, self.largest())?;
        let mut pending = PartialSums { sums: &room.sums, splits: 0 };
        for layer in 0..config.num_hidden_layers {
            let w = weights.layer(layer);
            norm(w.input_norm, pending)?;
            let qkv = self.linear((w.qkv, &room.normed), &room.sums, [rows, qkv_width, d])?;
            decode_attention(driver, weights, (slots, layer), (slot_of_row, warps), qkv, &room.attended)?;
            let attended = self.linear((w.o, &room.attended), &room.sums, [rows, d, attended_width])?;
            norm(w.post_norm, attended)?;
            self.swiglu((w.gate_up, &room.normed), [rows, f, d])?;
            pending = self.linear((w.down, &room.act), &room.sums, [rows, d, f])?;
        }
        norm(weights.final_norm(), pending)?;
        self.head(weights, [rows, config.vocab_size, d])?;
        self.draw(slots, slot_of_row, config.vocab_size)
    }

    fn largest(&self) -> Option<&Buffer<u32>> {
        self.room.summed.as_ref().map(|summed| &summed.largest)
    }

    /// Logits, and the largest of each row where the draw wants to know.
    fn head(&self, weights: &DeviceWeights, [rows, v, d]: [usize; 3]) -> Result<()> {
        let (driver, StepBuffers { normed, logits, summed, .. }) = (&*self.driver, &self.room);
        if !self.by_library(rows) {
            return head_rows(driver, (weights.head(), normed), logits, self.largest(), [rows, v, d]);
        }
        self.linear((weights.head(), normed), logits, [rows, v, d])?;
        summed.as_ref().map_or(Ok(()), |summed| summed.find_largest(driver, logits, [rows, v]))
    }

    fn draw(&self, slots: &Slots, slot_of_row: &Buffer<u32>, vocabulary: usize) -> Result<()> {
        let (driver, room, sampling) = (&*self.driver, &self.room, &self.sampling);
        if let Some(summed) = &room.summed {
            summed.take(driver, slots, slot_of_row, (&room.logits, vocabulary), sampling.temperature)?;
        }
        let logits = Logits { of: &room.logits, vocabulary, summed: room.summed.as_ref() };
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
        packed::linear(&*self.driver, x.matrix(0, depth), weight, sums, [rows, width, depth])?;
        Ok(PartialSums { sums: out, splits: 1 })
    }

    /// See [`swiglu_rows`]; into the room's `act`.
    fn swiglu(&self, (weight, x): (Address, &DynBuffer), [rows, width, depth]: [usize; 3]) -> Result<()> {
        let (driver, act) = (&*self.driver, &self.room.act);
        let Some(gate_up) = self.room.gate_up.as_ref().filter(|_| self.by_library(rows)) else {
            return swiglu_rows(driver, (weight, x), act, [rows, width, depth]);
        };
        let weight = Matrix { at: weight, stride: depth, dtype: x.dtype() };
        let out = gate_up.matrix(0, 2 * width);
        packed::linear(driver, x.matrix(0, depth), weight, out, [rows, 2 * width, depth])?;
        packed::swiglu(driver, rows, gate_up, act, &self.shape)
    }
}
