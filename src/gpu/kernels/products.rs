//! Matrix products with a weight by the GPU's library: forward, and the gradients of the input and of the weight.

use crate::error::Result;
use crate::gpu::driver::{Address, Driver, Matrix, MatrixProduct};
use crate::numbers::dtype::Dtype;

/// `out (m, n)` = `x (m, k)` times the transpose of `weight (n, k)`.
///
/// # Errors
/// [`crate::Error::Device`], as for all wrappers in this module.
pub fn linear(driver: &dyn Driver, x: Matrix, weight: Matrix, out: Matrix, shape: [usize; 3]) -> Result<()> {
    let product = MatrixProduct { a: x, a_transposed: false, b: weight, b_transposed: true, out, shape, beta: 0.0 };
    // SAFETY: the caller's matrices have the shapes above.
    unsafe { driver.multiply(&product) }
}

/// `dx (rows, in)` = `dy (rows, out)` times `weight (out, in)`; the shape is rows, out, in.
///
/// # Errors
/// As [`linear`].
pub fn input_gradient(
    driver: &dyn Driver,
    dy: Matrix,
    weight: Matrix,
    dx: Matrix,
    [rows, out, input]: [usize; 3],
) -> Result<()> {
    let shape = [rows, input, out];
    let product =
        MatrixProduct { a: dy, a_transposed: false, b: weight, b_transposed: false, out: dx, shape, beta: 0.0 };
    // SAFETY: the caller's matrices have the shapes above.
    unsafe { driver.multiply(&product) }
}

/// `dw (out, in)` += the transpose of `dy (rows, out)` times `x (rows, in)`, in f32; the shape is rows, out, in.
///
/// # Errors
/// As [`linear`].
pub fn weight_gradient(
    driver: &dyn Driver,
    dy: Matrix,
    x: Matrix,
    dw: Address,
    [rows, out, input]: [usize; 3],
) -> Result<()> {
    let (dw, shape) = (Matrix { at: dw, stride: input, dtype: Dtype::F32 }, [out, input, rows]);
    let product = MatrixProduct { a: dy, a_transposed: true, b: x, b_transposed: false, out: dw, shape, beta: 1.0 };
    // SAFETY: the caller's matrices have the shapes above.
    unsafe { driver.multiply(&product) }
}
