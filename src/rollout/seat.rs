//! Where a job samples: on the CPU, or on a GPU that keeps its memory from one step of a run to the next.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::Job;
use crate::device::Dtype;
use crate::engine::{CpuDecoder, Engine, GpuDecoder, OnGpu, Request, Settings, Sink, Work};
use crate::error::{Error, Result};
use crate::gpu::driver::Driver;
use crate::model::Model;
use crate::record::Line;
use crate::stop::Stop;

/// Where and how to compute.
#[derive(Clone)]
pub struct Place {
    /// None is the CPU.
    pub gpu: Option<Arc<dyn Driver>>,
    /// Of weights and caches.
    pub dtype: Dtype,
    /// See [`OnGpu::batch_invariant`].
    pub batch_invariant: bool,
    /// Of the memory that is free when sampling begins, how much it may take.
    pub gpu_memory_fraction: f64,
}

/// A place, taken.
pub enum Seat {
    /// On the CPU a decoder costs nothing to make, and borrows its model.
    Cpu,
    /// The decoder, and whether its weights are the first ones.
    Gpu(Box<GpuDecoder>),
}

impl Seat {
    /// Makes room on the job's device for a model; `say` hears the plan of a GPU's memory.
    ///
    /// # Errors
    /// [`Error::Usage`] for a type that the device does not compute in, [`Error::Device`] when there is no room.
    pub fn take(job: &Job, model: &Model, settings: &Settings, say: impl FnOnce(&str)) -> Result<Self> {
        let place = &job.place;
        if !(place.gpu_memory_fraction > 0.0 && place.gpu_memory_fraction <= 1.0) {
            return Err(Error::Usage("gpu-memory-fraction is not above 0 and at most 1".into()));
        }
        let Some(gpu) = &place.gpu else {
            return match place.dtype {
                Dtype::Auto | Dtype::F32 => Ok(Self::Cpu),
                Dtype::Bf16 | Dtype::F16 => Err(Error::Usage("--dtype: the CPU computes in f32".into())),
            };
        };
        let on = OnGpu {
            dtype: place.dtype.on(&**gpu)?,
            max_prompt_tokens: job.prompts.max_tokens,
            batch_invariant: place.batch_invariant,
        };
        let plan = on.plan(model.config(), settings)?;
        let room = (gpu.memory()?.0 as f64 * place.gpu_memory_fraction) as usize;
        say(&format!("{}, {plan}", on.dtype.suffix()));
        plan.check(room)?;
        Ok(Self::Gpu(Box::new(GpuDecoder::new(gpu, model, settings, on)?)))
    }

    /// Samples a group for each request, until it is to stop.
    ///
    /// # Errors
    /// See [`Engine::run`].
    pub fn sample(
        &mut self,
        (model, stop): (&Model, &Stop),
        settings: &Settings,
        requests: Receiver<Result<Request<Line>>>,
        sink: &mut dyn Sink<Line>,
    ) -> Result<Work> {
        match self {
            Self::Cpu => {
                let mut decoder = CpuDecoder::new(model, settings);
                Engine::new(&mut decoder, settings.clone()).until(stop).run(requests, sink)
            }
            Self::Gpu(decoder) => Engine::new(&mut **decoder, settings.clone()).until(stop).run(requests, sink),
        }
    }

    /// Goes on with other weights of the same shape.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn set_weights(&mut self, model: &Model) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Gpu(decoder) => decoder.set_weights(model),
        }
    }
}
