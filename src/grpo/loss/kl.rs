//! Estimates the KL divergence of the policy from the reference by one sampled token.

use super::MAX_LOG_RATIO;

/// An estimate of the KL divergence, by the difference d = log policy - log reference of a sampled token.
///
/// # Source
/// Schulman 2020, <http://joschu.net/blog/kl-approx.html>; verl's `core_algos.py`, `kl_penalty_forward`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum KlEstimator {
    /// d, without bias as a value. As a penalty its gradient is 0 on average
    K1,
    /// d^2 / 2: biased as a value, but its gradient is that of the divergence on average
    K2,
    /// e^-d + d - 1, without bias as a value and never negative; TRL's, also before 1.16. Its gradient is that of the other divergence,
    /// of the reference from the policy
    K3,
    /// k3 times the probability ratio, whose gradient is that of the divergence; TRL's `use_bias_correction_kl`, as in DeepSeek-V3.2
    K3Weighted,
}

impl KlEstimator {
    /// The estimate for `difference` = log policy - log reference, before it is weighted, and its derivative with respect to the
    /// policy's log-probability.
    pub(super) fn of(self, difference: f64) -> (f64, f64) {
        match self {
            Self::K1 => (difference, 1.0),
            Self::K2 => (difference.powi(2) / 2.0, difference),
            Self::K3 | Self::K3Weighted => k3(-difference),
        }
    }

    /// Whether the estimate is multiplied by the probability ratio.
    pub(super) fn is_weighted(self) -> bool {
        self == Self::K3Weighted
    }
}

/// The k3 estimate for `difference` = log reference - log policy, and its derivative with respect to the policy's log-probability.
fn k3(difference: f64) -> (f64, f64) {
    let bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
    let excess = bounded.exp_m1(); // exact for the small differences of a policy near its reference
    (excess - bounded, if bounded == difference { -excess } else { 0.0 })
}
