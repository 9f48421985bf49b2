//! Products of tiles against their order of sums, one number at a time, and against f64.

use std::cell::Cell;

use half::bf16;

use super::*;
use crate::model::matmul::{Bf16Weight, MatrixRowsMut, ROWS_AT_ONCE, StartFrom};
use crate::model::simd::tests::{FORCED, levels};

thread_local! {
    /// Whether matrix units are left alone.
    pub static WITHOUT_UNITS: Cell<bool> = const { Cell::new(false) };
}

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32).map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

/// The order of sums as the module states it.
fn plain(left: &[bf16], right: &[bf16], start: f32) -> f32 {
    left.chunks(STEP).zip(right.chunks(STEP)).fold(start, |sum, (left, right)| {
        let chain = |first: usize| {
            let places = (first..left.len()).step_by(2);
            places.fold(0.0f32, |sum, p| left[p].to_f32().mul_add(right[p].to_f32(), sum))
        };
        sum + (chain(0) + chain(1))
    })
}

/// Runs on threads of which each is prepared so.
fn on_threads<T: Send>(prepare: impl Fn() + Send + Sync + 'static, run: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(3).start_handler(move |_| prepare()).build().unwrap().install(run)
}

/// A product `(m, n)` of depth `k` inside poisoned memory; returns y.
fn product((m, n, k): (usize, usize, usize), start: StartFrom<'_>) -> Vec<f32> {
    let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
    let (mut left, mut right) = (poisoned(), poisoned());
    left.pack(Side::Left, Source::Along { data: &x, stride: k, shape: (m, k) });
    right.pack(Side::Right, Source::Along { data: &w, stride: k, shape: (n, k) });
    let (stride, column) = (n + 5, 3);
    let mut y = vec![f32::NAN; m * stride];
    (0..m).for_each(|r| y[r * stride + column..][..n].copy_from_slice(&numbers(n, r as u32)));
    multiply(&left, &right, start, MatrixRowsMut::new(&mut y, stride, column));
    for (i, y) in y.iter().enumerate() {
        assert_eq!(y.is_nan(), !(column..column + n).contains(&(i % stride)), "{i} of {m} x {n} x {k}");
    }
    y.chunks(stride).flat_map(|row| row[column..column + n].to_vec()).collect()
}

/// Memory that held other tiles.
fn poisoned() -> Tiles {
    Tiles::of(Side::Left, Source::Along { data: &[f32::NAN; 40_000], stride: 200, shape: (200, 200) })
}

const SHAPES: [(usize, usize, usize); 11] = [
    (1, 1, 1),
    (1, 16, 32),
    (3, 70, 50),
    (16, 64, 64),
    (17, 33, 31),
    (40, 100, 600),
    (64, 129, 33),
    (70, 1, 90),
    (600, 90, 530),
    (700, 40, 40),
    (1030, 20, 33),
];

#[allow(clippy::print_stderr)] // it says what is skipped
#[test]
fn every_unit_has_the_stated_order_of_sums() {
    for shape @ (m, n, k) in SHAPES {
        let bias = numbers(n, 9);
        let round = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let (x, w) = (round(numbers(m * k, 1)), round(numbers(n * k, 2)));
        for start in [StartFrom::Zero, StartFrom::Bias(&bias), StartFrom::Add] {
            let expected: Vec<u32> = (0..m * n)
                .map(|i| {
                    let (r, c) = (i / n, i % n);
                    let start = match start {
                        StartFrom::Zero => 0.0,
                        StartFrom::Bias(bias) => bias[c],
                        StartFrom::Add => numbers(n, r as u32)[c],
                    };
                    plain(&x[r * k..][..k], &w[c * k..][..k], start).to_bits()
                })
                .collect();
            let bits = |y: Vec<f32>| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
            for level in levels() {
                let prepare = move || (FORCED.set(Some(level)), WITHOUT_UNITS.set(true)).1;
                assert!(bits(on_threads(prepare, || product(shape, start))) == expected, "{level:?} {shape:?}");
            }
            assert!(bits(on_threads(|| (), || product(shape, start))) == expected, "{shape:?}");
        }
    }
    if !has_matrix_units() {
        eprintln!("skipped: this processor has no matrix units");
    }
}

/// On one thread a task has more strips than sums are kept of, and y is written past the caches.
#[test]
fn a_wide_deep_product_is_that_of_its_parts() {
    let (m, n, k, part) = (230, 4704, 1030, 150);
    let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
    let left = Tiles::of(Side::Left, Source::Along { data: &x, stride: k, shape: (m, k) });
    let pack = |w: &[f32]| Tiles::of(Side::Right, Source::Along { data: w, stride: k, shape: (w.len() / k, k) });
    let mut y = AlignedVec::zeros(m * n);
    y.copy_from_slice(&numbers(m * n, 3));
    let mut parts = y.to_vec();
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    one_thread.install(|| multiply(&left, &pack(&w), StartFrom::Add, MatrixRowsMut::new(&mut y, n, 0)));
    for (i, w) in w.chunks(part * k).enumerate() {
        multiply(&left, &pack(w), StartFrom::Add, MatrixRowsMut::new(&mut parts, n, i * part));
    }
    assert!(*y == *parts);
}

#[test]
fn products_are_near_those_in_f64() {
    let (m, n, k) = (33, 50, 700);
    let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
    let wide = |x: f32| bf16::from_f32(x).to_f64();
    for (i, y) in product((m, n, k), StartFrom::Zero).into_iter().enumerate() {
        let expected: f64 = (0..k).map(|p| wide(x[i / n * k + p]) * wide(w[i % n * k + p])).sum();
        assert!((f64::from(y) - expected).abs() < 1e-4, "{y} {expected}");
    }
}

#[test]
fn an_operand_is_the_same_packed_along_or_across_its_depth() {
    for (outer, depth) in [(1, 1), (16, 32), (17, 33), (100, 70), (300, 129)] {
        let along = numbers(outer * depth, 3);
        let mut across = vec![0.0; outer * depth];
        (0..outer * depth).for_each(|i| across[i % depth * outer + i / depth] = along[i]);
        for side in [Side::Left, Side::Right] {
            let one = Tiles::of(side, Source::Along { data: &along, stride: depth, shape: (outer, depth) });
            let mut other = poisoned();
            other.pack(side, Source::Across { data: &across, stride: outer, shape: (outer, depth) });
            assert!(*one.data == *other.data, "{side:?} {outer} x {depth}");
        }
        let tiles = Tiles::of(Side::Right, Source::Along { data: &along, stride: depth, shape: (outer, depth) });
        let mut row = vec![0.0; depth];
        tiles.column(outer - 1, &mut row);
        assert!(row.iter().zip(&along[(outer - 1) * depth..]).all(|(a, b)| *a == bf16::from_f32(*b).to_f32()));
    }
}

#[test]
fn rounding_is_to_the_nearest_even_and_what_tiles_read_as_zero_is_zero() {
    for i in 0..1 << 20 {
        let x = f32::from_bits(i * 4099);
        let mut found = [0.0];
        Tiles::of(Side::Right, Source::Along { data: &[x], stride: 1, shape: (1, 1) }).column(0, &mut found);
        let expected = if x.is_subnormal() { 0.0 * x } else { bf16::from_f32(x).to_f32() };
        assert!(found[0].to_bits() == expected.to_bits() || (found[0].is_nan() && x.is_nan()), "{x:e} {:e}", found[0]);
    }
}

#[test]
fn an_operand_packed_by_its_parts_is_the_same() {
    for (rows, width) in [(1, 1), (32, 32), (33, 40), (200, 70)] {
        let numbers = numbers(rows * width, 4);
        let mut whole = Bf16Weight::default();
        whole.pack(&numbers, (rows, width));
        let mut parts = Bf16Weight::default();
        parts.pack(&vec![f32::NAN; rows * width], (rows, width));
        let chunks = numbers.chunks(ROWS_AT_ONCE * width);
        assert_eq!(chunks.len(), parts.parts().count());
        parts.parts().zip(chunks).for_each(|(part, rows)| part.pack(rows));
        assert!(*parts.forward.data == *whole.forward.data && *parts.backward.data == *whole.backward.data);
    }
}
