//! Where a job samples: on the CPU, or on a GPU that keeps its memory from one step of a run to the next.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use half::bf16;

use super::Job;
use crate::device::Dtype;
use crate::engine::{CpuDecoder, Engine, GpuDecoder, OnGpu, Request, Settings, Sink, Work};
use crate::error::{Error, Result};
use crate::gpu::driver::Driver;
use crate::model::{Model, Transformer};
use crate::record::Line;

/// Where and how to compute.
#[derive(Clone)]
pub struct Place {
    /// None is the CPU.
    pub gpu: Option<Arc<dyn Driver>>,
    /// Of weights, and on a GPU of caches.
    pub dtype: Dtype,
    /// See [`OnGpu::batch_invariant`].
    pub batch_invariant: bool,
    /// Of the memory that is free when sampling begins, how much it may take.
    pub gpu_memory_fraction: f64,
}

/// A place, taken, with the weights.
pub enum Seat {
    /// A decoder costs nothing to make, and borrows its model.
    Cpu(Model),
    /// The same with weights of half the size.
    CpuBf16(Transformer<bf16>),
    /// The decoder has a copy of the weights.
    Gpu(Box<GpuDecoder>),
}

impl Seat {
    /// Brings the model in `dir` to the job's device; `say` hears in what it computes there, and the plan of a GPU's memory.
    ///
    /// # Errors
    /// [`Error::Usage`] for a type that the device does not compute in, [`Error::Device`] when there is no room, else as
    /// [`Transformer::load`].
    pub fn take(job: &Job, dir: &Path, settings: &Settings, say: impl FnOnce(&str)) -> Result<Self> {
        let place = &job.place;
        if !(place.gpu_memory_fraction > 0.0 && place.gpu_memory_fraction <= 1.0) {
            return Err(Error::Usage("gpu-memory-fraction is not above 0 and at most 1".into()));
        }
        let Some(gpu) = &place.gpu else { return Self::on_the_cpu(place.dtype, dir, say) };
        let model = Model::load(dir)?;
        let on = OnGpu {
            dtype: place.dtype.on(&**gpu)?,
            max_prompt_tokens: job.prompts.max_tokens,
            batch_invariant: place.batch_invariant,
        };
        let plan = on.plan(model.config(), settings)?;
        let room = (gpu.memory()?.0 as f64 * place.gpu_memory_fraction) as usize;
        say(&format!("{}, {plan}", on.dtype.suffix()));
        plan.check(room)?;
        Ok(Self::Gpu(Box::new(GpuDecoder::new(gpu, &model, settings, on)?)))
    }

    fn on_the_cpu(dtype: Dtype, dir: &Path, say: impl FnOnce(&str)) -> Result<Self> {
        match dtype {
            Dtype::Auto => {
                say(
                    "weights in f32, so that the trainer finds the same log-probabilities; --dtype bf16 takes half the memory",
                );
                Model::load(dir).map(Self::Cpu)
            }
            Dtype::F32 => Model::load(dir).map(Self::Cpu),
            Dtype::Bf16 => Transformer::load(dir).map(Self::CpuBf16),
            Dtype::F16 => Err(Error::Usage("--dtype f16: the CPU holds weights in f32 or bf16".into())),
        }
    }

    /// Samples a group for each request.
    ///
    /// # Errors
    /// See [`Engine::run`].
    pub fn sample(
        &mut self,
        settings: &Settings,
        requests: Receiver<Result<Request<Line>>>,
        sink: &mut dyn Sink<Line>,
    ) -> Result<Work> {
        let settings = settings.clone();
        match self {
            Self::Cpu(model) => Engine::new(&mut CpuDecoder::new(model, &settings), settings).run(requests, sink),
            Self::CpuBf16(model) => Engine::new(&mut CpuDecoder::new(model, &settings), settings).run(requests, sink),
            Self::Gpu(decoder) => Engine::new(&mut **decoder, settings).run(requests, sink),
        }
    }

    /// Goes on with the weights in `dir`, of the same shape.
    ///
    /// # Errors
    /// As [`Transformer::load`], and [`Error::Device`].
    pub fn set_weights(&mut self, dir: &Path) -> Result<()> {
        match self {
            Self::Cpu(model) => *model = Model::load(dir)?,
            Self::CpuBf16(model) => *model = Transformer::load(dir)?,
            Self::Gpu(decoder) => decoder.set_weights(&Model::load(dir)?)?,
        }
        Ok(())
    }
}
