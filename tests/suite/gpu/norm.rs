use grpo_pipes::gpu::kernels::{
    BLOCKS, ColumnSum, ModelShape, NormBackward, NormGradient, PartialSums, add_norm, norm_backward,
};
use grpo_pipes::gpu::{Buffer, DynBuffer};

use super::{DTYPES, gpu, numbers, rounding};
use crate::fixtures::distance;

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn add_norm_on_a_gpu() {
    let gpu = gpu();
    for (case, &[rows, width, splits]) in
        [[3, 896, 2], [1, 8, 0], [5, 264, 7], [2, 1032, 11], [2, 2048, 0]].iter().enumerate()
    {
        for dtype in DTYPES {
            let (x, weight) = (numbers(case as u64, rows * width), numbers(77, width));
            let partial = numbers(99 + case as u64, splits * rows * width);
            let mut stream = x.clone();
            for part in partial.chunks_exact(rows * width) {
                stream.iter_mut().zip(part).for_each(|(x, part)| *x += part);
            }
            let want: Vec<f32> = stream
                .chunks_exact(width)
                .flat_map(|row| {
                    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                    row.iter().zip(&weight).map(move |(x, w)| (f64::from(x * w) / (mean + 1e-6).sqrt()) as f32)
                })
                .collect();
            let (on_gpu, sums) = (Buffer::from_slice(&gpu, &x).unwrap(), Buffer::from_slice(&gpu, &partial).unwrap());
            let (weight, normed) =
                (Buffer::from_slice(&gpu, &weight).unwrap(), DynBuffer::new(&gpu, dtype, rows * width).unwrap());
            let norm = (weight.at(0), 1e-6);
            add_norm(&*gpu, &on_gpu, PartialSums { sums: &sums, splits }, norm, &normed, [rows, width]).unwrap();
            assert_eq!(on_gpu.to_vec().unwrap(), stream, "added in order");
            assert!(distance(&normed.to_vec().unwrap(), &want) < rounding(dtype));
        }
    }
}

/// Gradients of x's rows and of the weight.
fn plain(x: &[f32], d_normed: &[f32], weight: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (width, mut dx, mut d_weight) = (weight.len(), Vec::new(), vec![0.0; weight.len()]);
    for (x, dy) in x.chunks_exact(width).zip(d_normed.chunks_exact(width)) {
        let of = |i: usize| [x[i], dy[i], weight[i]].map(f64::from);
        let scale = ((0..width).map(|i| of(i)[0].powi(2)).sum::<f64>() / width as f64 + 1e-6).powf(-0.5);
        let along = (0..width).map(|i| of(i).iter().product::<f64>()).sum::<f64>() * scale.powi(3) / width as f64;
        for (i, sum) in d_weight.iter_mut().enumerate() {
            let [x, dy, w] = of(i);
            *sum += dy * scale * x;
            dx.push((dy * w * scale - along * x) as f32);
        }
    }
    (dx, d_weight.into_iter().map(|sum| sum as f32).collect())
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn norm_backward_on_a_gpu() {
    let gpu = gpu();
    // Of rows to no warp, to one, to each and to each several; of widths held in registers or not, and of few warps a block.
    for (case, [rows, width]) in
        [[1, 896], [37, 264], [4500, 8], [19, 1032], [7, 4096], [3, 8192]].into_iter().enumerate()
    {
        let shape =
            ModelShape { width, mlp: 8, vocabulary: 8, heads: 1, kv_heads: 1, dim: 16, normed_qk: 0, epsilon: 1e-6 };
        let [x, d_normed, before] = [1, 2, 3].map(|seed| numbers(10 * case as u64 + seed, rows * width));
        let (weight, sum_before) = (numbers(88, width), numbers(89, width));
        let (want, want_sum) = plain(&x, &d_normed, &weight);
        let want_sum: Vec<f32> = want_sum.iter().zip(&sum_before).map(|(sum, before)| sum + before).collect();
        let added: Vec<f32> = want.iter().zip(&before).map(|(dx, before)| dx + before).collect();
        let weight = Buffer::from_slice(&gpu, &weight).unwrap();
        let partial = Buffer::new(&gpu, BLOCKS * width).unwrap();
        for dtype in DTYPES {
            // The rows of x lie the other way round where there is an index.
            let turned: Vec<f32> = x.chunks_exact(width).rev().flatten().copied().collect();
            let index: Vec<u32> = (0..rows as u32).rev().collect();
            let (turned, index) =
                (Buffer::from_slice(&gpu, &turned).unwrap(), Buffer::from_slice(&gpu, &index).unwrap());
            let in_order = Buffer::from_slice(&gpu, &x).unwrap();
            let dy = Buffer::from_slice(&gpu, &d_normed).unwrap();
            let (dx, d) =
                (Buffer::from_slice(&gpu, &before).unwrap(), DynBuffer::new(&gpu, dtype, rows * width).unwrap());
            let into = NormGradient::Added(&dx, &d);
            for (x, index, into) in [(&in_order, None, into), (&turned, Some(&index), NormGradient::Place)] {
                let sum = Buffer::from_slice(&gpu, &sum_before).unwrap();
                let d_weight = ColumnSum { partial: &partial, to: sum.at(0) };
                let norm = NormBackward { x, index, weight: weight.at(0), d_weight };
                norm_backward(&*gpu, &norm, (&dy, rows), into, (&shape, dtype)).unwrap();
                assert!(distance(&sum.to_vec().unwrap(), &want_sum) < 2e-6, "{rows} of {width}");
            }
            assert!(distance(&dx.to_vec().unwrap(), &added) < 1e-6, "{rows} of {width}");
            assert!(distance(&d.to_vec().unwrap(), &added) < rounding(dtype), "{rows} of {width}");
            assert!(distance(&dy.to_vec().unwrap(), &want) < 1e-6, "{rows} of {width}");
        }
    }
}
