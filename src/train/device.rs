//! Opens the device that `--device`, `--dtype` and `--memory-limit` name, and makes the training backend on it.

use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::device::{ComputeDevice, DeviceArgs};
use crate::gpu::driver::Driver;
use crate::gpu::packed::{PlanRequest, TrainingPlan};
use crate::model::{Model, compute_name};
use crate::numbers::dtype::Dtype;
use crate::train::backend::{Backend, Cpu};
use crate::train::gpu::Gpu;
use crate::train::ranks::Ranks;

/// Options of `grpo-step` that choose the device.
#[derive(Debug, Clone, clap::Args)]
pub struct TrainDeviceArgs {
    /// Device and number type.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Use at most this much GPU memory, as in 12GiB [default: all that is free]
    #[arg(long, value_name = "BYTES")]
    pub memory_limit: Option<Bytes>,
}

/// A number of bytes, written as `1500000`, `900MiB` or `12GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub usize);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "" | "B" => 1.0,
            "KiB" => f64::from(1 << 10),
            "MiB" => f64::from(1 << 20),
            "GiB" => f64::from(1 << 30),
            other => return Err(format!("unknown unit {other:?}: use B, KiB, MiB or GiB")),
        };
        match digits.parse::<f64>() {
            Ok(number) if number > 0.0 && number.is_finite() => Ok(Self((number * unit) as usize)),
            _ => Err("not a number above 0 with a unit, as in 12GiB".into()),
        }
    }
}

/// What training holds in memory besides the policy's weights and gradients.
#[derive(Debug, Clone, Copy)]
pub struct MemoryNeeds {
    /// How many models are loaded besides: a reference, a teacher.
    pub frozen: usize,
    /// Tokens per micro-batch; `None` lets the memory plan choose.
    pub tokens: Option<usize>,
    /// The type of the optimizer's moments.
    pub optimizer_state: Dtype,
}

/// An opened device.
pub struct OpenDevice {
    gpu: Option<Arc<dyn Driver>>,
    dtype: Dtype,
    limit: Option<usize>,
}

impl TrainDeviceArgs {
    /// Opens the GPU, unless the CPU is to be used, which `say` is then told.
    ///
    /// # Errors
    /// [`Error::Device`] when the requested GPU cannot be used, [`Error::Usage`] for GPU options on the CPU.
    pub fn open(&self, say: &dyn Fn(&str)) -> Result<OpenDevice> {
        let limit = self.memory_limit.map(|Bytes(bytes)| bytes);
        let DeviceArgs { device, dtype } = self.device;
        let found = device.open()?;
        let Some(driver) = found.gpu.clone() else {
            if limit.is_some() {
                return Err(Error::Usage("--memory-limit needs a GPU".into()));
            }
            let dtype = dtype.on_cpu()?;
            say(&found.on_cpu(&compute_name(dtype)));
            return Ok(OpenDevice { gpu: None, dtype, limit });
        };
        let dtype = dtype.on(&*driver)?;
        Ok(OpenDevice { gpu: Some(driver), dtype, limit })
    }
}

impl OpenDevice {
    /// Makes the backend that trains `model` on this one of `ranks`. On a GPU this plans its memory first, and tells `say` the plan.
    ///
    /// # Errors
    /// [`Error::Device`] when the model does not fit, [`Error::Usage`] for what is done on the CPU only.
    pub fn backend(
        &self,
        model: Model,
        needs: MemoryNeeds,
        ranks: &Arc<dyn Ranks>,
        say: &dyn Fn(&str),
    ) -> Result<Box<dyn Backend>> {
        let dtype = self.dtype;
        let Some(driver) = &self.gpu else { return Ok(Box::new(Cpu::new(model, dtype).among(Arc::clone(ranks)))) };
        if ranks.count() > 1 {
            return Err(Error::Usage(
                "several processes train together on CPUs: --device cpu, or one process on the GPU".into(),
            ));
        }
        let free = driver.memory()?.free;
        let limit = self.limit.map_or(free, |limit| limit.min(free));
        let MemoryNeeds { frozen, tokens, optimizer_state: moments } = needs;
        let request =
            PlanRequest { config: model.config(), adapter: model.adapter(), dtype, moments, frozen, tokens, limit };
        let plan = TrainingPlan::choose(request)?;
        say(&format!("{}, {}", ComputeDevice::on_gpu(&**driver, dtype), plan.describe()));
        Ok(Box::new(Gpu::new(Arc::clone(driver), model, dtype, &plan)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::device::{Device, DtypeChoice};

    #[test]
    fn bytes_are_read_with_their_unit() {
        assert_eq!("12GiB".parse(), Ok(Bytes(12 << 30)));
        assert_eq!("1.5MiB".parse(), Ok(Bytes(3 << 19)));
        assert_eq!("1000".parse(), Ok(Bytes(1000)));
        for text in ["", "GiB", "-1GiB", "0", "12GB", "12 GiB", "nan", "1e999"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_only_a_gpu_has_is_refused_on_the_processor() {
        let args =
            |dtype, memory_limit| TrainDeviceArgs { device: DeviceArgs { device: Device::Cpu, dtype }, memory_limit };
        assert!(args(DtypeChoice::F32, None).open(&|_| ()).is_ok());
        for args in [args(DtypeChoice::F16, None), args(DtypeChoice::Auto, Some(Bytes(1)))] {
            assert_eq!(args.open(&|_| ()).err().unwrap().exit_code(), 2);
        }
    }
}
