//! Multiplies matrices with cuBLASLt.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver;

use super::context::{Context, failed};
use crate::error::{Error, Result};
use crate::gpu::columns::{ColumnMajorMatrix, ColumnMajorProduct};
use crate::gpu::driver::{Address, MatrixProduct};
use crate::numbers::dtype::Dtype;

/// What the library's documentation advises for Hopper (bytes); older GPUs need less.
const WORKSPACE: usize = 32 << 20;

/// The library's kernels gain nothing from a larger alignment, and a result must not depend on where a buffer happens to lie.
const BEST_ALIGNMENT: u64 = 16;

/// The library's handle, and one algorithm per kind of product, chosen once so that a repeated run gives the same bits.
pub struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: driver::sys::CUdeviceptr,
    plans: Mutex<HashMap<(ColumnMajorProduct, [u64; 3]), PlannedProduct>>,
}

// SAFETY: handle and descriptors may be used by any thread on which the context is current.
unsafe impl Send for Products {}
// SAFETY: as above; the plans are changed under a lock.
unsafe impl Sync for Products {}

impl Products {
    /// Opens the library in the current context.
    pub fn new() -> Result<Self> {
        let handle = result::create_handle().map_err(|err| Error::Device(format!("GPU: starting cuBLASLt: {err}")))?;
        // SAFETY: freed when dropped.
        let workspace = unsafe { driver::result::malloc_sync(WORKSPACE) };
        let workspace = workspace.map_err(failed("making room for the products' workspace"))?;
        Ok(Self { handle, workspace, plans: Mutex::default() })
    }

    /// Queues a product in the context's stream; the context is current.
    pub fn multiply(&self, context: &Context, product: &MatrixProduct) -> Result<()> {
        let wrong = |err: CublasError| {
            let ([m, n, k], of, to) = (product.shape, product.a.dtype.name(), product.out.dtype.name());
            Error::Device(format!("GPU: product of ({m}, {k}) and ({k}, {n}) of {of} into {to}: {err}"))
        };
        let matrices = [&product.b, &product.a, &product.out];
        let columns = ColumnMajorProduct::new(product);
        let alignments = matrices.map(|matrix| 1 << matrix.at.0.trailing_zeros().min(BEST_ALIGNMENT.trailing_zeros()));
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry((columns, alignments)) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(room) => room.insert(PlannedProduct::new(self.handle, &columns, alignments).map_err(wrong)?),
        };
        let [first, second, out] = matrices.map(|matrix| pointer(matrix.at));
        let [first_layout, second_layout, out_layout] = plan.layouts.each_ref().map(|layout| layout.0);
        let (alpha, beta) = (1.0f32, product.beta);
        // SAFETY: the caller of `Driver::multiply` promises the operands; scales are read before this returns, and all else lives as long
        // as `self`.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                first,
                first_layout,
                second,
                second_layout,
                out,
                out_layout,
                out.cast_mut(),
                out_layout,
                &raw const plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                context.stream.cast(),
            )
        }
        .map_err(wrong)
    }

    /// Frees everything; the context is current and idle.
    pub fn close(&self) {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: made by `new`, and no longer used.
        unsafe {
            let _ = result::destroy_handle(self.handle);
            let _ = driver::result::free_sync(self.workspace);
        }
    }
}

/// How one kind of product is computed.
struct PlannedProduct {
    operation: Operation,
    layouts: [OperandLayout; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Which factors are transposed, and the type of the sums.
struct Operation(sys::cublasLtMatmulDesc_t);

/// The shape of a matrix.
struct OperandLayout(sys::cublasLtMatrixLayout_t);

/// What an algorithm must respect.
struct Preference(sys::cublasLtMatmulPreference_t);

impl PlannedProduct {
    fn new(
        handle: sys::cublasLtHandle_t,
        columns: &ColumnMajorProduct,
        alignments: [u64; 3],
    ) -> std::result::Result<Self, CublasError> {
        let operation = Operation::new(columns)?;
        let layouts = [
            OperandLayout::new(&columns.first)?,
            OperandLayout::new(&columns.second)?,
            OperandLayout::new(&columns.out)?,
        ];
        let preference = Preference::new(alignments)?;
        let [first, second, out] = layouts.each_ref().map(|layout| layout.0);
        // SAFETY: all were just made.
        let found =
            unsafe { result::get_matmul_algo_heuristic(handle, operation.0, first, second, out, out, preference.0) }?;
        Ok(Self { operation, layouts, algorithm: found.algo })
    }
}

impl Operation {
    fn new(columns: &ColumnMajorProduct) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA as FIRST, CUBLASLT_MATMUL_DESC_TRANSB as SECOND,
        };
        // f32 is f32, without TensorFloat-32; 16-bit factors are summed in f32.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = Self(result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?);
        for (attribute, operand) in [(FIRST, &columns.first), (SECOND, &columns.second)] {
            // cublasOperation_t: as it is stored, or transposed.
            let operation = i32::from(operand.transposed);
            // SAFETY: the attribute's type is int32_t.
            unsafe { result::set_matmul_desc_attribute(description.0, attribute, (&raw const operation).cast(), 4) }?;
        }
        Ok(description)
    }
}

impl OperandLayout {
    fn new(operand: &ColumnMajorMatrix) -> std::result::Result<Self, CublasError> {
        let dtype = match operand.dtype {
            Dtype::F32 => sys::cudaDataType::CUDA_R_32F,
            Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Dtype::F16 => sys::cudaDataType::CUDA_R_16F,
        };
        let (rows, columns) = (operand.rows as u64, operand.columns as u64);
        result::create_matrix_layout(dtype, rows, columns, operand.stride as i64).map(Self)
    }
}

impl Preference {
    fn new(alignments: [u64; 3]) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(result::create_matmul_pref()?);
        let (bytes, set) = (WORKSPACE as u64, result::set_matmul_pref_attribute);
        let workspace = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute's type is uint64_t.
        unsafe { set(preference.0, workspace, (&raw const bytes).cast(), 8) }?;
        let [first, second, out] = alignments.map(|alignment| alignment as u32);
        let operands = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, first),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, second),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ];
        for (attribute, alignment) in operands {
            // SAFETY: the attribute's type is uint32_t.
            unsafe { set(preference.0, attribute, (&raw const alignment).cast(), 4) }?;
        }
        Ok(preference)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Drop for OperandLayout {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn pointer(at: Address) -> *const c_void {
    at.0 as *const c_void
}
