//! Wrappers of `draw.cu`, which draws tokens from logits.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::Buffer;
use crate::gpu::decode::{DrawLog, Slots};
use crate::gpu::driver::{Address, Argument, Driver, Grid};
use crate::model::Sampling;

/// The slots that draw a token.
#[derive(Clone, Copy)]
pub enum DrawRows<'a> {
    /// These slots draw their next token, from one row of logits each; `u32::MAX` is no slot.
    Rows(&'a Buffer<u32>),
    /// This many samples, which [`Slots::begin`] started last, draw their first token from the rows of their prompts.
    Started(usize),
}

/// Logits to draw from.
#[derive(Clone, Copy)]
pub struct Logits<'a> {
    /// `(rows, V)`.
    pub of: &'a Buffer<f32>,
    /// V.
    pub vocabulary: usize,
    /// What [`SoftmaxSums::sum`] found in them, if it suits the distribution. Otherwise the draw reads all logits itself.
    pub summed: Option<&'a SoftmaxSums>,
}

/// Tokens per block of a sum of weights, as in `draw.cu` and in the CPU's sampler.
const BLOCK: usize = 1024;

/// Partial sums per block.
const LANES: usize = 8;

/// What a draw without truncation or penalty needs to know of rows of logits, computed by the whole GPU instead of one block per row.
pub struct SoftmaxSums {
    /// The largest logit of each row, as `ordered` of `common.cuh` encodes it.
    pub largest: Buffer<u32>,
    /// Sum of the weights of each block of tokens, `(rows, blocks)`.
    sums: Buffer<f64>,
}

impl SoftmaxSums {
    /// Size for this many rows (bytes).
    #[must_use]
    pub fn bytes(rows: usize, vocabulary: usize) -> usize {
        rows * (size_of::<u32>() + vocabulary.div_ceil(BLOCK) * size_of::<f64>())
    }

    /// Allocates for `rows` rows.
    ///
    /// # Errors
    /// [`crate::Error::Device`], as for all wrappers in this module.
    pub fn new(driver: &Arc<dyn Driver>, rows: usize, vocabulary: usize) -> Result<Self> {
        let sums = Buffer::new(driver, rows * vocabulary.div_ceil(BLOCK))?;
        Ok(Self { largest: Buffer::new(driver, rows)?, sums })
    }

    /// Whether `sampling` neither truncates nor penalises, which these sums require.
    #[must_use]
    pub fn suits(sampling: &Sampling, vocabulary: usize) -> bool {
        let all = sampling.top_k == 0 || sampling.top_k >= vocabulary;
        all && sampling.top_p >= 1.0 && sampling.min_p <= 0.0 && sampling.repetition_penalty == 1.0
    }

    /// Finds the largest logit of each row, unless [`super::head_rows`] did; `largest` was cleared before.
    ///
    /// # Errors
    /// As [`SoftmaxSums::new`].
    pub fn find_largest(
        &self,
        driver: &dyn Driver,
        logits: &Buffer<f32>,
        [rows, vocabulary]: [usize; 2],
    ) -> Result<()> {
        assert!(logits.len() >= rows * vocabulary && self.largest.len() >= rows);
        let arguments = [logits.at(0).into(), vocabulary.into(), Argument::from(self.largest.at(0))];
        // Each thread reads 32 logits.
        // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
        unsafe { driver.launch("largest_logits", Self::grid(rows, vocabulary.div_ceil(32)), &arguments) }
    }

    /// Sums each row's weights, once `largest` is known.
    ///
    /// # Errors
    /// As [`SoftmaxSums::new`].
    pub fn sum(
        &self,
        driver: &dyn Driver,
        slots: &Slots,
        slot_of_row: &Buffer<u32>,
        (logits, vocabulary): (&Buffer<f32>, usize),
        temperature: f32,
    ) -> Result<()> {
        let rows = slot_of_row.len();
        assert!(logits.len() >= rows * vocabulary && self.sums.len() >= rows * vocabulary.div_ceil(BLOCK));
        let arguments = [
            slots.state.at(0).into(),
            slots.count().into(),
            slot_of_row.at(0).into(),
            logits.at(0).into(),
            vocabulary.into(),
            self.largest.at(0).into(),
            temperature.into(),
            Argument::from(self.sums.at(0)),
        ];
        // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
        unsafe { driver.launch("draw_sums", Self::grid(rows, vocabulary.div_ceil(BLOCK) * LANES), &arguments) }
    }

    /// At least `threads` threads per row.
    fn grid(rows: usize, threads: usize) -> Grid {
        Grid { blocks: [threads.div_ceil(128) as u32, rows as u32, 1], threads: 128, shared: 0, early: true }
    }
}

/// The tokens that end completions, and the log of what was drawn.
pub struct DrawOutput {
    /// Tokens that end a completion.
    pub stops: Buffer<u32>,
    /// Written by the device, read by the host.
    pub log: DrawLog,
}

/// Draws one token for each of `drawers`.
///
/// # Errors
/// As [`SoftmaxSums::new`].
pub fn draw(
    driver: &dyn Driver,
    slots: &Slots,
    drawers: DrawRows<'_>,
    logits: Logits<'_>,
    sampling: &Sampling,
    ends: &DrawOutput,
) -> Result<()> {
    let (rows, slot_of_row, of_rows) = match drawers {
        DrawRows::Rows(rows) => (rows.len(), rows.at(0), rows.len()),
        DrawRows::Started(count) => (count, slots.starts.at(0), slots.count()),
    };
    let Logits { of, vocabulary, summed } = logits;
    assert!(of.len() >= of_rows * vocabulary && ends.log.len() >= slots.count() * slots.shape.max_completion_tokens);
    assert!(summed.is_none() || SoftmaxSums::suits(sampling, vocabulary));
    let [largest, sums] = summed.map_or([Address(0); 2], |summed| [summed.largest.at(0), summed.sums.at(0)]);
    let arguments = [
        slots.state.at(0).into(),
        slots.count().into(),
        slot_of_row.into(),
        usize::from(matches!(drawers, DrawRows::Started(_))).into(),
        of.at(0).into(),
        vocabulary.into(),
        largest.into(),
        sums.into(),
        sampling.temperature.into(),
        sampling.top_k.min(vocabulary).into(),
        sampling.top_p.into(),
        sampling.min_p.into(),
        sampling.repetition_penalty.into(),
        ends.stops.at(0).into(),
        ends.stops.len().into(),
        slots.shape.max_completion_tokens.into(),
        slots.seen.at(0).into(),
        slots.words.into(),
        Argument::from(ends.log.at()),
    ];
    // Small blocks are enough to look tokens up in known sums. They keep one number per sum; a draw that sums by itself keeps the
    // partial sums, too.
    let from_sums = summed.is_some() && sampling.temperature != 0.0;
    let (kernel, threads, numbers) = if from_sums { ("draw_summed", 128, 1) } else { ("draw", 1024, 1 + LANES) };
    let shared = vocabulary.div_ceil(BLOCK) * numbers * size_of::<f64>();
    // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
    unsafe {
        driver.launch(
            kernel,
            Grid { blocks: [rows as u32, 1, 1], threads, shared: shared as u32, early: true },
            &arguments,
        )
    }
}
