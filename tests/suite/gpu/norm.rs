use grpo_pipes::gpu::kernels::{Partial, add_norm};
use grpo_pipes::gpu::{Buffer, Numbers};

use super::{DTYPES, gpu, numbers, rounding};
use crate::fixtures::distance;

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn add_norm_on_a_gpu() {
    let gpu = gpu();
    for (case, &[rows, width, splits]) in [[3, 896, 2], [1, 8, 0], [5, 264, 7]].iter().enumerate() {
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
            let (on_gpu, sums) = (Buffer::of(&gpu, &x).unwrap(), Buffer::of(&gpu, &partial).unwrap());
            let (weight, normed) =
                (Buffer::of(&gpu, &weight).unwrap(), Numbers::new(&gpu, dtype, rows * width).unwrap());
            let norm = (weight.at(0), 1e-6);
            add_norm(&*gpu, &on_gpu, Partial { sums: &sums, splits }, norm, &normed, [rows, width]).unwrap();
            assert_eq!(on_gpu.to_vec().unwrap(), stream, "added in order");
            assert!(distance(&normed.to_vec().unwrap(), &want) < rounding(dtype));
        }
    }
}
