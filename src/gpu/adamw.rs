//! AdamW on the device: f32 weights, and each kind of moments, in one array; the products' copy is written in the same pass.

use std::sync::Arc;

use super::packed::DeviceGradients;
use crate::error::Result;
use crate::gpu::driver::{Argument, Driver, Grid};
use crate::gpu::{Buffer, DeviceWeights, DynBuffer, ParameterLayout};
use crate::model::{Config, Model};
use crate::numbers::aligned::Number;
use crate::numbers::dtype::Dtype;
use crate::optim::{CHUNK, Held, Means, Moments, Rule};

/// The weights in training, in f32.
pub struct AdamW {
    driver: Arc<dyn Driver>,
    layout: ParameterLayout,
    weights: Buffer<f32>,
    /// Running means of gradients and of their squares.
    moments: Option<[DynBuffer; 2]>,
    /// Updates that they are of.
    steps: u64,
    /// Chunks of each parameter, and where each chunk starts.
    chunks: Vec<usize>,
    from: Buffer<u64>,
    sums: Buffer<f64>,
}

impl AdamW {
    /// Of a model's weights.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has no room, as with all that follows.
    pub fn new(driver: &Arc<dyn Driver>, model: &Model) -> Result<Self> {
        let layout = ParameterLayout::new(model.config(), model.config().trainable())?;
        let weights = Buffer::new(driver, layout.all)?;
        let (mut chunks, mut from) = (Vec::new(), Vec::new());
        for (numbers, at) in model.parameters().iter().zip(&layout.at) {
            weights.upload(*at, numbers)?;
            chunks.push(numbers.len().div_ceil(CHUNK));
            for start in (0..numbers.len()).step_by(CHUNK) {
                from.push([*at + start, *at + (start + CHUNK).min(numbers.len())].map(|number| number as u64));
            }
        }
        let (sums, from) = (Buffer::new(driver, from.len())?, Buffer::from_slice(driver, from.as_flattened())?);
        Ok(Self { driver: Arc::clone(driver), layout, weights, moments: None, steps: 0, chunks, from, sums })
    }

    /// The norm of each parameter's gradient, added as [`crate::optim::norms`] does it.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn norms(&self, gradients: &DeviceGradients) -> Result<Vec<f64>> {
        let blocks = u32::try_from(self.sums.len()).expect("fewer than 2^32 chunks");
        let arguments = [gradients.numbers.at(0).into(), self.from.at(0).into(), self.sums.at(0).into()];
        self.driver.launch(
            "square_sums",
            Grid { blocks: [blocks, 1, 1], threads: 256, shared: 0, early: false },
            &arguments,
        )?;
        let sums = self.sums.to_vec()?;
        let mut rest = &sums[..];
        let norm = |chunks: &usize| {
            let (own, others) = rest.split_at(*chunks);
            rest = others;
            own.iter().sum::<f64>().sqrt()
        };
        Ok(self.chunks.iter().map(norm).collect())
    }

    /// One update by `rule`; the gradients become zero, and `weights` the products' copy.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn update(&mut self, rule: &Rule, gradients: &DeviceGradients, weights: &DeviceWeights) -> Result<()> {
        let [first, second] = self.moments.as_ref().expect("given before the first update");
        let ParameterLayout { matrices, all, .. } = self.layout;
        let blocks = u32::try_from(all.div_ceil(4 * 256)).expect("fewer than 2^42 parameters");
        let arguments = [
            self.weights.at(0).into(),
            gradients.numbers.at(0).into(),
            first.at(0).into(),
            second.at(0).into(),
            weights.matrices.at(0).into(),
            weights.vectors.at(0).into(),
            Argument::U64(all as u64),
            Argument::U64(matrices as u64),
            rule.gradient_scale.into(),
            rule.keep.into(),
            rule.first_rate.into(),
            rule.second_keep.into(),
            rule.second_rate.into(),
            rule.correction_root.into(),
            rule.epsilon.into(),
            rule.step_size.into(),
            Argument::U32(rule.key[0]),
            Argument::U32(rule.key[1]),
        ];
        let name = format!("adamw_{}_{}", weights.matrices.dtype().name(), first.dtype().name());
        self.driver.launch(
            &name,
            Grid { blocks: [blocks, 1, 1], threads: 256, shared: 0, early: false },
            &arguments,
        )?;
        self.steps += 1;
        Ok(())
    }

    /// Copies the weights to `model`.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn weights_to(&self, model: &mut Model) -> Result<()> {
        let pairs = model.trainable_mut().into_iter().zip(&self.layout.at);
        pairs.into_iter().try_for_each(|(numbers, at)| self.weights.download(*at, numbers))
    }

    /// Whether it has moments.
    #[must_use]
    pub fn has_moments(&self) -> bool {
        self.moments.is_some()
    }

    /// Takes moments, before the first update.
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
            let numbers = DynBuffer::new(&self.driver, dtype, self.layout.all)?;
            if steps == 0 {
                numbers.clear()?; // what is zero is not worth its way
            } else {
                self.layout.at.iter().zip(means).try_for_each(|(at, mean)| numbers.upload_bytes(*at, mean.bytes()))?;
            }
            Ok(numbers)
        });
        Ok([first?, second?])
    }

    /// The moments as they are now, of a model of this shape; `None` where there are none.
    ///
    /// # Errors
    /// See [`AdamW::new`].
    pub fn moments(&self, config: &Config) -> Result<Option<Moments>> {
        let Some(numbers) = &self.moments else { return Ok(None) };
        let mut moments = Moments::zeros(&config.with_moments().named(), numbers[0].dtype());
        moments.steps = self.steps;
        match &mut moments.held {
            Held::F32(means) => self.download(numbers, means)?,
            Held::Bf16(means) => self.download(numbers, means)?,
        }
        Ok(Some(moments))
    }

    fn download<T: Number>(&self, [first, second]: &[DynBuffer; 2], means: &mut Means<T>) -> Result<()> {
        for (from, to) in [(first, &mut means.first), (second, &mut means.second)] {
            self.layout.at.iter().zip(to).try_for_each(|(at, mean)| from.download_bytes(*at, mean.bytes_mut()))?;
        }
        Ok(())
    }
}
