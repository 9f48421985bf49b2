//! Samples on the CPU, or on a GPU that keeps its memory from one step of a run to the next.

use std::path::Path;

use half::bf16;

use super::{ModelLimits, RolloutJob};
use crate::engine::{CpuDecoder, Decoder, Engine, GpuDecoder, GpuOptions, Request, Settings, Sink, Work};
use crate::error::{Error, Result};
use crate::gpu::device::{ComputeDevice, DtypeChoice};
use crate::gpu::driver::Driver;
use crate::lines::record::Line;
use crate::model::{Config, Model, Transformer, has_weights};
use crate::numbers::aligned::Number;
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
    Cpu(Model),
    /// The same with weights of half the size.
    CpuBf16(Transformer<bf16>),
    /// The decoder has a copy of the weights.
    Gpu(Box<GpuDecoder>),
}

impl SamplingBackend {
    /// Loads the model in `dir` to the job's device, and sets `max_sequences` to what fits there. `say` gets one line that names the
    /// device, the number types and the plan of a GPU's memory.
    ///
    /// # Errors
    /// [`Error::Usage`] for a type that the device does not compute in, [`Error::Device`] when the memory does not suffice, else
    /// those of [`Transformer::load`].
    pub fn open(
        job: &RolloutJob,
        dir: &Path,
        limits: ModelLimits,
        settings: &mut Settings,
        say: impl FnOnce(&str),
    ) -> Result<Self> {
        let options = &job.backend;
        if !(options.gpu_memory_fraction > 0.0 && options.gpu_memory_fraction <= 1.0) {
            return Err(Error::Usage("gpu-memory-fraction is not above 0 and at most 1".into()));
        }
        let loaded = match &options.device.gpu {
            None => {
                settings.max_sequences = job.sizes.sequences(|_| Ok(true))?;
                Loaded::on_cpu(options, dir, &job.stop, say)?
            }
            Some(gpu) => {
                let model = Model::load(dir)?;
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
    pub fn sample(
        &mut self,
        settings: &Settings,
        requests: ReadAhead<Request<Line>>,
        sink: &mut dyn Sink<Line>,
    ) -> Result<Work> {
        let run =
            |decoder: &mut dyn Decoder| Engine::new(decoder, settings.clone()).until(&self.stop).run(requests, sink);
        match &mut self.loaded {
            Loaded::Cpu(model) => run(&mut CpuDecoder::new(model, settings)),
            Loaded::CpuBf16(model) => run(&mut CpuDecoder::new(model, settings)),
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
    /// Those of [`Transformer::load`], and [`Error::Device`].
    pub fn set_weights(&mut self, dir: &Path) -> Result<()> {
        match &mut self.loaded {
            Loaded::Cpu(model) => *model = load(dir, &self.stop)?,
            Loaded::CpuBf16(model) => *model = load(dir, &self.stop)?,
            Loaded::Gpu(decoder) if has_weights(dir) => decoder.set_weights(&Model::load(dir)?)?,
            Loaded::Gpu(decoder) => decoder.take_offered_weights()?,
        }
        Ok(())
    }
}

fn load<W: Number>(dir: &Path, stop: &Stop) -> Result<Transformer<W>> {
    let mut model = Transformer::load(dir)?;
    model.stop_with(stop);
    Ok(model)
}

impl Loaded {
    fn on_cpu(options: &BackendOptions, dir: &Path, stop: &Stop, say: impl FnOnce(&str)) -> Result<Self> {
        match options.dtype {
            DtypeChoice::Auto | DtypeChoice::F32 => {
                say(&options.device.on_cpu("weights in f32"));
                load(dir, stop).map(Self::Cpu)
            }
            DtypeChoice::Bf16 => {
                say(&options.device.on_cpu("weights in bf16"));
                load(dir, stop).map(Self::CpuBf16)
            }
            DtypeChoice::F16 => Err(Error::Usage("--dtype f16: the CPU holds weights in f32 or bf16".into())),
        }
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
