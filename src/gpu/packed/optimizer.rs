//! AdamW on the device: f32 weights and moments in one array each, the products' copy written in the same pass.

use std::sync::Arc;

use super::gradients::Gradients;
use crate::error::Result;
use crate::floats::Floats;
use crate::gpu::driver::{Driver, Grid};
use crate::gpu::{Buffer, Layout, Weights};
use crate::model::Model;
use crate::optim::{CHUNK, Moments, Rule};

/// The weights in training, in f32.
pub struct Optimizer {
    driver: Arc<dyn Driver>,
    layout: Layout,
    weights: Buffer<f32>,
    /// Running means of gradients and of their squares; none before the first update of a run.
    moments: Option<[Buffer<f32>; 2]>,
    /// Chunks of each parameter, and where each chunk starts.
    chunks: Vec<usize>,
    from: Buffer<u64>,
    sums: Buffer<f64>,
}

impl Optimizer {
    /// Of a model's weights.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device fails or has no room, as with all that follows.
    pub fn new(driver: &Arc<dyn Driver>, model: &Model) -> Result<Self> {
        let layout = Layout::of(model.config())?;
        let weights = Buffer::new(driver, layout.all)?;
        let (mut chunks, mut from) = (Vec::new(), Vec::new());
        for (numbers, at) in model.parameters().iter().zip(&layout.at) {
            weights.upload(*at, numbers)?;
            chunks.push(numbers.len().div_ceil(CHUNK));
            for start in (0..numbers.len()).step_by(CHUNK) {
                from.push([*at + start, *at + (start + CHUNK).min(numbers.len())].map(|number| number as u64));
            }
        }
        let (sums, from) = (Buffer::new(driver, from.len())?, Buffer::of(driver, from.as_flattened())?);
        Ok(Self { driver: Arc::clone(driver), layout, weights, moments: None, chunks, from, sums })
    }

    /// The norm of each parameter's gradient, added as [`crate::optim::norms`] does it.
    ///
    /// # Errors
    /// See [`Optimizer::new`].
    pub fn norms(&self, gradients: &Gradients) -> Result<Vec<f64>> {
        let blocks = u32::try_from(self.sums.len()).expect("fewer than 2^32 chunks");
        let arguments = [gradients.numbers.at(0).into(), self.from.at(0).into(), self.sums.at(0).into()];
        self.driver.launch("square_sums", Grid { blocks: [blocks, 1, 1], threads: 256, shared: 0 }, &arguments)?;
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
    /// See [`Optimizer::new`].
    pub fn update(&mut self, rule: &Rule, gradients: &Gradients, weights: &Weights) -> Result<()> {
        let driver = &self.driver;
        let [first, second] = match &mut self.moments {
            Some(moments) => moments,
            empty => empty.insert([Buffer::zeros(driver, self.layout.all)?, Buffer::zeros(driver, self.layout.all)?]),
        };
        let Layout { matrices, all, .. } = self.layout;
        let blocks = u32::try_from(all.div_ceil(4 * 256)).expect("fewer than 2^42 parameters");
        let arguments = [
            self.weights.at(0).into(),
            gradients.numbers.at(0).into(),
            first.at(0).into(),
            second.at(0).into(),
            weights.matrices.at(0).into(),
            weights.vectors.at(0).into(),
            crate::gpu::driver::Argument::U64(all as u64),
            crate::gpu::driver::Argument::U64(matrices as u64),
            rule.gradient_scale.into(),
            rule.keep.into(),
            rule.first_rate.into(),
            rule.second_keep.into(),
            rule.second_rate.into(),
            rule.correction_root.into(),
            rule.epsilon.into(),
            rule.step_size.into(),
        ];
        let name = format!("adamw_{}", weights.matrices.dtype().suffix());
        driver.launch(&name, Grid { blocks: [blocks, 1, 1], threads: 256, shared: 0 }, &arguments)
    }

    /// Copies the weights to `model`.
    ///
    /// # Errors
    /// See [`Optimizer::new`].
    pub fn weights_to(&self, model: &mut Model) -> Result<()> {
        let pairs = model.parameters_mut().into_iter().zip(&self.layout.at);
        pairs.into_iter().try_for_each(|(numbers, at)| self.weights.download(*at, numbers))
    }

    /// Whether there are moments.
    #[must_use]
    pub fn has_moments(&self) -> bool {
        self.moments.is_some()
    }

    /// Takes the moments of an earlier run.
    ///
    /// # Errors
    /// See [`Optimizer::new`].
    pub fn take_moments(&mut self, moments: &Moments) -> Result<()> {
        let upload = |of: &[Floats]| -> Result<_> {
            let buffer = Buffer::new(&self.driver, self.layout.all)?;
            self.layout.at.iter().zip(of).try_for_each(|(at, numbers)| buffer.upload(*at, numbers))?;
            Ok(buffer)
        };
        self.moments = Some([upload(&moments.first)?, upload(&moments.second)?]);
        Ok(())
    }

    /// Copies the moments to `moments`; nothing to do where there are none.
    ///
    /// # Errors
    /// See [`Optimizer::new`].
    pub fn moments_to(&self, moments: &mut Moments) -> Result<()> {
        let Some([first, second]) = &self.moments else { return Ok(()) };
        for (from, to) in [(first, &mut moments.first), (second, &mut moments.second)] {
            self.layout.at.iter().zip(to).try_for_each(|(at, numbers)| from.download(*at, numbers))?;
        }
        Ok(())
    }
}
