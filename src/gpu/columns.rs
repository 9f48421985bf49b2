//! Converts row-major products to column-major ones, which cuBLAS computes. A row-major matrix is the transpose of a column-major one.

use crate::gpu::driver::{Matrix, MatrixProduct};
use crate::numbers::dtype::Dtype;

/// A column-major matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ColumnMajorMatrix {
    /// Rows as stored: numbers per column.
    pub rows: usize,
    /// Columns as stored.
    pub columns: usize,
    /// Numbers from one column to the next.
    pub stride: usize,
    /// The type of the numbers.
    pub dtype: Dtype,
    /// Whether the product takes it transposed.
    pub transposed: bool,
}

/// The transpose of a [`MatrixProduct`]: `out^T (n, m) = b^T (n, k) a^T (k, m)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ColumnMajorProduct {
    /// b.
    pub first: ColumnMajorMatrix,
    /// a.
    pub second: ColumnMajorMatrix,
    /// `(n, m)`.
    pub out: ColumnMajorMatrix,
}

impl ColumnMajorProduct {
    /// Converts a row-major product.
    pub fn new(product: &MatrixProduct) -> Self {
        let [m, n, k] = product.shape;
        Self {
            first: matrix(&product.b, [k, n], product.b_transposed),
            second: matrix(&product.a, [m, k], product.a_transposed),
            out: matrix(&product.out, [m, n], false),
        }
    }
}

/// `shape` is (rows, columns) of the factor; `transposed` says that its transpose is stored.
fn matrix(matrix: &Matrix, shape: [usize; 2], transposed: bool) -> ColumnMajorMatrix {
    let [stored_rows, stored_columns] = if transposed { [shape[1], shape[0]] } else { shape };
    ColumnMajorMatrix {
        rows: stored_columns,
        columns: stored_rows,
        stride: matrix.stride,
        dtype: matrix.dtype,
        transposed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::driver::Address;

    /// The number that BLAS reads at row `i`, column `j` of a factor.
    fn factor(numbers: &[f64], operand: &ColumnMajorMatrix, i: usize, j: usize) -> f64 {
        let [row, column] = if operand.transposed { [j, i] } else { [i, j] };
        assert!(row < operand.rows && column < operand.columns, "({row}, {column}) of {operand:?}");
        numbers[column * operand.stride + row]
    }

    #[test]
    fn blas_computes_the_same_product_whichever_factor_is_stored_transposed() {
        let [m, n, k] = [2, 3, 4];
        let numbers = |seed: usize| -> Vec<f64> { (0..40).map(|i| ((seed * 31 + i * i * 7) % 11) as f64).collect() };
        let (a, b) = (numbers(1), numbers(2));
        for (a_transposed, b_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a_stride, b_stride, out_stride) =
                (if a_transposed { m } else { k } + 1, if b_transposed { k } else { n } + 2, n + 3);
            let matrix = |stride| Matrix { at: Address(0), stride, dtype: Dtype::F32 };
            let [a_matrix, b_matrix, out] = [a_stride, b_stride, out_stride].map(matrix);
            let product = MatrixProduct {
                a: a_matrix,
                a_transposed,
                b: b_matrix,
                b_transposed,
                out,
                shape: [m, n, k],
                beta: 0.0,
            };
            let ColumnMajorProduct { first, second, out } = ColumnMajorProduct::new(&product);
            assert_eq!((out.rows, out.columns, out.stride, out.transposed), (n, m, out_stride, false));
            for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
                let in_a = |l| if a_transposed { a[l * a_stride + row] } else { a[row * a_stride + l] };
                let in_b = |l| if b_transposed { b[column * b_stride + l] } else { b[l * b_stride + column] };
                let want: f64 = (0..k).map(|l| in_a(l) * in_b(l)).sum();
                // Row `row` of ours is column `row` of theirs.
                let got: f64 = (0..k).map(|l| factor(&b, &first, column, l) * factor(&a, &second, l, row)).sum();
                assert_eq!(got, want, "{a_transposed} {b_transposed}");
            }
        }
    }
}
