//! Wrappers of `draw.cu`: from logits to tokens.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::Buffer;
use crate::gpu::decode::{DrawLog, Slots};
use crate::gpu::driver::{Address, Argument, Driver, Grid};
use crate::model::Sampling;

/// Whose tokens are drawn.
#[derive(Clone, Copy)]
pub enum DrawRows<'a> {
    /// The next ones of these slots, a row of logits each; `u32::MAX` is none.
    Rows(&'a Buffer<u32>),
    /// The first ones of the so many samples that [`Slots::begin`] started last, from their prompts' rows.
    Started(usize),
}

/// Logits to draw from.
#[derive(Clone, Copy)]
pub struct Logits<'a> {
    /// `(rows, V)`.
    pub of: &'a Buffer<f32>,
    /// V.
    pub vocabulary: usize,
    /// What [`SoftmaxSums::take`] made of them, where that suits the draw; one without looks at all of them itself.
    pub summed: Option<&'a SoftmaxSums>,
}

/// Tokens whose weights are summed at once: kernels/draw.cu, and the CPU's sampler.
const BLOCK: usize = 1024;

/// Chains of such a sum.
const LANES: usize = 8;

/// What a draw without truncation or penalty needs to know of rows of logits, found by the whole card instead of a block a row.
pub struct SoftmaxSums {
    /// The largest logit of each row, as kernels/common.cuh orders them.
    pub largest: Buffer<u32>,
    /// Weights of each block of tokens, `(rows, blocks)`.
    sums: Buffer<f64>,
}

impl SoftmaxSums {
    /// Bytes for so many rows.
    #[must_use]
    pub fn bytes(rows: usize, vocabulary: usize) -> usize {
        rows * (size_of::<u32>() + vocabulary.div_ceil(BLOCK) * size_of::<f64>())
    }

    /// Room for `rows`.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`], as all here.
    pub fn new(driver: &Arc<dyn Driver>, rows: usize, vocabulary: usize) -> Result<Self> {
        let sums = Buffer::new(driver, rows * vocabulary.div_ceil(BLOCK))?;
        Ok(Self { largest: Buffer::new(driver, rows)?, sums })
    }

    /// Whether a draw is without truncation and penalty.
    #[must_use]
    pub fn suits(sampling: &Sampling, vocabulary: usize) -> bool {
        let all = sampling.top_k == 0 || sampling.top_k >= vocabulary;
        all && sampling.top_p >= 1.0 && sampling.min_p <= 0.0 && sampling.repetition_penalty == 1.0
    }

    /// The largest of each row, where [`super::kernels::head_rows`] has not made the logits; cleared before.
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
        // A thread has 32 logits.
        // SAFETY: the arguments are the kernel's, and the asserts above check the lengths of its buffers.
        unsafe { driver.launch("largest_logits", Self::grid(rows, vocabulary.div_ceil(32)), &arguments) }
    }

    /// Sums each row's weights, once `largest` is known.
    ///
    /// # Errors
    /// As [`SoftmaxSums::new`].
    pub fn take(
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

    /// At least so many threads for each row.
    fn grid(rows: usize, threads: usize) -> Grid {
        Grid { blocks: [threads.div_ceil(128) as u32, rows as u32, 1], threads: 128, shared: 0, early: true }
    }
}

/// What ends completions, and where the host finds what was drawn.
pub struct DrawOutput {
    /// Tokens that end a completion.
    pub stops: Buffer<u32>,
    /// Written by the device, read by the host.
    pub log: DrawLog,
}

/// Draws a token for each of `drawers`.
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
    // Where the sums are all that is needed small blocks look them up; they keep a number for each sum, the others the chains, too.
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
