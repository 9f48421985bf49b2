//! AdamW on the GPU: the f32 weights in training, or those of an adapter, and the moments. Each update also writes the copy that products
//! read.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::driver::Driver;
use crate::gpu::kernels::{AdamWState, adamw, square_sums};
use crate::gpu::packed::DeviceGradients;
use crate::gpu::{Buffer, DynBuffer};
use crate::model::Model;
use crate::numbers::aligned::Number;
use crate::numbers::dtype::Dtype;
use crate::optim::{CHUNK, Held, Means, Moments, Rule};

/// Copies that products read, of matrices, and of vectors if there are any.
pub type Copies<'a> = (&'a DynBuffer, Option<&'a Buffer<f32>>);

/// The f32 weights in training, and the optimizer's state.
pub struct AdamW {
    driver: Arc<dyn Driver>,
    /// Names and shapes of what is trained, and the first number of each.
    trained: Vec<(String, Vec<usize>)>,
    at: Vec<usize>,
    weights: Buffer<f32>,
    /// Running means of the gradients and of their squares.
    moments: Option<[DynBuffer; 2]>,
    /// Updates that the moments have seen.
    steps: u64,
    /// How many chunks each parameter has.
    chunks: Vec<usize>,
    /// Start and end of each chunk.
    ranges: Buffer<[u64; 2]>,
    sums: Buffer<f64>,
}

impl AdamW {
    /// Copies what is trained of a model to the device, laid out like the gradients.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when there is not enough memory or, here and in all methods, when the device fails.
    pub fn new(driver: &Arc<dyn Driver>, model: &Model, gradients: &DeviceGradients) -> Result<Self> {
        let weights = Buffer::new(driver, gradients.numbers.len())?;
        let (mut chunks, mut ranges) = (Vec::new(), Vec::new());
        for (numbers, range) in model.trained_values().iter().zip(&gradients.ranges) {
            weights.upload(range.start, numbers)?;
            chunks.push(numbers.len().div_ceil(CHUNK));
            for start in range.clone().step_by(CHUNK) {
                ranges.push([start, (start + CHUNK).min(range.end)].map(|number| number as u64));
            }
        }
        let at = gradients.ranges.iter().map(|range| range.start).collect();
        let (sums, ranges) = (Buffer::new(driver, ranges.len())?, Buffer::from_slice(driver, &ranges)?);
        let (driver, trained) = (Arc::clone(driver), model.trained());
        Ok(Self { driver, trained, at, weights, moments: None, steps: 0, chunks, ranges, sums })
    }

    /// The norm of each parameter's gradient, summed in the order of [`crate::optim::norms`].
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn norms(&self, gradients: &DeviceGradients) -> Result<Vec<f64>> {
        square_sums(&*self.driver, &gradients.numbers, &self.ranges, &self.sums)?;
        let sums = self.sums.to_vec()?;
        let mut rest = &sums[..];
        let norm = |chunks: &usize| {
            let (own, others) = rest.split_at(*chunks);
            rest = others;
            own.iter().sum::<f64>().sqrt()
        };
        Ok(self.chunks.iter().map(norm).collect())
    }

    /// Makes one update by `rule`, sets the gradients to zero, and rounds what is new into `copies`, which products read.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn update(&mut self, rule: &Rule, gradients: &DeviceGradients, copies: Copies<'_>) -> Result<()> {
        let moments = self.moments.as_ref().expect("set before the first update");
        let (weights, gradients) = (&self.weights, &gradients.numbers);
        adamw(&*self.driver, rule, AdamWState { weights, gradients, moments, copies })?;
        self.steps += 1;
        Ok(())
    }

    /// What is trained, in f32.
    #[must_use]
    pub fn weights(&self) -> &Buffer<f32> {
        &self.weights
    }

    /// Copies what is trained to `model`.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn weights_to(&self, model: &mut Model) -> Result<()> {
        let pairs = model.trained_values_mut().into_iter().zip(&self.at);
        pairs.into_iter().try_for_each(|(numbers, at)| self.weights.download(*at, numbers))
    }

    /// Whether the moments were set.
    #[must_use]
    pub fn has_moments(&self) -> bool {
        self.moments.is_some()
    }

    /// Sets the moments, before the first update.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn take_moments(&mut self, moments: &Moments) -> Result<()> {
        self.moments = Some(match &moments.held {
            Held::F32(means) => self.upload(Dtype::F32, means, moments.steps)?,
            Held::Bf16(means) => self.upload(Dtype::Bf16, means, moments.steps)?,
        });
        self.steps = moments.steps;
        Ok(())
    }

    fn upload<T: Number>(&self, dtype: Dtype, means: &Means<T>, steps: u64) -> Result<[DynBuffer; 2]> {
        let [first, second] = [&means.first, &means.second].map(|means| -> Result<_> {
            let numbers = DynBuffer::new(&self.driver, dtype, self.weights.len())?;
            if steps == 0 {
                numbers.clear()?; // all zero: nothing to upload
            } else {
                self.at.iter().zip(means).try_for_each(|(at, mean)| numbers.upload_bytes(*at, mean.bytes()))?;
            }
            Ok(numbers)
        });
        Ok([first?, second?])
    }

    /// Downloads the moments; `None` if they were not set.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn moments(&self) -> Result<Option<Moments>> {
        let Some(numbers) = &self.moments else { return Ok(None) };
        let mut moments = Moments::zeros(&self.trained, numbers[0].dtype());
        moments.steps = self.steps;
        match &mut moments.held {
            Held::F32(means) => self.download(numbers, means)?,
            Held::Bf16(means) => self.download(numbers, means)?,
        }
        Ok(Some(moments))
    }

    fn download<T: Number>(&self, [first, second]: &[DynBuffer; 2], means: &mut Means<T>) -> Result<()> {
        for (from, to) in [(first, &mut means.first), (second, &mut means.second)] {
            self.at.iter().zip(to).try_for_each(|(at, mean)| from.download_bytes(*at, mean.bytes_mut()))?;
        }
        Ok(())
    }
}
