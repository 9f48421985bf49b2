//! With the feature `cuda`, compiles the kernels of `src/gpu/kernels/` with nvcc into one file that the library embeds, for every
//! architecture below that nvcc supports. Without the feature, it does nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compute capabilities to compile machine code for. Later GPUs compile the PTX of the last one when they first run it.
const ARCHITECTURES: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];
/// Environment variable that selects some of them, to compile in less time.
const CHOICE: &str = "CUDA_ARCHS";
/// The oldest supported nvcc.
const OLDEST: (u32, u32) = (12, 4);
const INSTALL: &str = "install the CUDA toolkit (12.4 or newer) and have nvcc in PATH, or set CUDA_HOME or NVCC";

fn main() {
    println!("cargo::rerun-if-changed=src/gpu/build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/gpu/kernels");
    for variable in ["NVCC", "CUDA_HOME", CHOICE] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(why) = compile() {
        why.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

fn compile() -> Result<(), String> {
    let (nvcc, (major, minor)) = nvcc()?;
    let known = architectures(&nvcc)?;
    let newest = known
        .last()
        .ok_or_else(|| format!("{} supports none of the architectures {ARCHITECTURES:?}", nvcc.display()))?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this with cargo")?);
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "--threads=0", "-Xptxas=-v", "src/gpu/kernels/all.cu", "-o"]);
    command.arg(out.join("kernels.fatbin"));
    command.args(known.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")));
    command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    let done = command.output().map_err(|err| format!("{}: {err}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        return Err(format!("{} cannot compile src/gpu/kernels/all.cu for {known:?}\n{said}", nvcc.display()));
    }
    // Registers and shared memory of each kernel, for `make check-cuda`.
    let report = out.join("kernels.txt");
    std::fs::write(&report, &*said).map_err(|err| format!("{}: {err}", report.display()))?;
    println!("cargo::rustc-env=NVCC_VERSION={major}.{minor}");
    Ok(())
}

/// Returns the first nvcc of $NVCC, $CUDA_HOME, $PATH and /usr/local/cuda that runs, and its version.
fn nvcc() -> Result<(PathBuf, (u32, u32)), String> {
    let given = std::env::var_os("NVCC").map(PathBuf::from);
    let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let places = [given, home, Some("nvcc".into()), Some("/usr/local/cuda/bin/nvcc".into())];
    let started = places.into_iter().flatten().find_map(|nvcc| {
        let said = Command::new(&nvcc).arg("--version").output().ok()?;
        said.status.success().then(|| (nvcc, String::from_utf8_lossy(&said.stdout).into_owned()))
    });
    let (nvcc, said) = started.ok_or_else(|| format!("the feature cuda needs nvcc: {INSTALL}"))?;
    let version =
        version(&said).ok_or_else(|| format!("{} --version does not name a release: {said}", nvcc.display()))?;
    if version < OLDEST {
        return Err(format!("{} is CUDA {}.{}, which is too old: {INSTALL}", nvcc.display(), version.0, version.1));
    }
    Ok((nvcc, version))
}

/// Parses the version in a line like `Cuda compilation tools, release 13.0, V13.0.88`.
fn version(said: &str) -> Option<(u32, u32)> {
    let (major, rest) = said.split_once("release ")?.1.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The architectures to compile for: the chosen ones, or all of [`ARCHITECTURES`] that this nvcc supports.
fn architectures(nvcc: &Path) -> Result<Vec<u32>, String> {
    let said =
        Command::new(nvcc).arg("--list-gpu-arch").output().map_err(|err| format!("{}: {err}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&said.stdout);
    let knows = |arch: &u32| said.lines().any(|line| line.trim() == format!("compute_{arch}"));
    let mut known: Vec<u32> = ARCHITECTURES.into_iter().filter(knows).collect();
    if let Ok(chosen) = std::env::var(CHOICE) {
        let wrong = |one: &str| format!("{CHOICE}: {one:?} is not one of {known:?}");
        let chosen =
            chosen.split_whitespace().map(|one| one.parse().ok().filter(|arch| known.contains(arch)).ok_or(wrong(one)));
        known = chosen.collect::<Result<_, _>>()?;
        known.sort_unstable();
    }
    Ok(known)
}
