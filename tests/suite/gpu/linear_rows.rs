use grpo_pipes::gpu::kernels::{linear_rows, splits, swiglu_rows};
use grpo_pipes::gpu::{Buffer, DynBuffer};
use grpo_pipes::numbers::dtype::Dtype;

use super::{DTYPES, gpu, numbers, rounded, rounding};
use crate::fixtures::distance;

/// y = x w^T in f64.
fn product(x: &[f32], w: &[f32], depth: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| -> f64 { x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum() };
    x.chunks_exact(depth).flat_map(|x| w.chunks_exact(depth).map(move |w| dot(x, w) as f32)).collect()
}

/// Sums of the parts, in order.
fn whole(parts: &[f32], len: usize) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    parts.chunks_exact(len).for_each(|part| sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part));
    sum
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn linear_rows_on_a_gpu() {
    let gpu = gpu();
    for [rows, width, depth] in [[1, 72, 200], [9, 40, 64], [17, 130, 328], [70, 65, 72]] {
        for dtype in DTYPES {
            let (x, w) = (rounded(dtype, &numbers(1, rows * depth)), rounded(dtype, &numbers(2, width * depth)));
            let (on_gpu, weight) =
                (DynBuffer::from_f32(&gpu, dtype, &x).unwrap(), DynBuffer::from_f32(&gpu, dtype, &w).unwrap());
            let out = Buffer::new(&gpu, splits(width, depth) * rows * width).unwrap();
            let got = linear_rows(&*gpu, (weight.at(0), &on_gpu), &out, [rows, width, depth]).unwrap();
            assert_eq!(got.splits, splits(width, depth));
            let off = distance(&whole(&out.to_vec().unwrap(), rows * width), &product(&x, &w, depth));
            assert!(off < 1e-6, "{rows} {width} {depth} {dtype:?}: {off}");
        }
    }
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn a_row_is_the_same_bits_in_any_batch_on_a_gpu() {
    let (gpu, width, depth) = (gpu(), 80, 392);
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let (x, w) = (numbers(1, 40 * depth), numbers(2, width * depth));
        let weight = DynBuffer::from_f32(&gpu, dtype, &w).unwrap();
        let of = |x: &[f32]| {
            let rows = x.len() / depth;
            let out = Buffer::new(&gpu, splits(width, depth) * rows * width).unwrap();
            let x = DynBuffer::from_f32(&gpu, dtype, x).unwrap();
            linear_rows(&*gpu, (weight.at(0), &x), &out, [rows, width, depth]).unwrap();
            whole(&out.to_vec().unwrap(), rows * width)
        };
        let all = of(&x);
        for rows in [1, 8, 13] {
            assert_eq!(of(&x[..rows * depth]), all[..rows * width], "{dtype:?}, {rows} rows");
        }
    }
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn swiglu_rows_on_a_gpu() {
    let gpu = gpu();
    for [rows, width, depth] in [[3, 40, 72], [20, 24, 136], [9, 8, 904], [65, 33, 904]] {
        for dtype in DTYPES {
            let (x, w) = (rounded(dtype, &numbers(3, rows * depth)), rounded(dtype, &numbers(4, 2 * width * depth)));
            let (gate, up) = (product(&x, &w[..width * depth], depth), product(&x, &w[width * depth..], depth));
            let (gate, up) = (rounded(dtype, &gate), rounded(dtype, &up)); // as training keeps them
            let want: Vec<f32> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            let (on_gpu, weight) =
                (DynBuffer::from_f32(&gpu, dtype, &x).unwrap(), DynBuffer::from_f32(&gpu, dtype, &w).unwrap());
            let out = DynBuffer::new(&gpu, dtype, rows * width).unwrap();
            swiglu_rows(&*gpu, (weight.at(0), &on_gpu), &out, [rows, width, depth]).unwrap();
            let off = distance(&out.to_vec().unwrap(), &want);
            assert!(off < 2.5 * rounding(dtype), "{rows} {width} {depth} {dtype:?}: {off}");
        }
    }
}

#[test]
fn splits_fill_a_card_and_leave_no_part_empty() {
    for (width, depth, wanted) in [(1152, 896, 7), (896, 896, 7), (896, 4864, 9), (151_936, 896, 1), (64, 64, 1)] {
        assert_eq!(splits(width, depth), wanted);
        let stages = usize::div_ceil(depth, 64);
        assert!((wanted - 1) * stages.div_ceil(wanted) < stages, "the last part has something to do");
    }
}
