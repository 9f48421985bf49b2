//! Where a policy is trained: `--device`, `--dtype`, `--memory-limit`.

use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::device::{ComputeDevice, Device, DtypeChoice};
use crate::gpu::driver::Driver;
use crate::gpu::packed::{PlanRequest, TrainingPlan};
use crate::model::Model;
use crate::numbers::dtype::Dtype;
use crate::train::backend::Machine;
use crate::train::gpu::Gpu;
use crate::train::trainer::on_cpu;

/// Options of the place.
#[derive(Debug, Clone, clap::Args)]
pub struct PlaceArgs {
    /// Where to compute: auto, cpu, cuda, or cuda:N for GPU N counted from 0. `auto` takes the first GPU if there is one that this
    /// build can use, else the processor
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value_t = Device::Auto)]
    pub device: Device,
    /// Numbers that a GPU multiplies; sums, the residual stream, gradients and the weights in training are f32 in any case
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    pub dtype: DtypeChoice,
    /// GPU memory to stay within, like 12GiB [default: what is free]
    #[arg(long, value_name = "BYTES")]
    pub memory_limit: Option<Bytes>,
}

/// A number of bytes: `1500000`, `900MiB`, `12GiB`.
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
            other => return Err(format!("{other:?} is no unit: B, KiB, MiB or GiB")),
        };
        match digits.parse::<f64>() {
            Ok(number) if number > 0.0 && number.is_finite() => Ok(Self((number * unit) as usize)),
            _ => Err("it is a number above 0 and a unit, like 12GiB".into()),
        }
    }
}

/// What a machine holds besides the policy's weights and gradients.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// A second model, for reference log-probabilities.
    pub reference: bool,
    /// How many tokens run at once, where somebody has decided.
    pub tokens: Option<usize>,
    /// What the moments are held in.
    pub optimizer_state: Dtype,
}

/// A place that was opened.
pub struct Opened {
    gpu: Option<(Arc<dyn Driver>, Dtype)>,
    limit: Option<usize>,
}

impl PlaceArgs {
    /// Opens the GPU, if it is to be one. `say` hears of the processor; of a GPU, when a model's memory on it is planned.
    ///
    /// # Errors
    /// [`Error::Device`] when a GPU that was asked for cannot be used, [`Error::Usage`] for what only a GPU has.
    pub fn open(&self, say: &dyn Fn(&str)) -> Result<Opened> {
        let limit = self.memory_limit.map(|Bytes(bytes)| bytes);
        let found = self.device.open()?;
        let Some(driver) = found.gpu.clone() else {
            if limit.is_some() || !matches!(self.dtype, DtypeChoice::Auto | DtypeChoice::F32) {
                return Err(Error::Usage("--memory-limit, --dtype bf16 and f16 are for a GPU".into()));
            }
            say(&found.on_cpu("f32"));
            return Ok(Opened { gpu: None, limit });
        };
        let dtype = self.dtype.on(&*driver)?;
        Ok(Opened { gpu: Some((driver, dtype)), limit })
    }
}

impl Opened {
    /// Makes the machine for a model; on a GPU its memory is planned first, and the plan told.
    ///
    /// # Errors
    /// [`Error::Device`] when it does not fit.
    pub fn machine(&self, model: Model, load: Load, say: &dyn Fn(&str)) -> Result<Box<dyn Machine>> {
        let Some((driver, dtype)) = &self.gpu else { return on_cpu(model) };
        let free = driver.memory()?.free;
        let limit = self.limit.map_or(free, |limit| limit.min(free));
        let Load { reference, tokens, optimizer_state: moments } = load;
        let request = PlanRequest { config: model.config(), dtype: *dtype, moments, reference, tokens, limit };
        let plan = TrainingPlan::choose(request)?;
        say(&format!("{}, {}", ComputeDevice::on_gpu(&**driver, *dtype), plan.describe()));
        Ok(Box::new(Gpu::new(Arc::clone(driver), model, *dtype, &plan)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let args = |dtype, memory_limit| PlaceArgs { device: Device::Cpu, dtype, memory_limit };
        assert!(args(DtypeChoice::F32, None).open(&|_| ()).is_ok());
        for args in [args(DtypeChoice::Bf16, None), args(DtypeChoice::Auto, Some(Bytes(1)))] {
            assert_eq!(args.open(&|_| ()).err().unwrap().exit_code(), 2);
        }
    }
}
