//! Computes rates with confidence intervals, and pass@k, over prompts sampled one or more times each.

use serde::{Deserialize, Serialize};

/// The normal quantile of a 95 % interval.
pub(super) const Z: f64 = 1.959_963_984_540_054;

/// How many of a prompt's samples were judged, and how many passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Samples judged.
    pub total: u32,
    /// Samples that passed.
    pub passed: u32,
}

/// A fraction of completions with its 95 % interval, all in 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The fraction.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// The fraction of all samples that passed; `None` without samples.
///
/// With one sample per prompt the interval is Wilson's. Samples of one prompt are not independent, so with more the interval is Wilson's for
/// the effective number of samples: the number of independent samples whose mean would vary as much as this mean varies between prompts
/// (linearised variance of a ratio over clusters). It is at most the number of samples. If the variance cannot be estimated, because all
/// samples passed, none did, or there is one prompt, the effective number is the number of prompts.
///
/// # Source
/// Wilson 1927, <https://doi.org/10.1080/01621459.1927.10502953>; effective size in Wilson's interval: Franco et al. 2019,
/// <https://doi.org/10.1093/jssam/smy019>; clusters in evaluations: Miller 2024, eq. 4, <https://arxiv.org/abs/2411.00640>.
#[must_use]
pub fn rate(prompts: impl Iterator<Item = Counts> + Clone) -> Option<Rate> {
    let judged = prompts.filter(|counts| counts.total > 0);
    let (mut clusters, mut total, mut passed, mut repeated) = (0.0, 0.0, 0.0, false);
    for counts in judged.clone() {
        clusters += 1.0;
        total += f64::from(counts.total);
        passed += f64::from(counts.passed);
        repeated |= counts.total > 1;
    }
    if total == 0.0 {
        return None;
    }
    let value = passed / total;
    let effective = if repeated { effective_size(judged, value, clusters, total) } else { total };
    Some(wilson(value, effective))
}

fn effective_size(prompts: impl Iterator<Item = Counts>, value: f64, clusters: f64, total: f64) -> f64 {
    let residual = |counts: Counts| f64::from(counts.passed) - value * f64::from(counts.total);
    let squares: f64 = prompts.map(|counts| residual(counts).powi(2)).sum();
    let variance = squares / total.powi(2) * clusters / (clusters - 1.0);
    let binomial = value * (1.0 - value);
    if clusters < 2.0 || binomial == 0.0 {
        return clusters;
    }
    // A variance of 0 (every prompt passed equally often) divides to infinity: as good as independent.
    (binomial / variance).clamp(1.0, total)
}

/// Wilson's interval of a fraction of `n` independent trials.
fn wilson(value: f64, n: f64) -> Rate {
    let z2 = Z * Z / n;
    let centre = (value + z2 / 2.0) / (1.0 + z2);
    let half = Z * (value * (1.0 - value) / n + z2 / (4.0 * n)).sqrt() / (1.0 + z2);
    // Rounding must not push the ends past the value or out of 0 to 1.
    Rate { value, low: (centre - half).clamp(0.0, value), high: (centre + half).clamp(value, 1.0) }
}

/// Probability that at least one of `k` samples, drawn without replacement from a prompt's, passed; `None` when it has fewer than `k`.
///
/// # Source
/// Chen et al. 2021, eq. 1, in the product form that does not overflow, <https://arxiv.org/abs/2107.03374>.
#[must_use]
pub fn pass_at_k(counts: Counts, k: u32) -> Option<f64> {
    let Counts { total, passed } = counts;
    if k > total {
        return None;
    }
    let failed = total - passed;
    if failed < k {
        return Some(1.0);
    }
    let none: f64 = (failed + 1..=total).map(|i| 1.0 - f64::from(k) / f64::from(i)).product();
    Some(1.0 - none)
}

/// A mean, and half the width of its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    /// NaN without values.
    pub mean: f64,
    /// By Student's t; `None` with less than two values.
    pub half_width: Option<f64>,
}

impl Spread {
    pub fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let half_width = (values.len() > 1).then(|| students_t(values.len() - 1) * (variance / count).sqrt());
        Self { mean, half_width }
    }
}

/// The two-sided 95 % quantile of Student's t distribution, for one degree of freedom or more.
///
/// # Source
/// Abramowitz and Stegun, 26.7.5; where that is off by more than 0.003, the numbers of `scipy.stats.t.ppf(0.975, freedom)`.
fn students_t(freedom: usize) -> f64 {
    const FIRST: [f64; 4] = [12.706_204_736, 4.302_652_730, 3.182_446_305, 2.776_445_105];
    if let Some(quantile) = FIRST.get(freedom - 1) {
        return *quantile;
    }
    let terms = [
        Z.powi(3) + Z,
        (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / 6.0,
        (3.0 * Z.powi(7) + 19.0 * Z.powi(5) + 17.0 * Z.powi(3) - 15.0 * Z) / 6.0,
    ];
    let quarter = 1.0 / (4.0 * freedom as f64);
    terms.iter().rev().fold(0.0, |sum, term| (sum + term) * quarter) + Z
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-6, "{got} is not {want}");
    }

    fn prompts(of: &[(u32, u32)]) -> Option<Rate> {
        rate(of.iter().map(|&(total, passed)| Counts { total, passed }))
    }

    // python3: z, p, n = 1.959963984540054, 0.8, 10 (and 0, 20); c = (p + z*z/2/n) / (1 + z*z/n)
    // h = z * (p*(1-p)/n + z*z/4/n/n) ** 0.5 / (1 + z*z/n); print(c - h, c + h)
    #[test]
    fn one_sample_a_prompt_has_wilsons_interval() {
        let rate = prompts(&[(1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 0), (1, 0)]).unwrap();
        close(rate.value, 0.8);
        close(rate.low, 0.490_162_47);
        close(rate.high, 0.943_317_82);
        let none = prompts(&[(1, 0); 20]).unwrap();
        assert_eq!((none.value, none.low), (0.0, 0.0));
        close(none.high, 0.161_125_16);
    }

    #[test]
    fn samples_that_repeat_their_prompt_add_no_certainty() {
        let once: Vec<_> = (0..50).map(|prompt| (1, u32::from(prompt % 2 == 0))).collect();
        let eight: Vec<_> = once.iter().map(|&(_, passed)| (8, passed * 8)).collect();
        let (once, eight) = (prompts(&once).unwrap(), prompts(&eight).unwrap());
        assert_eq!(once.value, eight.value);
        // The variance between prompts divides by n - 1, so the two differ slightly.
        assert!(eight.low <= once.low && once.low - eight.low < 0.002, "{once:?} {eight:?}");
        let all = prompts(&[(8, 8); 20]).unwrap();
        close(all.low, 1.0 - 0.161_125_16);
    }

    #[test]
    fn samples_that_vary_within_their_prompt_add_certainty() {
        let mixed = prompts(&[(8, 4); 50]).unwrap();
        let independent = wilson(0.5, 400.0);
        assert_eq!(mixed, independent);
    }

    #[test]
    fn nothing_judged_has_no_rate() {
        assert_eq!(prompts(&[]), None);
        assert_eq!(prompts(&[(0, 0)]), None);
        assert_eq!(prompts(&[(4, 1)]).unwrap(), wilson(0.25, 1.0));
    }

    #[test]
    fn pass_at_k_is_the_share_of_draws_with_a_pass() {
        let of = |total, passed, k| pass_at_k(Counts { total, passed }, k);
        close(of(5, 2, 1).unwrap(), 0.4);
        close(of(5, 2, 2).unwrap(), 1.0 - 3.0 / 10.0);
        close(of(16, 1, 8).unwrap(), 0.5);
        assert_eq!(of(4, 3, 2), Some(1.0));
        assert_eq!(of(4, 0, 4), Some(0.0));
        assert_eq!(of(4, 2, 5), None);
        close(of(1000, 500, 1).unwrap(), 0.5);
    }

    // python3: from scipy.stats import t; print([t.ppf(0.975, v) for v in (1, 2, 4, 5, 9, 30)])
    // import numpy; x = [0.81, 0.84, 0.79]; print(numpy.mean(x), t.ppf(0.975, 2) * numpy.std(x, ddof=1) / 3**0.5)
    #[test]
    fn a_few_seeds_have_students_interval() {
        let expected =
            [(1, 12.706_205), (2, 4.302_653), (4, 2.776_445), (5, 2.570_582), (9, 2.262_157), (30, 2.042_272)];
        for (freedom, quantile) in expected {
            assert!((students_t(freedom) - quantile).abs() < 0.003, "{freedom}");
        }
        let Spread { mean, half_width } = Spread::of(&[0.81, 0.84, 0.79]);
        close(mean, 0.813_333_333);
        close(half_width.unwrap(), 0.062_516_095);
        assert_eq!(Spread::of(&[0.5]), Spread { mean: 0.5, half_width: None });
        assert!(Spread::of(&[]).mean.is_nan());
    }
}
