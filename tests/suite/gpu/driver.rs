//! What a [`Driver`] promises, one thing per test: the first tests to run on a GPU that has not been tried.

#![allow(unsafe_code)] // calls of the driver on the tests' own buffers

use std::sync::Arc;

use bytemuck::cast_slice;
use grpo_pipes::Error;
use grpo_pipes::gpu::driver::{Argument, Driver, Grid, MatrixProduct, Memory};
use grpo_pipes::gpu::{Buffer, DynBuffer};
use grpo_pipes::numbers::dtype::Dtype;

use super::{DTYPES, gpu, numbers};

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn bytes_go_there_and_back_on_a_gpu() {
    let gpu = gpu();
    let Memory { free, all, held } = gpu.memory().unwrap();
    assert!(!gpu.name().is_empty() && 0 < free && free + held <= all);
    let sent: Vec<u8> = (0..1003).map(|i| (i % 251) as u8).collect();
    let (one, other) = (Buffer::from_slice(&gpu, &sent).unwrap(), Buffer::<u8>::zeros(&gpu, 1003).unwrap());
    assert_eq!(one.at(0).0 % 256, 0, "aligned");
    assert_eq!(one.to_vec().unwrap(), sent);
    // SAFETY: within the buffers above.
    unsafe { gpu.copy(other.at(3), one.at(1), 997) }.unwrap();
    // SAFETY: within the buffers above.
    unsafe { gpu.clear(other.at(10), 5) }.unwrap();
    other.upload(1001, &[7, 8]).unwrap();
    // SAFETY: within the buffers above.
    unsafe { gpu.copy(other.at(0), one.at(0), 0) }.unwrap();
    // SAFETY: within the buffers above.
    unsafe { gpu.clear(other.at(3), 0) }.unwrap();
    let mut want = [&[0; 3], &sent[1..998], &[0, 7, 8]].concat();
    want[10..15].fill(0);
    assert_eq!(other.to_vec().unwrap(), want);
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn memory_that_there_is_not_is_refused_with_numbers_on_a_gpu() {
    let gpu = gpu();
    let all = gpu.memory().unwrap().all;
    if gpu.name() != super::SHIM {
        let Err(Error::Device(what)) = gpu.allocate(2 * all) else { panic!("given") };
        assert!(what.contains("GiB are free"), "{what}");
    }
    // And given back it can be had again, many times over.
    for _ in 0..64 {
        Buffer::<u8>::new(&gpu, all / 8).unwrap();
    }
}

/// `(rows, width)` in rows of `width + gap` numbers, the gap and all before `from` set to 9.
fn placed(gpu: &Arc<dyn Driver>, dtype: Dtype, of: &[f32], [width, gap, from]: [usize; 3]) -> DynBuffer {
    let rows = of.chunks_exact(width).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(9.0, gap)));
    let all: Vec<f32> = std::iter::repeat_n(9.0, from).chain(rows).collect();
    DynBuffer::from_f32(gpu, dtype, &all).unwrap()
}

/// What is stored of `numbers`, turned `(rows, width)` to `(width, rows)` where asked.
fn turned(numbers: &[f32], width: usize, turned: bool) -> Vec<f32> {
    let rows = numbers.len() / width;
    if turned { (0..numbers.len()).map(|i| numbers[i % rows * width + i / rows]).collect() } else { numbers.to_vec() }
}

/// Numbers of a few bits each: exact in every type.
fn eighths(seed: u64, len: usize) -> Vec<f32> {
    numbers(seed, len).iter().map(|x| (x * 8.0).round() / 8.0).collect()
}

/// Largest difference of a product from plain loops, where `out` held `before`; nothing between its rows may change.
fn product_error(
    gpu: &Arc<dyn Driver>,
    (factors, to): (Dtype, Dtype),
    [m, n, k]: [usize; 3],
    [a_transposed, b_transposed, add]: [bool; 3],
    shift: usize,
) -> f64 {
    let seed = (m * n + k) as u64;
    let (a, b, before) = (eighths(seed, m * k), eighths(seed + 1, k * n), eighths(seed + 2, m * n));
    let (a_width, b_width, gap) = (if a_transposed { m } else { k }, if b_transposed { k } else { n }, shift);
    let a_stored = placed(gpu, factors, &turned(&a, k, a_transposed), [a_width, gap, shift]);
    let b_stored = placed(gpu, factors, &turned(&b, n, b_transposed), [b_width, gap, shift]);
    // Without `add` what was there must not matter, not even if it is no number.
    let held = if add { before.clone() } else { vec![f32::NAN; m * n] };
    let out = placed(gpu, to, &held, [n, gap, shift]);
    let product = MatrixProduct {
        a: a_stored.matrix(shift, a_width + gap),
        a_transposed,
        b: b_stored.matrix(shift, b_width + gap),
        b_transposed,
        out: out.matrix(shift, n + gap),
        shape: [m, n, k],
        beta: f32::from(add),
    };
    // SAFETY: within the buffers above.
    unsafe { gpu.multiply(&product) }.unwrap();
    let got = out.to_vec().unwrap();
    assert!(got[..shift].iter().all(|&x| x == 9.0), "before the first row");
    let mut error = 0f64;
    for (i, row) in got[shift..].chunks_exact(n + gap).enumerate() {
        assert!(row[n..].iter().all(|&x| x == 9.0), "after row {i}");
        for (j, &x) in row[..n].iter().enumerate() {
            let sum: f64 = (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j])).sum();
            let want = sum + if add { f64::from(before[i * n + j]) } else { 0.0 };
            error = error.max((f64::from(x) - want).abs() / want.abs().max(1.0));
        }
    }
    error
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn products_are_those_of_plain_loops_on_a_gpu() {
    let gpu = gpu();
    let turns = (0..8).map(|bits: u32| [bits & 1 > 0, bits & 2 > 0, bits & 4 > 0]);
    let mut wrong = Vec::new();
    for factors in DTYPES.into_iter().filter(|&dtype| gpu.supports(dtype)) {
        let to = if factors == Dtype::F32 { vec![Dtype::F32] } else { vec![factors, Dtype::F32] };
        // Nothing is added to 16 bits.
        let promised = |(to, [_, _, add]): &(Dtype, [bool; 3])| !add || *to == Dtype::F32;
        let cases = to.into_iter().flat_map(|to| turns.clone().map(move |turns| (to, turns))).filter(promised);
        for (to, turns) in cases {
            // Whole tiles, single rows, and odd sizes at odd places.
            for (shape, shift) in [([64, 128, 64], 0), ([1, 72, 40], 8), ([5, 1, 24], 0), ([17, 35, 129], 1)] {
                let error = product_error(&gpu, (factors, to), shape, turns, shift);
                // Sums of eighths are exact in f32; only what is stored in 16 bits is rounded.
                let limit = if to == Dtype::F32 { 0.0 } else { super::rounding(to) };
                if error > limit {
                    wrong.push(format!(
                        "{factors:?} -> {to:?}, {shape:?} + {shift}, turned or added {turns:?}: {error:e}"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
#[should_panic(expected = "beta: 1.0")]
fn a_product_added_to_16_bits_is_refused_on_a_gpu() {
    product_error(&gpu(), (Dtype::F16, Dtype::F16), [8, 8, 8], [false, false, true], 0);
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn a_product_of_no_rows_and_a_grid_of_no_blocks_do_nothing_on_a_gpu() {
    let gpu = gpu();
    let numbers = DynBuffer::from_f32(&gpu, Dtype::F32, &[1.0; 32]).unwrap();
    let (a, b, out) = (numbers.matrix(0, 8), numbers.matrix(0, 4), numbers.matrix(0, 4));
    for shape in [[0, 4, 8], [4, 0, 8]] {
        let product = MatrixProduct { a, a_transposed: false, b, b_transposed: false, out, shape, beta: 0.0 };
        // SAFETY: within the buffers above.
        unsafe { gpu.multiply(&product) }.unwrap();
    }
    let arguments = [a.at.into(), 8.into(), b.at.into(), Argument::from(1)]; // mark_seen(tokens, len, seen, words)
    // SAFETY: within the buffers above.
    unsafe { gpu.launch("mark_seen", Grid { blocks: [0, 1, 1], threads: 256, shared: 0, early: false }, &arguments) }
        .unwrap();
    assert_eq!(numbers.to_vec().unwrap(), [1.0; 32]);
}

/// Numbers whose products need all 24 bits: with fewer (TensorFloat-32) it is off by more than a thousandth.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn products_of_f32_keep_all_bits_on_a_gpu() {
    let gpu = gpu();
    let [m, n, k] = [33, 64, 512];
    let (a, b) = (numbers(1, m * k), numbers(2, n * k));
    let (on_a, on_b) =
        (DynBuffer::from_f32(&gpu, Dtype::F32, &a).unwrap(), DynBuffer::from_f32(&gpu, Dtype::F32, &b).unwrap());
    let out = DynBuffer::new(&gpu, Dtype::F32, m * n).unwrap();
    let (a_matrix, b_matrix) = (on_a.matrix(0, k), on_b.matrix(0, k));
    let (shape, a_transposed, b_transposed, beta) = ([m, n, k], false, true, 0.0);
    let product =
        MatrixProduct { a: a_matrix, a_transposed, b: b_matrix, b_transposed, out: out.matrix(0, n), shape, beta };
    // SAFETY: within the buffers above.
    unsafe { gpu.multiply(&product) }.unwrap();
    let first = out.to_vec().unwrap();
    for (i, &x) in first.iter().enumerate() {
        let terms = a[i / n * k..][..k].iter().zip(&b[i % n * k..][..k]);
        let want: f64 = terms.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        assert!((f64::from(x) - want).abs() < 2e-5, "{i}: {x} for {want}");
    }
    out.upload(0, &vec![f32::NAN; m * n]).unwrap();
    // SAFETY: within the buffers above.
    unsafe { gpu.multiply(&product) }.unwrap();
    assert_eq!(out.to_vec().unwrap(), first, "the same bits again");
}

/// Adds `addends (width)`, as partial result, to `x (1, width)`: a kernel that changes what it reads.
fn add(gpu: &dyn Driver, x: &Buffer<f32>, addend: &Buffer<f32>, normed: &Buffer<f32>) -> Result<(), Error> {
    let width = Argument::from(x.len());
    let (one, zeroth) = (Argument::from(1), |buffer: &Buffer<f32>| Argument::from(buffer.at(0)));
    let arguments = [zeroth(x), zeroth(addend), one, zeroth(addend), zeroth(normed), one, width, Argument::from(1e-6)];
    // SAFETY: within the buffers above.
    unsafe { gpu.launch("add_norm_f32", Grid { blocks: [1, 1, 1], threads: 256, shared: 0, early: false }, &arguments) }
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn recorded_work_is_done_when_it_is_replayed_on_a_gpu() {
    let gpu = gpu();
    let buffer = |of: &[f32]| Buffer::from_slice(&gpu, of).unwrap();
    let (x, addend, normed) = (buffer(&[1.0; 16]), buffer(&[2.0; 16]), buffer(&[0.0; 16]));
    let (square, copy) = (buffer(&[5.0; 16]), buffer(&[0.0; 16]));
    let matrix =
        |buffer: &Buffer<f32>| grpo_pipes::gpu::driver::Matrix { at: buffer.at(0), stride: 4, dtype: Dtype::F32 };
    let product = MatrixProduct {
        a: matrix(&x),
        a_transposed: false,
        b: matrix(&addend),
        b_transposed: true,
        out: matrix(&square),
        shape: [4, 4, 4],
        beta: 0.0,
    };
    let recording = gpu.record(&mut || {
        add(&*gpu, &x, &addend, &normed)?;
        // SAFETY: within the buffers above.
        unsafe { gpu.multiply(&product) }?;
        // SAFETY: within the buffers above.
        unsafe { gpu.copy(copy.at(0), x.at(0), 40) }?;
        // SAFETY: within the buffers above.
        unsafe { gpu.clear(copy.at(1), 4) }
    });
    let recording = recording.unwrap();
    assert_eq!(x.to_vec().unwrap(), [1.0; 16], "nothing yet");
    for (times, added) in [(1, 2.0), (2, 10.0)] {
        addend.upload(0, &[added; 16]).unwrap();
        // SAFETY: within the buffers above.
        unsafe { gpu.replay(&recording) }.unwrap();
        let sum = if times == 1 { 3.0 } else { 13.0 };
        assert_eq!(x.to_vec().unwrap(), [sum; 16]);
        assert_eq!(square.to_vec().unwrap(), [4.0 * sum * added; 16]);
        let copied: Vec<f32> = (0..16).map(|i| if i != 1 && i < 10 { sum } else { 0.0 }).collect();
        assert_eq!(copy.to_vec().unwrap(), copied);
    }
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn an_error_while_recording_leaves_the_device_as_it_was_on_a_gpu() {
    let gpu = gpu();
    let x = Buffer::from_slice(&gpu, &[1.0f32; 4]).unwrap();
    let failed = gpu.record(&mut || {
        // SAFETY: within the buffers above.
        unsafe { gpu.clear(x.at(0), 16) }?;
        Err(Error::Device("of the caller's".into()))
    });
    assert_eq!(failed.err().unwrap().to_string(), "of the caller's");
    assert_eq!(x.to_vec().unwrap(), [1.0; 4]);
    x.clear().unwrap();
    assert_eq!(x.to_vec().unwrap(), [0.0; 4]);
}

#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn the_host_reads_what_the_device_wrote_before_a_mark_on_a_gpu() {
    let gpu = gpu();
    let seen = gpu.allocate_pinned(4096).unwrap();
    // Copied out, as its length is known and the device is waited for.
    #[allow(unsafe_code)]
    // SAFETY: shared memory of that many bytes, which lives as long as the driver and is not written meanwhile.
    let host = || unsafe { std::slice::from_raw_parts(seen.host as *const u8, seen.bytes) }.to_vec();
    assert!(host().iter().all(|&byte| byte == 0));
    let sent = numbers(3, 1024);
    let x = Buffer::from_slice(&gpu, &sent).unwrap();
    let before = gpu.mark().unwrap();
    // SAFETY: within the buffers above.
    unsafe { gpu.copy(seen.at, x.at(0), 4096) }.unwrap();
    let after = gpu.mark().unwrap();
    gpu.wait(&after).unwrap();
    assert_eq!(host(), cast_slice::<f32, u8>(&sent));
    let seconds = gpu.seconds_between(&before, &after).unwrap();
    assert!((0.0..1.0).contains(&seconds), "{seconds}");
}
