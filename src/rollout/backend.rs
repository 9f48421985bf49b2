//! Samples on the CPU, or on a GPU that keeps its memory from one step of a run to the next.

use std::path::Path;
#[cfg(feature = "candle")]
use std::sync::Arc;

use super::{ModelLimits, RolloutJob, Source};
use crate::directory::has_weights;
#[cfg(feature = "candle")]
use crate::engine::{CandleDecoder, Teacher};
use crate::engine::{CpuDecoder, Decoder, Engine, GpuDecoder, GpuOptions, Request, Settings, Sink, Work};
use crate::error::{Error, Result};
use crate::gpu::device::{ComputeDevice, DtypeChoice};
use crate::gpu::driver::Driver;
use crate::model::{Config, Model, compute_name};
use crate::numbers::dtype::Dtype;
use crate::process::cancel::Stop;
use crate::process::read_ahead::ReadAhead;

/// Where and how to compute.
#[derive(Clone)]
pub struct BackendOptions {
    /// The CPU or a GPU.
    pub device: ComputeDevice,
    /// Type of weights, and on a GPU of KV caches.
    pub dtype: DtypeChoice,
    /// See [`GpuOptions::batch_invariant`].
    pub batch_invariant: bool,
    /// Fraction of the GPU memory that is free when sampling begins, of which no more is used.
    pub gpu_memory_fraction: f64,
}

/// A model on its device.
pub struct SamplingBackend {
    loaded: Loaded,
    stop: Stop,
}

enum Loaded {
    /// The decoder borrows its model, and costs nothing to make.
    Cpu(Box<Model>),
    /// The decoder borrows it, too.
    #[cfg(feature = "candle")]
    Candle(Arc<Teacher>),
    /// The decoder has a copy of the weights.
    Gpu(Box<GpuDecoder>),
}

impl SamplingBackend {
    /// Loads a model to the job's device, and sets `max_sequences` to what fits there. `say` gets one line that names the
    /// device, the number types and the plan of a GPU's memory.
    ///
    /// # Errors
    /// [`Error::Usage`] for a type that the device does not compute in, [`Error::Device`] when the memory does not suffice, else
    /// those of [`Model::load`].
    pub fn open(
        job: &RolloutJob,
        model: &Source,
        limits: ModelLimits,
        settings: &mut Settings,
        say: impl FnOnce(&str),
    ) -> Result<Self> {
        let options = &job.backend;
        if !(options.gpu_memory_fraction > 0.0 && options.gpu_memory_fraction <= 1.0) {
            return Err(Error::Usage("gpu-memory-fraction is not above 0 and at most 1".into()));
        }
        #[cfg(feature = "candle")]
        if let Some(teacher) = &model.teacher {
            settings.max_sequences = job.sizes.sequences(|_| Ok(true))?;
            let loaded = Loaded::of_candle(options, teacher, say)?;
            return Ok(Self { loaded, stop: job.stop.clone() });
        }
        let loaded = match &options.device.gpu {
            None => {
                settings.max_sequences = job.sizes.sequences(|_| Ok(true))?;
                Loaded::on_cpu(options, model, &job.stop, say)?
            }
            Some(gpu) => {
                let model = model.load(Dtype::F32)?;
                let on = GpuOptions {
                    dtype: options.dtype.on(&**gpu)?,
                    max_prompt_tokens: limits.prompt_tokens.min(limits.positions),
                    batch_invariant: options.batch_invariant,
                };
                plan_gpu(job, &**gpu, model.config(), on, settings, say)?;
                Loaded::Gpu(Box::new(GpuDecoder::new(gpu, &model, settings, on)?))
            }
        };
        Ok(Self { loaded, stop: job.stop.clone() })
    }

    /// Samples a group for each request, until a stop is requested.
    ///
    /// # Errors
    /// Those of [`Engine::run`].
    pub fn sample<T: Send>(
        &mut self,
        settings: &Settings,
        requests: ReadAhead<Request<T>>,
        sink: &mut dyn Sink<T>,
    ) -> Result<Work> {
        let run =
            |decoder: &mut dyn Decoder| Engine::new(decoder, settings.clone()).until(&self.stop).run(requests, sink);
        match &mut self.loaded {
            Loaded::Cpu(model) => run(&mut CpuDecoder::new(model, settings)),
            #[cfg(feature = "candle")]
            Loaded::Candle(teacher) => run(&mut CandleDecoder::new(teacher, settings)),
            Loaded::Gpu(decoder) => run(&mut **decoder),
        }
    }

    /// Accepts a trainer's offer of weights on the same GPU: weights that come without a file are copied from there.
    ///
    /// # Errors
    /// [`Error::Device`] saying why they cannot be copied.
    pub fn accept(&mut self, offer: &[u8]) -> Result<()> {
        let Loaded::Gpu(decoder) = &mut self.loaded else {
            return Err(Error::Device("the sampler is on the CPU".into()));
        };
        let unknown = |err| Error::Device(format!("this version does not know the trainer's offer: {err}"));
        decoder.accept(&serde_json::from_slice(offer).map_err(unknown)?)
    }

    /// Replaces the weights by those in `dir`, of the same shape.
    ///
    /// # Errors
    /// Those of [`Model::load`], and [`Error::Device`].
    pub fn set_weights(&mut self, dir: &Path) -> Result<()> {
        match &mut self.loaded {
            Loaded::Cpu(model) => model.replace_weights(dir)?,
            #[cfg(feature = "candle")]
            Loaded::Candle(_) => return Err(Error::model(dir, "a run trains what the engine runs")),
            Loaded::Gpu(decoder) if has_weights(dir) => decoder.set_weights(&Model::load(dir)?)?,
            Loaded::Gpu(decoder) => decoder.take_offered_weights()?,
        }
        Ok(())
    }
}

impl Loaded {
    #[cfg(feature = "candle")]
    fn of_candle(options: &BackendOptions, teacher: &Arc<Teacher>, say: impl FnOnce(&str)) -> Result<Self> {
        if !matches!(options.dtype, DtypeChoice::Auto | DtypeChoice::F32) {
            return Err(Error::Usage("--dtype: candle computes in f32, from weights as they are stored".into()));
        }
        match &options.device.gpu {
            Some(gpu) if teacher.is_on_gpu() => {
                say(&format!("{}, by candle", ComputeDevice::on_gpu(&**gpu, Dtype::F32)))
            }
            _ => say(&options.device.on_cpu("by candle, in f32")),
        }
        Ok(Self::Candle(Arc::clone(teacher)))
    }

    fn on_cpu(options: &BackendOptions, model: &Source, stop: &Stop, say: impl FnOnce(&str)) -> Result<Self> {
        // Rounding quantised numbers once more to 16 bits changes them less than quantisation did.
        let dtype = match options.dtype {
            DtypeChoice::Auto if model.is_quantized() => DtypeChoice::Bf16,
            DtypeChoice::Auto => DtypeChoice::F32,
            chosen => chosen,
        };
        let dtype = dtype.on_cpu()?;
        say(&options.device.on_cpu(&compute_name(dtype)));
        let mut model = model.load(dtype)?;
        model.stop_with(stop);
        Ok(Self::Cpu(Box::new(model)))
    }
}

/// Chooses how many sequences fit in the GPU's memory, and tells `say` the plan before anything is allocated.
fn plan_gpu(
    job: &RolloutJob,
    gpu: &dyn Driver,
    config: &Config,
    on: GpuOptions,
    settings: &mut Settings,
    say: impl FnOnce(&str),
) -> Result<()> {
    let room = (gpu.memory()?.free as f64 * job.backend.gpu_memory_fraction) as usize;
    let plan = |max_sequences| on.plan(config, &Settings { max_sequences, ..settings.clone() });
    let sequences = job.sizes.sequences(|sequences| Ok(plan(sequences)?.check(room).is_ok()))?;
    let plan = plan(sequences)?;
    say(&format!("{}, {plan} for {sequences} sequences at once", ComputeDevice::on_gpu(gpu, on.dtype)));
    settings.max_sequences = sequences;
    plan.check(room)
}
