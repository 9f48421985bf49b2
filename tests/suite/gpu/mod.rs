//! The GPU's kernels and engine against plain twins: run on the CPU by a shim under sanitizers, and on a GPU where there is one.

mod draw;
mod driver;
mod engine;
mod handover;
mod linear_rows;
mod long;
mod norm;
mod packed;
mod rollout;
mod shim;

use std::io::Write;
use std::process::Command;
use std::sync::Arc;

use grpo_pipes::gpu::driver::Driver;
use grpo_pipes::model::{Config, Model};
use grpo_pipes::numbers::dtype::Dtype;

use crate::fixtures::directory;

/// All ignored tests of this module on the shim, in a process that loads AddressSanitizer first.
#[test]
fn kernels_run_under_sanitizers() {
    let library = match shim::library() {
        Ok(library) => library,
        Err(why) => return skipped(&format!("the kernels' shim cannot be compiled here: {why}")),
    };
    let Some(sanitizer) = shim::sanitizer() else {
        return skipped("the C++ compiler has no AddressSanitizer");
    };
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests.args(["gpu::", "--ignored", "--test-threads=2"]).env("GRPO_PIPES_SHIM", &library);
    tests.env("LD_PRELOAD", sanitizer).env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0");
    let done = tests.output().unwrap();
    std::fs::remove_file(library).unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{out}\n{err}");
    assert!(!out.contains("running 0 tests"), "{out}");
}

fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

/// The same tests on the first GPU, each in a process of its own: after a kernel's bad access nothing works in that process.
#[cfg(feature = "cuda")]
#[test]
fn kernels_run_on_a_real_gpu() {
    match grpo_pipes::gpu::cuda::open(0) {
        Ok(gpu) => drop(writeln!(std::io::stderr(), "GPU: {}", gpu.name())),
        Err(why) => return skipped(&why.to_string()),
    }
    let tests = || Command::new(std::env::current_exe().unwrap());
    let list = tests().args(["gpu::", "--ignored", "--list", "--format=terse"]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let names: Vec<&str> = list.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    assert!(!names.is_empty(), "{list}");
    let mut failed = String::new();
    for name in names {
        let done = tests().args(["--exact", name, "--ignored"]).env_remove("GRPO_PIPES_SHIM").output().unwrap();
        let verdict = if done.status.success() { "ok" } else { "FAILED" };
        drop(writeln!(std::io::stderr(), "{name}: {verdict}"));
        if !done.status.success() {
            failed += &format!("{name}: {}\n{}\n", done.status, String::from_utf8_lossy(&done.stdout));
        }
    }
    assert!(failed.is_empty(), "{failed}");
}

/// Models without biases, whose heads together are wider than the stream: one without norms of heads, and some with.
fn other_families() -> Vec<Model> {
    let fixture = |name| Model::load(&directory().join(name)).unwrap();
    let (mistral, qwen3) = (fixture("tiny-mistral"), fixture("tiny-qwen3"));
    let other_width = |dim: usize| {
        let mut model = Model::random(Config { head_dim: Some(dim), ..qwen3.config().clone() }, 3);
        for parameter in model.parameters_mut() {
            parameter.iter_mut().enumerate().for_each(|(i, x)| *x += 0.1 * (i as f32 * 7.0).sin());
        }
        model
    };
    let (narrow, wide) = (other_width(16), other_width(128));
    vec![mistral, narrow, qwen3, wide]
}

/// The shim's, where the tests are run on it, else the first GPU.
fn gpu() -> Arc<dyn Driver> {
    match std::env::var_os("GRPO_PIPES_SHIM") {
        Some(library) => Arc::new(shim::Shim::new(&library)),
        None => real_gpu(),
    }
}

#[cfg(feature = "cuda")]
fn real_gpu() -> Arc<dyn Driver> {
    grpo_pipes::gpu::cuda::open(0).unwrap()
}

#[cfg(not(feature = "cuda"))]
fn real_gpu() -> Arc<dyn Driver> {
    panic!("run by kernels_run_under_sanitizers; or build with --features cuda")
}

/// The name of the shim's GPU.
const SHIM: &str = "a C++ shim";

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// Half a unit in the last place of numbers of about 1.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-6,
        Dtype::Bf16 => 4e-3,
        Dtype::F16 => 5e-4,
    }
}

/// Numbers from -1 to 1, the same ones for the same seed.
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Numbers as the device holds them.
fn rounded(dtype: Dtype, numbers: &[f32]) -> Vec<f32> {
    let round = |x: &f32| match dtype {
        Dtype::F32 => *x,
        Dtype::Bf16 => half::bf16::from_f32(*x).to_f32(),
        Dtype::F16 => half::f16::from_f32(*x).to_f32(),
    };
    numbers.iter().map(round).collect()
}
