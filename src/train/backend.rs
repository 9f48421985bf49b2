//! Where a policy is trained: the calls that a step makes on the CPU or on a GPU.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::Result;
use crate::model::{AdapterConfig, Config, Gradients, Model, Slope, TokenStats};
use crate::numbers::dtype::Dtype;
use crate::optim::{self, LossScale, Moments, Rule, Then, Trained};
use crate::process::cancel::Stop;
use crate::train::microbatch::MicroBatch;
use crate::train::ranks::{self, One, Order, Ranks, Shards};

/// Selects one of the models that a step uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The model in training.
    Policy,
    /// The frozen model that the KL divergence is measured from.
    Reference,
    /// The frozen model that is distilled.
    Teacher,
}

/// The frozen models of a step.
#[derive(Debug)]
pub struct Frozen<M> {
    reference: Option<M>,
    teacher: Option<M>,
}

impl<M> Default for Frozen<M> {
    fn default() -> Self {
        Self { reference: None, teacher: None }
    }
}

impl<M> Frozen<M> {
    /// The place of a model.
    ///
    /// # Panics
    /// For the policy, which is not frozen.
    pub fn place(&mut self, which: Which) -> &mut Option<M> {
        match which {
            Which::Reference => &mut self.reference,
            Which::Teacher => &mut self.teacher,
            Which::Policy => panic!("the policy is in training"),
        }
    }

    /// The model that is asked for, where `policy` is in training.
    ///
    /// # Panics
    /// If it was not held before.
    pub fn or<'a>(&'a self, policy: &'a M, which: Which) -> &'a M {
        let frozen = match which {
            Which::Policy => return policy,
            Which::Reference => &self.reference,
            Which::Teacher => &self.teacher,
        };
        frozen.as_ref().expect("a model was held before it is asked for")
    }
}

/// Holds weights, gradients and moments, and runs forward, backward and update on them.
///
/// # Errors
/// Every call returns [`crate::Error::Device`] when a device fails or runs out of memory; the passes also return the error of the stop.
pub trait Backend {
    /// The policy's shape.
    fn config(&self) -> &Config;

    /// Names and shapes of what is trained, which has gradients and moments in this order.
    fn trained(&self) -> Vec<(String, Vec<usize>)>;

    /// The numbers of the adapter that is trained in the place of the weights, if there is one.
    fn adapter(&self) -> Option<&AdapterConfig>;

    /// The type of matrix products, on which the trained weights depend; `None` for f32 on the CPU.
    fn compute_dtype(&self) -> Option<&'static str>;

    /// Whether weights and moments live in host memory, so that a copy of them doubles what they take.
    fn is_on_host(&self) -> bool;

    /// Tokens per micro-batch where the user has set none.
    fn default_tokens(&self) -> usize;

    /// The policy's current weights, in host memory.
    fn weights(&mut self) -> Result<&Model>;

    /// A handle by which a sampler on the same GPU copies the policy's weights without going through the host; `None` on the CPU.
    fn share_weights(&mut self) -> Result<Option<Vec<u8>>>;

    /// Blocks until the shared weights are those of the last update.
    fn wait_for_update(&mut self) -> Result<()>;

    /// Takes the reference model or the teacher.
    fn hold(&mut self, which: Which, model: Model) -> Result<()>;

    /// Lets `stop` end passes early, with its error.
    fn stop_with(&mut self, stop: &Stop);

    /// Log-probability and entropy of each target, in order.
    fn logprobs(&mut self, which: Which, batch: &MicroBatch, temperature: f32) -> Result<Vec<TokenStats>>;

    /// Log-probability and entropy of each target under the policy; adds to the gradients those of the loss with these slopes.
    fn accumulate(&mut self, batch: &MicroBatch, temperature: f32, slope: Slope<'_>) -> Result<Vec<TokenStats>>;

    /// The processes that train together. All of them make the calls from [`Backend::gradient_norms`] on.
    fn ranks(&self) -> &dyn Ranks {
        &One
    }

    /// Those numbers of each trained parameter whose moments are held here.
    fn held(&self) -> Vec<Range<usize>> {
        self.trained().iter().map(|(_, shape)| 0..shape.iter().product()).collect()
    }

    /// The norm of each gradient, in the order of [`Backend::trained`].
    fn gradient_norms(&mut self) -> Result<Vec<f64>>;

    /// The factor on the slopes of the next pass, to be changed between updates only; norms and updates are those of the unscaled
    /// gradients. `None` where gradients have the range of f32.
    fn loss_scale(&mut self) -> Option<&mut LossScale>;

    /// Sets the gradients to zero.
    fn clear_gradients(&mut self) -> Result<()>;

    /// Whether [`Backend::take_moments`] was called.
    fn has_moments(&self) -> bool;

    /// Takes the optimizer's moments of the numbers that are [`Backend::held`], before the first update.
    fn take_moments(&mut self, moments: Moments) -> Result<()>;

    /// The current moments of all numbers; `None` before [`Backend::take_moments`], and on ranks after the first.
    fn moments(&mut self) -> Result<Option<Cow<'_, Moments>>>;

    /// Updates the weights by the gradients, and sets these to zero.
    fn update(&mut self, rule: Rule) -> Result<()>;
}

/// Trains on the CPU, alone or as one of several ranks.
pub struct Cpu {
    model: Model,
    dtype: Dtype,
    frozen: Frozen<Model>,
    gradients: Gradients,
    moments: Option<Moments>,
    ranks: Arc<dyn Ranks>,
    shards: Shards,
}

impl Cpu {
    /// Trains `model`, with products in f32 or bf16.
    #[must_use]
    pub fn new(model: Model, dtype: Dtype) -> Self {
        let model = if dtype == Dtype::Bf16 { model.with_bf16_products() } else { model };
        let (gradients, shards) = (Gradients::zeros(&model), Shards::new(&model.trained(), 1));
        Self { gradients, model, dtype, frozen: Frozen::default(), moments: None, ranks: Arc::new(One), shards }
    }

    /// Trains together with others, each of which has the same model.
    #[must_use]
    pub fn among(self, ranks: Arc<dyn Ranks>) -> Self {
        Self { shards: Shards::new(&self.model.trained(), ranks.count()), ranks, ..self }
    }

    fn is_alone(&self) -> bool {
        self.ranks.count() == 1
    }

    /// Brings the weights that each rank has updated to all of them.
    fn spread_weights(&mut self) {
        let mut parameters = self.model.trainable_parts();
        let mut values: Vec<&mut [f32]> = parameters.iter_mut().map(|parameter| &mut *parameter.values).collect();
        self.shards.spread(&*self.ranks, &mut values);
        for parameter in parameters.into_iter().filter(|parameter| !parameter.parts.is_empty()) {
            let rows = parameter.values.par_chunks(parameter.numbers_of_a_part);
            parameter.parts.into_par_iter().zip(rows).for_each(|(part, rows)| part.pack(rows));
        }
    }
}

impl Backend for Cpu {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn trained(&self) -> Vec<(String, Vec<usize>)> {
        self.model.trained()
    }

    fn adapter(&self) -> Option<&AdapterConfig> {
        self.model.adapter()
    }

    fn compute_dtype(&self) -> Option<&'static str> {
        (self.dtype == Dtype::Bf16).then_some("bf16 on the CPU")
    }

    fn is_on_host(&self) -> bool {
        true
    }

    fn default_tokens(&self) -> usize {
        4096
    }

    fn weights(&mut self) -> Result<&Model> {
        Ok(&self.model)
    }

    fn share_weights(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn wait_for_update(&mut self) -> Result<()> {
        Ok(())
    }

    fn hold(&mut self, which: Which, mut model: Model) -> Result<()> {
        if self.dtype == Dtype::Bf16 {
            model = model.to_bf16();
        }
        model.stop_with(self.model.stop());
        *self.frozen.place(which) = Some(model);
        Ok(())
    }

    fn stop_with(&mut self, stop: &Stop) {
        self.model.stop_with(stop);
    }

    fn logprobs(&mut self, which: Which, batch: &MicroBatch, temperature: f32) -> Result<Vec<TokenStats>> {
        let model = self.frozen.or(&self.model, which);
        let stats = model.logprobs(&batch.packed, &batch.targets, temperature);
        model.stop().check().map(|()| stats)
    }

    fn accumulate(&mut self, batch: &MicroBatch, temperature: f32, slope: Slope<'_>) -> Result<Vec<TokenStats>> {
        let Self { model, gradients, .. } = self;
        let stats = model.accumulate_gradients(&batch.packed, &batch.targets, temperature, gradients, slope);
        model.stop().check().map(|()| stats)
    }

    fn ranks(&self) -> &dyn Ranks {
        &*self.ranks
    }

    fn held(&self) -> Vec<Range<usize>> {
        self.shards.of(self.ranks.rank())
    }

    fn gradient_norms(&mut self) -> Result<Vec<f64>> {
        if self.is_alone() {
            return Ok(optim::norms(&self.gradients.0));
        }
        self.shards.sum(&*self.ranks, &mut self.gradients.0);
        let held = self.gradients.0.iter().zip(self.held()).map(|(gradient, held)| &gradient[held]);
        let of_ranks = self.ranks.gather(bytemuck::cast_slice(&optim::norms(&held.collect::<Vec<_>>())));
        let of_ranks: Vec<Vec<f64>> = of_ranks.iter().map(|norms| ranks::numbers(norms)).collect();
        let of_parameter = |i| optim::global_norm(&of_ranks.iter().map(|norms| norms[i]).collect::<Vec<_>>());
        Ok((0..self.gradients.0.len()).map(of_parameter).collect())
    }

    fn loss_scale(&mut self) -> Option<&mut LossScale> {
        None
    }

    fn clear_gradients(&mut self) -> Result<()> {
        self.gradients.clear();
        Ok(())
    }

    fn has_moments(&self) -> bool {
        self.moments.is_some()
    }

    fn take_moments(&mut self, moments: Moments) -> Result<()> {
        self.moments = Some(moments);
        Ok(())
    }

    fn moments(&mut self) -> Result<Option<Cow<'_, Moments>>> {
        let Some(moments) = &self.moments else { return Ok(None) };
        if self.is_alone() {
            return Ok(Some(Cow::Borrowed(moments)));
        }
        ranks::send(&*self.ranks, || Order::Moments);
        let gather = &mut |held: &mut dyn Iterator<Item = f32>| self.shards.collect(&*self.ranks, held);
        let whole = moments.whole(&self.model.trained(), gather);
        Ok((self.ranks.rank() == 0).then_some(Cow::Owned(whole)))
    }

    fn update(&mut self, rule: Rule) -> Result<()> {
        let (alone, held) = (self.is_alone(), self.held());
        let moments = self.moments.as_mut().expect("moments are taken before the first update");
        let decays: Vec<bool> = self.model.trained().iter().map(|(_, shape)| shape.len() == 2).collect();
        let parameters = self.model.trainable_parts().into_iter().zip(decays).zip(held);
        let trained = parameters.map(|((parameter, decays), held)| {
            let mut trained = Trained { held, ..Trained::new(parameter.values, decays) };
            // Several ranks pack weights when they have those of all.
            if alone && !parameter.parts.is_empty() {
                let then = parameter.parts.into_iter().map(|part| Box::new(|rows: &[f32]| part.pack(rows)) as Then<'_>);
                trained.then = (parameter.numbers_of_a_part, then.collect());
            }
            trained
        });
        optim::update(&rule, trained.collect(), &mut self.gradients.0, moments);
        if !alone {
            self.spread_weights();
        }
        self.model.merge_adapter();
        Ok(())
    }
}
