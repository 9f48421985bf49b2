//! Parses `--device` and `--dtype`, and opens the device.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::driver::Driver;
use crate::numbers::dtype::Dtype;

/// `--device`: what the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The first GPU if there is one and this build can use it, else the CPU.
    Auto,
    /// The CPU, on all threads.
    Cpu,
    /// A GPU, counted from 0.
    Cuda(usize),
}

/// `--dtype`: the type that matrix products read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeChoice {
    /// bf16 if the GPU supports it, else f16; on the CPU f32
    Auto,
    /// 32 bits
    F32,
    /// 16 bits, the range of f32
    Bf16,
    /// 16 bits, the range up to 65,504
    F16,
}

impl DtypeChoice {
    /// The type to use on the CPU.
    ///
    /// # Errors
    /// [`Error::Usage`] for f16.
    pub fn on_cpu(self) -> Result<Dtype> {
        match self {
            Self::Auto | Self::F32 => Ok(Dtype::F32),
            Self::Bf16 => Ok(Dtype::Bf16),
            Self::F16 => Err(Error::Usage("--dtype f16: the CPU computes in f32 or bf16".into())),
        }
    }

    /// The type to use on a GPU.
    ///
    /// # Errors
    /// [`Error::Device`] when the GPU does not support it.
    pub fn on(self, gpu: &dyn Driver) -> Result<Dtype> {
        let dtype = match self {
            Self::Auto if gpu.supports(Dtype::Bf16) => Dtype::Bf16,
            Self::Auto | Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::Bf16,
        };
        if gpu.supports(dtype) {
            return Ok(dtype);
        }
        Err(Error::Device(format!("the {} does not support {dtype}: use --dtype f16", gpu.name())))
    }
}

/// Options that choose the device and the number type, shared by `rollout` and `grpo-step`.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda, or cuda:N for GPU N counted from 0. `auto` takes the first GPU if this build can use it,
    /// else the CPU
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value_t = Device::Auto)]
    pub device: Device,
    /// Type of the numbers that matrix products read, and on a GPU of KV caches. Sums, gradients and the weights being trained are
    /// always f32
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    pub dtype: DtypeChoice,
}

/// The device that was opened.
#[derive(Clone)]
pub struct ComputeDevice {
    /// `None` for the CPU.
    pub gpu: Option<Arc<dyn Driver>>,
    /// The number of that GPU, counted from 0.
    pub ordinal: usize,
    /// Whether the user named it, so that nothing else will do.
    pub is_named: bool,
    /// Why this machine's GPU is not used, if it has one.
    pub why_not: Option<String>,
}

impl ComputeDevice {
    /// The message for a command that computes on the CPU; `how` says in what type.
    #[must_use]
    pub fn on_cpu(&self, how: &str) -> String {
        let threads = match rayon::current_num_threads() {
            1 => "1 thread".to_owned(),
            threads => format!("{threads} threads"),
        };
        let why_not = self.why_not.iter().map(|why| format!(", not on the GPU: {why}"));
        format!("computing on the CPU ({threads}, {how}){}", why_not.collect::<String>())
    }

    /// The message for a command that computes on a GPU in `dtype`.
    #[must_use]
    pub fn on_gpu(gpu: &dyn Driver, dtype: Dtype) -> String {
        format!("computing on the GPU ({}, {dtype})", gpu.name())
    }
}

impl Device {
    /// Opens the GPU that the user asked for or, with `auto`, the first one that works.
    ///
    /// # Errors
    /// [`Error::Device`] when the GPU that the user asked for cannot be used.
    pub fn open(self) -> Result<ComputeDevice> {
        self.open_with(open_gpu, has_gpu())
    }

    fn open_with(
        self,
        open_gpu: impl FnOnce(usize) -> Result<Arc<dyn Driver>>,
        has_gpu: bool,
    ) -> Result<ComputeDevice> {
        match self {
            Self::Cpu => Ok(ComputeDevice { gpu: None, ordinal: 0, is_named: true, why_not: None }),
            Self::Cuda(ordinal) => {
                Ok(ComputeDevice { gpu: Some(open_gpu(ordinal)?), ordinal, is_named: true, why_not: None })
            }
            Self::Auto => match open_gpu(0) {
                Ok(gpu) => Ok(ComputeDevice { gpu: Some(gpu), ordinal: 0, is_named: false, why_not: None }),
                Err(why) => {
                    let why_not = has_gpu.then(|| why.to_string());
                    Ok(ComputeDevice { gpu: None, ordinal: 0, is_named: false, why_not })
                }
            },
        }
    }
}

/// Whether this machine has an NVIDIA GPU, as far as its kernel knows. On a machine without one, no message mentions CUDA.
fn has_gpu() -> bool {
    ["/proc/driver/nvidia/version", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1"]
        .iter()
        .any(|path| Path::new(path).exists())
}

#[cfg(feature = "cuda")]
use crate::gpu::cuda::open as open_gpu;

#[cfg(not(feature = "cuda"))]
fn open_gpu(_: usize) -> Result<Arc<dyn Driver>> {
    Err(Error::Device("not built with CUDA: make CUDA=1".into()))
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) => {
                number.parse().map(Self::Cuda).map_err(|_| format!("{number:?} is not the number of a GPU"))
            }
            _ => Err("expected auto, cpu, cuda or cuda:N".into()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in [("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda:3", Device::Cuda(3))] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for text in ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1:2", "cpu:0", "auto:0"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }

    #[test]
    fn auto_falls_back_to_the_cpu_and_says_why_only_where_there_is_a_gpu_and_one_asked_for_must_be_there() {
        let none = |ordinal| Err(Error::Device(format!("no driver for GPU {ordinal}")));
        let with = Device::Auto.open_with(none, true).unwrap();
        assert!(with.gpu.is_none());
        assert!(with.on_cpu("f32").ends_with(", f32), not on the GPU: no driver for GPU 0"), "{}", with.on_cpu("f32"));
        let without = Device::Auto.open_with(none, false).unwrap();
        assert!(without.on_cpu("f32").ends_with(", f32)"), "{}", without.on_cpu("f32"));
        assert!(Device::Cpu.open_with(|_| panic!("not asked for"), true).unwrap().why_not.is_none());
        let err = Device::Cuda(2).open_with(none, false).err().unwrap();
        assert_eq!((err.to_string().as_str(), err.exit_code()), ("no driver for GPU 2", 1));
    }
}
