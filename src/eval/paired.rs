//! Compares two models problem by problem, which tells smaller differences from chance than two separate rates do.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};

use rayon::prelude::*;
use serde::Serialize;

use super::fold::prompt_key;
use super::judge::Judge;
use super::power::Power;
use super::stats::{Counts, Rate};
use crate::error::{Error, Result};
use crate::lines::record::Line;
use crate::numbers::rng::Stream;

/// Resamples of the bootstrap.
const RESAMPLES: u64 = 10_000;

/// How often each problem was solved. Completions of one problem from several files, such as those of several seeds, are pooled.
#[derive(Debug, Default)]
pub struct Outcomes {
    judge: Judge,
    /// In the order of their first record.
    problems: Vec<(String, Counts)>,
    index: HashMap<String, usize>,
}

impl Outcomes {
    /// Knows of no problem so far.
    #[must_use]
    pub fn new(judge: Judge) -> Self {
        Self { judge, ..Self::default() }
    }

    /// Adds one scored rollout.
    ///
    /// # Errors
    /// As [`super::Fold::add`].
    pub fn add(&mut self, line: &Line) -> Result<()> {
        let record = line.record()?;
        let key = prompt_key(&record)?.into_owned();
        let at = *self.index.entry(key.clone()).or_insert_with(|| {
            self.problems.push((key, Counts::default()));
            self.problems.len() - 1
        });
        let judged = self.judge.judge(&record, &self.judge.rewards(&record)?)?;
        self.problems[at].1.add(judged.strict);
        Ok(())
    }

    fn judged(&self) -> impl Iterator<Item = (&str, f64)> {
        let solved = |counts: &Counts| f64::from(counts.passed) / f64::from(counts.total);
        self.problems.iter().filter(|(_, counts)| counts.total > 0).map(move |(key, counts)| (&**key, solved(counts)))
    }
}

/// The comparison of a model with a baseline, by strict accuracy.
#[derive(Debug, Clone, Serialize)]
pub struct Paired {
    /// Problems that both were judged on.
    pub num_prompts: usize,
    /// Problems that one of them lacks; they are left out.
    pub num_unpaired: usize,
    /// Mean over the problems, each counting once.
    pub baseline: f64,
    /// The same of the model.
    pub accuracy: f64,
    /// Of the two, with the percentile interval of a bootstrap over problems.
    pub difference: Rate,
    /// Problems that the model solved more often.
    pub better: u64,
    /// Problems that it solved less often.
    pub worse: u64,
    /// Probability of a split as uneven if neither were better. With one completion per problem this is McNemar's exact test.
    pub p_value: f64,
    /// Problems among which a true difference would show, with a power of 80 % at a level of 5 %, by the difference.
    #[serde(flatten)]
    pub power: Power,
}

impl Paired {
    /// Compares `model` with `baseline`. `to_show` are the differences whose number of problems is asked for.
    ///
    /// # Source
    /// McNemar 1947, <https://doi.org/10.1007/BF02295996>; paired differences in evaluations: Miller 2024,
    /// <https://arxiv.org/abs/2411.00640>.
    ///
    /// # Errors
    /// [`Error::Data`] when they have no problem in common.
    pub fn of(model: &Outcomes, baseline: &Outcomes, to_show: &[f64]) -> Result<Self> {
        let before: HashMap<&str, f64> = baseline.judged().collect();
        let all = model.judged().count();
        let pairs: Vec<[f64; 2]> = model.judged().filter_map(|(key, after)| Some([*before.get(key)?, after])).collect();
        if pairs.is_empty() {
            return Err(Error::Data(
                "no problem of --baseline is among those evaluated: compare by the same prompts".into(),
            ));
        }
        let count = pairs.len() as f64;
        let mean = |side: usize| pairs.iter().map(|pair| pair[side]).sum::<f64>() / count;
        let differences: Vec<f64> = pairs.iter().map(|[before, after]| after - before).collect();
        let [better, worse] = [1.0, -1.0].map(|sign| differences.iter().filter(|d| **d * sign > 0.0).count() as u64);
        let discordance = differences.iter().map(|d| d * d).sum::<f64>() / count;
        let (baseline, accuracy) = (mean(0), mean(1));
        Ok(Self {
            num_prompts: pairs.len(),
            num_unpaired: all + before.len() - 2 * pairs.len(),
            baseline,
            accuracy,
            difference: bootstrap(&differences),
            better,
            worse,
            p_value: sign_test(better, worse),
            power: Power::of(discordance, to_show),
        })
    }
}

/// The mean with its 95 % interval: percentiles of the means of resamples.
fn bootstrap(values: &[f64]) -> Rate {
    let (stream, count) = (Stream::new(0, 0, "bootstrap"), values.len() as f64);
    let mean = |resample: u64| {
        let draw = |at: usize| values[(stream.uniform(resample, at as u64) * count) as usize];
        (0..values.len()).map(draw).sum::<f64>() / count
    };
    let mut means: Vec<f64> = (0..RESAMPLES).into_par_iter().map(mean).collect();
    means.sort_by(f64::total_cmp);
    let [low, high] = [0.025, 0.975].map(|part| means[(part * (RESAMPLES - 1) as f64).round() as usize]);
    Rate { value: values.iter().sum::<f64>() / count, low, high }
}

/// The two-sided exact test that of `better + worse` fair coins one side shows at most the rarer count.
pub(super) fn sign_test(better: u64, worse: u64) -> f64 {
    let (n, rarer) = (better + worse, better.min(worse));
    let mut log_choose = 0.0;
    let mut tail = 0.0;
    for i in 0..=rarer {
        tail += (log_choose - n as f64 * std::f64::consts::LN_2).exp();
        log_choose += ((n - i) as f64 / (i + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

impl Display for Paired {
    /// Aligned lines, without a final line end.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let Self { num_prompts, num_unpaired, better, worse, p_value, .. } = self;
        let left_out = if *num_unpaired > 0 { format!("   {num_unpaired} not in both") } else { String::new() };
        writeln!(out, "{:<20}{num_prompts:>8}{left_out}", "paired prompts")?;
        writeln!(
            out,
            "{:<20}{:>7.1}%   baseline {:.1} %",
            "accuracy, strict",
            100.0 * self.accuracy,
            100.0 * self.baseline
        )?;
        let [value, low, high] =
            [self.difference.value, self.difference.low, self.difference.high].map(|part| 100.0 * part);
        writeln!(out, "{:<20}{value:>+8.1}   95 % interval {low:+.1} to {high:+.1} points", "difference")?;
        writeln!(out, "{:<20}{better:>8}   {worse} worse; p = {p_value:.2e} (exact test)", "prompts better")?;
        write!(out, "{}", self.power)
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::Z;
    use super::*;

    // python3: from scipy.stats import binomtest; binomtest(3, 15).pvalue, binomtest(0, 6).pvalue, binomtest(700, 1500).pvalue
    #[test]
    fn the_exact_test_is_that_of_a_fair_coin() {
        for (better, worse, p) in
            [(12, 3, 0.035_156_25), (0, 6, 0.031_25), (800, 700, 0.010_559_255), (0, 0, 1.0), (5, 5, 1.0)]
        {
            let got = sign_test(better, worse);
            assert!((got - p).abs() < 1e-6, "{better} {worse}: {got}");
        }
    }

    #[test]
    fn the_interval_of_a_bootstrap_is_near_that_of_the_normal_distribution() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(i % 4 == 0)).collect();
        let Rate { value, low, high } = bootstrap(&values);
        let half = Z * (0.25f64 * 0.75 / 400.0).sqrt();
        assert_eq!(value, 0.25);
        assert!((low - (0.25 - half)).abs() < 0.006 && (high - (0.25 + half)).abs() < 0.006, "{low} {high}");
    }
}
