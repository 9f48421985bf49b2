//! Finds the driver's library and cuBLASLt at run time. Nothing is linked, so a binary with CUDA also starts on a machine without.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use cudarc::{cublaslt, driver};
use libloading::Library;

use crate::error::{Error, Result};

/// The versions that were tested, the newest first.
const CUBLASLT: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// Checks that both libraries can be opened. cudarc opens them at the first call, and panics if it cannot.
///
/// # Errors
/// [`Error::Device`] with the missing library and what to do about it.
pub fn open() -> Result<()> {
    // SAFETY: opens and closes the driver's library, whose initialisation has no side effects.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(Error::Device("no NVIDIA driver on this machine (libcuda.so.1 is not found)".into()));
    }
    let directories = directories(|name| std::env::var_os(name));
    if cublaslt_is_present() || (hold_cublaslt(&directories) && cublaslt_is_present()) {
        return Ok(());
    }
    Err(Error::Device(format!(
        "{} is not found: install the CUDA toolkit, or nvidia-cublas into a Python environment, and set CUDA_HOME, VIRTUAL_ENV or \
         LD_LIBRARY_PATH to where it is",
        CUBLASLT.join(" or ")
    )))
}

fn cublaslt_is_present() -> bool {
    // SAFETY: as for the driver's library.
    unsafe { cublaslt::sys::is_culib_present() }
}

/// Opens cuBLASLt by its full path and never closes it, so that the loader also finds it by its name alone.
fn hold_cublaslt(directories: &[PathBuf]) -> bool {
    let places = directories.iter().flat_map(|directory| CUBLASLT.iter().map(move |name| directory.join(name)));
    // SAFETY: as for the driver's library.
    let held = places.into_iter().find_map(|path| unsafe { Library::new(path) }.ok());
    held.map(std::mem::forget).is_some()
}

/// Directories in which toolkits and Python packages install libraries that the loader does not search.
fn directories(environment: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let toolkits = environment("CUDA_HOME").map(PathBuf::from).into_iter().chain([PathBuf::from("/usr/local/cuda")]);
    let mut all: Vec<PathBuf> = toolkits.map(|toolkit| toolkit.join("lib64")).collect();
    if let Some(python) = environment("VIRTUAL_ENV") {
        for version in entries(&Path::new(&python).join("lib")) {
            let packages = entries(&version.join("site-packages/nvidia"));
            all.extend(packages.into_iter().map(|package| package.join("lib")).filter(|lib| lib.is_dir()));
        }
    }
    all
}

/// The sorted entries of a directory; none if it cannot be read.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let found = std::fs::read_dir(directory).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = found.collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toolkits_and_python_environments_are_looked_through() {
        let python = tempfile::tempdir().unwrap();
        let nvidia = python.path().join("lib/python3.12/site-packages/nvidia");
        for package in ["cublas/lib", "cu13/lib", "no_libraries"] {
            std::fs::create_dir_all(nvidia.join(package)).unwrap();
        }
        let given = |name: &str| match name {
            "CUDA_HOME" => Some("/opt/toolkit".into()),
            "VIRTUAL_ENV" => Some(python.path().into()),
            _ => None,
        };
        let own = ["/opt/toolkit/lib64", "/usr/local/cuda/lib64"].map(PathBuf::from);
        let packages = ["cu13/lib", "cublas/lib"].map(|package| nvidia.join(package));
        assert_eq!(directories(given), [&own[..], &packages].concat());
        assert_eq!(directories(|_| None), [PathBuf::from("/usr/local/cuda/lib64")]);
    }

    #[test]
    fn a_library_held_by_its_path_is_found_by_its_name() {
        let toolkit = tempfile::tempdir().unwrap();
        if cublaslt_is_present() {
            return; // with or without us
        }
        let library = toolkit.path().join(CUBLASLT[0]);
        let mut compiler = std::process::Command::new("cc");
        compiler.args(["-shared", "-nostdlib", "-x", "c", "/dev/null", "-o"]).arg(&library);
        let made = compiler.arg(format!("-Wl,-soname,{}", CUBLASLT[0])).status();
        if !made.is_ok_and(|made| made.success()) {
            return; // no C compiler
        }
        assert!(!hold_cublaslt(&["no/such/directory".into()]) && !cublaslt_is_present());
        assert!(hold_cublaslt(&["no/such/directory".into(), toolkit.path().into()]) && cublaslt_is_present());
    }
}
