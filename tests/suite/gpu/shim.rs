//! A [`Driver`] that runs the kernels' source on the CPU: `tests/shim/` compiled with sanitizers, products as plain loops.

#![allow(unsafe_code)] // calls into the shim

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CString, OsStr, c_char, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};

use grpo_pipes::gpu::driver::{
    Address, Argument, Driver, Grid, IpcHandle, Mark, Matrix, MatrixProduct, Memory, PinnedMemory, Recording,
};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::{Error, Result};
use libloading::Library;

/// `Err` says why the kernels cannot be compiled here.
pub fn library() -> std::result::Result<PathBuf, String> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    BUILT.get_or_init(build).clone()
}

fn build() -> std::result::Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("libshim-{}.so", std::process::id()));
    let mut command = Command::new(&compiler);
    command.args(["-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-ffp-contract=off", "-mfma", "-mf16c"]);
    command.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror"]);
    command.args(["-Wno-unknown-pragmas", "-Wno-unused-function", "-x", "c++"]).arg("-I").arg(root.join("tests/shim"));
    command.arg(root.join("src/gpu/kernels/all.cu")).arg(root.join("tests/shim/shim.cpp")).arg("-o").arg(&out);
    match command.output() {
        Err(err) => Err(format!("{compiler}: {err}")),
        Ok(done) if done.status.success() => Ok(out),
        Ok(done) => panic!("{compiler}: {}", String::from_utf8_lossy(&done.stderr)),
    }
}

/// The library that must be loaded before all others for AddressSanitizer to work.
pub fn sanitizer() -> Option<String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let said = Command::new(compiler).arg("-print-file-name=libasan.so").output().ok()?;
    let path = String::from_utf8(said.stdout).ok()?.trim().to_owned();
    Path::new(&path).is_absolute().then_some(path)
}

type Launch =
    unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, usize, *mut *mut c_void, *const c_uint, c_uint);

/// `Matrix` as shim.cpp takes it.
#[repr(C)]
struct Operand {
    at: u64,
    stride: u64,
    /// Starts with f3, bf or f1.
    dtype: *const c_char,
    turned: c_uint,
}

type Multiply = unsafe extern "C" fn(*const Operand, *const Operand, *const Operand, u64, u64, u64, f32);

/// The CPU as a GPU.
pub struct Shim {
    library: Library,
    recording: Mutex<Option<Vec<Call>>>,
    /// Bytes of what is allocated.
    allocated: Mutex<HashMap<u64, usize>>,
}

/// Of its memory [bytes].
const MEMORY: usize = 1 << 30;

enum Call {
    Launch(CString, Grid, Vec<Argument>),
    MatrixProduct(MatrixProduct),
    Copy(Address, Address, usize),
    Clear(Address, usize),
}

impl Shim {
    /// Loads what [`library`] made.
    pub fn new(path: &OsStr) -> Self {
        // SAFETY: ours; its start only fills a table.
        let library = unsafe { Library::new(path) }.unwrap();
        Self { library, recording: Mutex::new(None), allocated: Mutex::default() }
    }

    /// The fibers are one set for the process.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(|broken| broken.into_inner())
    }

    fn do_or_record(&self, call: Call) {
        match &mut *self.recording.lock().unwrap() {
            Some(calls) => calls.push(call),
            None => self.perform(&call),
        }
    }

    fn perform(&self, call: &Call) {
        match call {
            Call::Launch(kernel, grid, arguments) => self.run(kernel, grid, arguments),
            Call::MatrixProduct(product) => self.multiply(product),
            // SAFETY: the tests' own memory, which AddressSanitizer watches.
            Call::Copy(to, from, bytes) => unsafe {
                std::ptr::copy(from.0 as *const u8, to.0 as *mut u8, *bytes);
            },
            // SAFETY: as above.
            Call::Clear(at, bytes) => unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, *bytes) },
        }
    }

    fn multiply(&self, product: &MatrixProduct) {
        let matrix = |matrix: &Matrix, turned: bool| Operand {
            at: matrix.at.0,
            stride: matrix.stride as u64,
            dtype: matrix.dtype.name().as_ptr().cast(),
            turned: turned.into(),
        };
        let (a, b) = (matrix(&product.a, product.a_transposed), matrix(&product.b, product.b_transposed));
        let (out, [m, n, k]) = (matrix(&product.out, false), product.shape.map(|length| length as u64));
        // SAFETY: the signature of shim.cpp.
        unsafe { self.library.get::<Multiply>(b"shim_multiply").unwrap()(&a, &b, &out, m, n, k, product.beta) }
    }

    fn run(&self, kernel: &CString, grid: &Grid, arguments: &[Argument]) {
        let mut bits: Vec<u64> = arguments.iter().map(|one| one.bits().0).collect();
        let sizes: Vec<c_uint> = arguments.iter().map(|one| one.bits().1 as c_uint).collect();
        let mut pointers: Vec<*mut c_void> = bits.iter_mut().map(|bits| (bits as *mut u64).cast()).collect();
        let _alone = Self::alone();
        // SAFETY: the signature of shim.cpp; sizes and count are checked there.
        unsafe {
            let launch = self.library.get::<Launch>(b"shim_launch").unwrap();
            let (blocks, count) = (grid.blocks.as_ptr(), sizes.len() as c_uint);
            let shared = grid.shared as usize;
            launch(kernel.as_ptr(), blocks, grid.threads, shared, pointers.as_mut_ptr(), sizes.as_ptr(), count);
        }
    }
}

impl Driver for Shim {
    fn name(&self) -> String {
        super::SHIM.into()
    }

    fn supports(&self, _: Dtype) -> bool {
        true
    }

    fn memory(&self) -> Result<Memory> {
        let held = self.allocated.lock().unwrap().values().sum();
        Ok(Memory { free: MEMORY - held, all: MEMORY, held })
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        // SAFETY: the signature of shim.cpp.
        let at = unsafe { self.library.get::<unsafe extern "C" fn(usize) -> u64>(b"shim_allocate").unwrap()(bytes) };
        self.allocated.lock().unwrap().insert(at, bytes);
        Ok(Address(at))
    }

    unsafe fn release(&self, at: Address) {
        self.allocated.lock().unwrap().remove(&at.0);
        // SAFETY: as above; AddressSanitizer reports what was not allocated.
        unsafe { self.library.get::<unsafe extern "C" fn(u64)>(b"shim_release").unwrap()(at.0) }
    }

    fn allocate_shareable(&self, bytes: usize) -> Result<Address> {
        self.allocate(bytes)
    }

    fn ipc_handle(&self, Address(of): Address) -> Result<IpcHandle> {
        let gpu = format!("process {}", std::process::id());
        Ok(IpcHandle { gpu, handle: format!("{:x}", of - 64), offset: 64 })
    }

    fn open_ipc_handle(&self, handle: &IpcHandle) -> Result<Address> {
        match u64::from_str_radix(&handle.handle, 16) {
            Ok(base) if handle.gpu == self.ipc_handle(Address(64))?.gpu => Ok(Address(base + handle.offset)),
            _ => Err(Error::Device("another GPU's".into())),
        }
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<PinnedMemory> {
        let memory = Box::leak(vec![0u8; bytes].into_boxed_slice());
        Ok(PinnedMemory { at: Address(memory.as_ptr() as u64), host: memory.as_ptr() as usize, bytes })
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        // SAFETY: the tests' own memory.
        unsafe { std::ptr::copy(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { std::ptr::copy(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.do_or_record(Call::Copy(to, from, bytes));
        Ok(())
    }

    unsafe fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.do_or_record(Call::Clear(at, bytes));
        Ok(())
    }

    unsafe fn launch(&self, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
        self.do_or_record(Call::Launch(CString::new(kernel).unwrap(), grid, arguments.to_vec()));
        Ok(())
    }

    unsafe fn multiply(&self, product: &MatrixProduct) -> Result<()> {
        assert!(product.is_supported(), "{product:?}");
        self.do_or_record(Call::MatrixProduct(*product));
        Ok(())
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Recording> {
        *self.recording.lock().unwrap() = Some(Vec::new());
        let outcome = work();
        let calls = self.recording.lock().unwrap().take().unwrap();
        outcome.map(|()| Box::new(calls) as Box<dyn Any + Send>)
    }

    unsafe fn replay(&self, recording: &Recording) -> Result<()> {
        recording.downcast_ref::<Vec<Call>>().unwrap().iter().for_each(|call| self.perform(call));
        Ok(())
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Box::new(()))
    }

    fn wait(&self, _: &Mark) -> Result<()> {
        Ok(())
    }

    fn seconds_between(&self, _: &Mark, _: &Mark) -> Result<f64> {
        Ok(0.0)
    }
}
