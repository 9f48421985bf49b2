//! The whole step, from the slots' last tokens to their next ones, recorded once for each number of rows and replayed.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::buffer::{Buffer, Numbers};
use super::super::driver::{Address, Driver, Dtype, Matrix, Recording};
use super::super::kernels::{Partial, add_norm};
use super::super::packed::kernels as packed;
use super::super::weights::Weights;
use super::draw::{Drawers, Ends, Logits, Summed, draw};
use super::kernels::{Warps, decode_attention, embed_slots, head_rows, linear_rows, splits, swiglu_rows};
use super::log::Log;
use super::slots::{Shape, Slots};
use crate::engine::Sampling;
use crate::error::Result;
use crate::model::Config;

/// A row that has no slot.
const NONE: u32 = u32::MAX;

/// Up to so many rows the weights' bytes are what takes time, and our products read them once; beyond, the card's library is for.
const FEW_ROWS: usize = 128;

/// Steps of a model's sequences.
pub struct Stepper {
    driver: Arc<dyn Driver>,
    sampling: Sampling,
    ends: Ends,
    room: Room,
    shape: packed::Shape,
    /// Whether a row's result must not depend on how many there are.
    batch_invariant: bool,
    /// By their number of rows.
    recordings: HashMap<usize, Recorded>,
}

/// A step for so many rows.
struct Recorded {
    /// What the device reads.
    slot_of_row: Buffer<u32>,
    /// The same, as last uploaded.
    slots: Vec<u32>,
    recording: Recording,
}

/// Memory of a step for the most rows.
struct Room {
    /// Residual stream, `(rows, D)`.
    x: Buffer<f32>,
    /// `(rows, D)`.
    normed: Numbers,
    /// Parts of products.
    sums: Buffer<f32>,
    /// `(rows, H E)`.
    attended: Numbers,
    /// `(rows, 2 F)`, for many rows.
    gate_up: Option<Numbers>,
    /// `(rows, F)`.
    act: Numbers,
    /// `(rows, V)`.
    logits: Buffer<f32>,
    /// Of the logits, where the distribution is plain.
    summed: Option<Summed>,
}

impl Room {
    fn sums_len(config: &Config, rows: usize) -> usize {
        let (d, f, attended) = (config.hidden_size, config.intermediate_size, config.attention_width());
        let products = [(attended + 2 * config.kv_width(), d), (d, attended), (d, f)];
        products.iter().map(|&(width, depth)| splits(width, depth) * rows * width).max().expect("three")
    }

    fn new(driver: &Arc<dyn Driver>, weights: &Weights, rows: usize, [by_library, plain]: [bool; 2]) -> Result<Self> {
        let (config, dtype) = (&weights.config, weights.matrices.dtype());
        let summed = || Summed::new(driver, rows, config.vocab_size);
        let gate_up = || Numbers::new(driver, dtype, rows * 2 * config.intermediate_size);
        Ok(Self {
            gate_up: by_library.then(gate_up).transpose()?,
            x: Buffer::new(driver, rows * config.hidden_size)?,
            normed: Numbers::new(driver, dtype, rows * config.hidden_size)?,
            sums: Buffer::new(driver, Self::sums_len(config, rows))?,
            attended: Numbers::new(driver, dtype, rows * config.attention_width())?,
            act: Numbers::new(driver, dtype, rows * config.intermediate_size)?,
            logits: Buffer::new(driver, rows * config.vocab_size)?,
            summed: plain.then(summed).transpose()?,
        })
    }
}

impl Stepper {
    /// Bytes that steps of up to `slots` rows work in.
    #[must_use]
    pub fn room_bytes(config: &Config, dtype: Dtype, slots: usize) -> usize {
        let (d, f, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let gate_up = if slots > FEW_ROWS { 2 * f } else { 0 };
        let numbers = 4 * (slots * (d + v) + Room::sums_len(config, slots)) + Summed::bytes(slots, v);
        numbers + dtype.bytes() * slots * (d + config.attention_width() + f + gate_up)
    }

    /// Room for `shape.slots` rows; `stops` are the tokens that end a completion. With `batch_invariant` a row's bits never depend
    /// on how many there are.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is no room.
    pub fn new(
        driver: &Arc<dyn Driver>,
        weights: &Weights,
        shape: Shape,
        (sampling, stops): (Sampling, &[u32]),
        batch_invariant: bool,
    ) -> Result<Self> {
        let log = Log::new(driver, shape.slots, shape.max_completion_tokens)?;
        let by_library = !batch_invariant && shape.slots > FEW_ROWS;
        let plain = Summed::suits(&sampling, weights.config.vocab_size);
        Ok(Self {
            driver: Arc::clone(driver),
            sampling,
            ends: Ends { stops: Buffer::of(driver, stops)?, log },
            room: Room::new(driver, weights, shape.slots, [by_library, plain])?,
            shape: packed::Shape::of(&weights.config)?,
            batch_invariant,
            recordings: HashMap::new(),
        })
    }

    /// What was drawn.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.ends.log
    }

    /// Draws the first tokens of the `count` samples that [`Slots::begin`] started last, from their prompts' rows of
    /// `logits (slots, V)`.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn first(&self, slots: &Slots, count: usize, logits: &Buffer<f32>, vocabulary: usize) -> Result<()> {
        let logits = Logits { of: logits, vocabulary, summed: None };
        draw(&*self.driver, slots, Drawers::Started(count), logits, &self.sampling, &self.ends)
    }

    /// One token more for each slot of `running`, which is not empty; a slot that has ended on the device draws nothing.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn step(&mut self, weights: &Weights, slots: &Slots, running: &[usize]) -> Result<()> {
        let rows = running.len().next_power_of_two().min(slots.count());
        let fits = |step: &Recorded| running.iter().all(|&slot| step.slots.contains(&(slot as u32)));
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

    fn record(&self, weights: &Weights, slots: &Slots, rows: usize) -> Result<Recorded> {
        let none = vec![NONE; rows];
        let slot_of_row = Buffer::of(&self.driver, &none)?;
        let recording = self.driver.record(&mut || self.launch(weights, slots, &slot_of_row))?;
        Ok(Recorded { slot_of_row, slots: none, recording })
    }

    fn launch(&self, weights: &Weights, slots: &Slots, slot_of_row: &Buffer<u32>) -> Result<()> {
        let (driver, room, config) = (&*self.driver, &self.room, &weights.config);
        let (rows, d, f) = (slot_of_row.len(), config.hidden_size, config.intermediate_size);
        let (attended_width, qkv_width) = (config.attention_width(), config.attention_width() + 2 * config.kv_width());
        let norm = |weight, partial| {
            add_norm(driver, &room.x, partial, (weight, config.rms_norm_eps), &room.normed, [rows, d])
        };
        let warps = if self.by_library(rows) { Warps::Two } else { Warps::Eight };
        embed_slots(driver, weights, slots, slot_of_row, &room.x, self.largest())?;
        let mut pending = Partial { sums: &room.sums, splits: 0 };
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
    fn head(&self, weights: &Weights, [rows, v, d]: [usize; 3]) -> Result<()> {
        let (driver, Room { normed, logits, summed, .. }) = (&*self.driver, &self.room);
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
        draw(driver, slots, Drawers::Rows(slot_of_row), logits, sampling, &self.ends)
    }

    fn by_library(&self, rows: usize) -> bool {
        rows > FEW_ROWS && !self.batch_invariant
    }

    /// See [`linear_rows`].
    fn linear<'o>(
        &self,
        (weight, x): (Address, &Numbers),
        out: &'o Buffer<f32>,
        [rows, width, depth]: [usize; 3],
    ) -> Result<Partial<'o>> {
        if !self.by_library(rows) {
            return linear_rows(&*self.driver, (weight, x), out, [rows, width, depth]);
        }
        let weight = Matrix { at: weight, stride: depth, dtype: x.dtype() };
        let sums = Matrix { at: out.at(0), stride: width, dtype: Dtype::F32 };
        packed::linear(&*self.driver, x.matrix(0, depth), weight, sums, [rows, width, depth])?;
        Ok(Partial { sums: out, splits: 1 })
    }

    /// See [`swiglu_rows`]; into the room's `act`.
    fn swiglu(&self, (weight, x): (Address, &Numbers), [rows, width, depth]: [usize; 3]) -> Result<()> {
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
