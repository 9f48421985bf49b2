//! Where a job samples: on the CPU, or on a GPU that keeps its memory from one step of a run to the next.

use std::path::Path;
use std::sync::Arc;

use half::bf16;

use super::Job;
use crate::engine::{CpuDecoder, Decoder, Engine, GpuDecoder, OnGpu, Request, Settings, Sink, Work};
use crate::error::{Error, Result};
use crate::gpu::device::{ComputeDevice, DtypeChoice};
use crate::gpu::driver::Driver;
use crate::lines::record::Line;
use crate::model::{Model, Transformer, has_weights};
use crate::numbers::aligned::Number;
use crate::process::cancel::Stop;
use crate::process::read_ahead::ReadAhead;

/// Where and how to compute.
#[derive(Clone)]
pub struct Place {
    /// The processor or a GPU.
    pub device: ComputeDevice,
    /// Of weights, and on a GPU of caches.
    pub dtype: DtypeChoice,
    /// See [`OnGpu::batch_invariant`].
    pub batch_invariant: bool,
    /// Of the memory that is free when sampling begins, how much it may take.
    pub gpu_memory_fraction: f64,
}

/// A place, taken, with the weights.
pub struct Seat {
    at: At,
    stop: Stop,
}

enum At {
    /// A decoder costs nothing to make, and borrows its model.
    Cpu(Model),
    /// The same with weights of half the size.
    CpuBf16(Transformer<bf16>),
    /// The decoder has a copy of the weights.
    Gpu(Box<GpuDecoder>),
}

impl Seat {
    /// Brings the model in `dir` to the job's device, and settles how many sequences are sampled at once there. `say` hears where it
    /// computes and how, with the plan of a GPU's memory.
    ///
    /// # Errors
    /// [`Error::Usage`] for a type that the device does not compute in, [`Error::Device`] when there is no room, else as
    /// [`Transformer::load`].
    pub fn take(job: &mut Job, dir: &Path, say: impl FnOnce(&str)) -> Result<Self> {
        let place = &job.place;
        if !(place.gpu_memory_fraction > 0.0 && place.gpu_memory_fraction <= 1.0) {
            return Err(Error::Usage("gpu-memory-fraction is not above 0 and at most 1".into()));
        }
        let at = match place.device.gpu.clone() {
            None => At::the_cpu(job, dir, say)?,
            Some(gpu) => At::the_gpu(&gpu, job, dir, say)?,
        };
        Ok(Self { at, stop: job.stop.clone() })
    }

    /// Samples a group for each request, until it is to stop.
    ///
    /// # Errors
    /// See [`Engine::run`].
    pub fn sample(
        &mut self,
        settings: &Settings,
        requests: ReadAhead<Request<Line>>,
        sink: &mut dyn Sink<Line>,
    ) -> Result<Work> {
        let run =
            |decoder: &mut dyn Decoder| Engine::new(decoder, settings.clone()).until(&self.stop).run(requests, sink);
        match &mut self.at {
            At::Cpu(model) => run(&mut CpuDecoder::new(model, settings)),
            At::CpuBf16(model) => run(&mut CpuDecoder::new(model, settings)),
            At::Gpu(decoder) => run(&mut **decoder),
        }
    }

    /// Takes a trainer's offer of weights on the same card: those that come without a file are copied from there.
    ///
    /// # Errors
    /// [`Error::Device`] saying why they cannot be.
    pub fn accept(&mut self, offer: &[u8]) -> Result<()> {
        let At::Gpu(decoder) = &mut self.at else { return Err(Error::Device("the sampler is on the CPU".into())) };
        let unknown = |err| Error::Device(format!("an offer that this version does not know: {err}"));
        decoder.accept(&serde_json::from_slice(offer).map_err(unknown)?)
    }

    /// Goes on with the weights in `dir`, of the same shape.
    ///
    /// # Errors
    /// As [`Transformer::load`], and [`Error::Device`].
    pub fn set_weights(&mut self, dir: &Path) -> Result<()> {
        match &mut self.at {
            At::Cpu(model) => *model = load(dir, &self.stop)?,
            At::CpuBf16(model) => *model = load(dir, &self.stop)?,
            At::Gpu(decoder) if has_weights(dir) => decoder.set_weights(&Model::load(dir)?)?,
            At::Gpu(decoder) => decoder.take_offered_weights()?,
        }
        Ok(())
    }
}

fn load<W: Number>(dir: &Path, stop: &Stop) -> Result<Transformer<W>> {
    let mut model = Transformer::load(dir)?;
    model.stop_with(stop);
    Ok(model)
}

impl At {
    fn the_gpu(gpu: &Arc<dyn Driver>, job: &mut Job, dir: &Path, say: impl FnOnce(&str)) -> Result<Self> {
        let (place, model) = (&job.place, Model::load(dir)?);
        let positions = model.config().positions();
        let on = OnGpu {
            dtype: place.dtype.on(&**gpu)?,
            max_prompt_tokens: job.prompts.max_tokens.min(positions - job.settings.max_completion_tokens),
            batch_invariant: place.batch_invariant,
        };
        let room = (gpu.memory()?.free as f64 * place.gpu_memory_fraction) as usize;
        let plan = |max_sequences| on.plan(model.config(), &Settings { max_sequences, ..job.settings.clone() });
        let sequences = job.asked.sequences(|sequences| Ok(plan(sequences)?.check(room).is_ok()))?;
        let plan = plan(sequences)?;
        say(&format!("{}, {plan} for {sequences} sequences at once", ComputeDevice::on_gpu(&**gpu, on.dtype)));
        plan.check(room)?;
        job.settings.max_sequences = sequences;
        Ok(Self::Gpu(Box::new(GpuDecoder::new(gpu, &model, &job.settings, on)?)))
    }

    fn the_cpu(job: &mut Job, dir: &Path, say: impl FnOnce(&str)) -> Result<Self> {
        job.settings.max_sequences = job.asked.sequences(|_| Ok(true))?;
        let device = &job.place.device;
        match job.place.dtype {
            DtypeChoice::Auto | DtypeChoice::F32 => {
                say(&device.on_cpu("weights in f32"));
                load(dir, &job.stop).map(Self::Cpu)
            }
            DtypeChoice::Bf16 => {
                say(&device.on_cpu("weights in bf16"));
                load(dir, &job.stop).map(Self::CpuBf16)
            }
            DtypeChoice::F16 => Err(Error::Usage("--dtype f16: the CPU holds weights in f32 or bf16".into())),
        }
    }
}
