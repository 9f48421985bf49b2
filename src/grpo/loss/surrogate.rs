//! The surrogate objective of one token: what the loss falls by.

use super::{LossConfig, Objective};

/// On which side of the clip range a token's gradient is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clipped {
    /// Not stopped: within the range, or the advantage pulls it back there.
    No,
    /// The ratio is below 1 - epsilon, and the advantage negative.
    Low,
    /// The ratio is above 1 + epsilon_high, and the advantage positive. Of CISPO: the weight is truncated, and the advantage positive.
    High,
}

/// A token's probability ratio.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ratio {
    pub value: f64,
    /// Its derivative with respect to the log-probability: itself, or 0 beyond the bound of the exponent.
    pub slope: f64,
}

/// The surrogate of a token.
pub(super) struct Surrogate {
    pub value: f64,
    /// Its derivative with respect to the log-ratio, or, of CISPO, to the log-probability.
    pub slope: f64,
    pub clipped: Clipped,
}

impl Surrogate {
    /// The surrogate of a token of this `advantage`, which counts `times`.
    ///
    /// # Source
    /// Clipped: Schulman et al. 2017, eq. 7, <https://arxiv.org/abs/1707.06347>; its `delta`: INTELLECT-2,
    /// <https://arxiv.org/abs/2505.07291>, and TRL's `delta`. CISPO: MiniMax 2025, <https://arxiv.org/abs/2506.13585>, without its lower
    /// bound, as TRL has it. SAPO: Gao et al. 2025, <https://arxiv.org/abs/2511.20347>.
    pub fn of(config: &LossConfig, ratio: Ratio, (advantage, times): (f64, f64), logprob: f64) -> Self {
        let (_, objective, _) = config.kind.parts();
        let counting = advantage * times;
        match objective {
            Objective::Clipped => clip(config, ratio, counting, side(bounds(config), ratio, advantage)),
            Objective::WeightedLogprob => {
                let most = config.epsilon_high.unwrap_or(f64::INFINITY);
                let (slope, clipped) = (ratio.value.min(most) * counting, side((0.0, most), ratio, advantage));
                Self { value: slope * logprob, slope, clipped }
            }
            Objective::Soft => soft(config, ratio, counting),
        }
    }
}

fn bounds(config: &LossConfig) -> (f64, f64) {
    (1.0 - config.epsilon, 1.0 + config.epsilon_high.unwrap_or(config.epsilon))
}

/// By the advantage alone, whether or not the token counts.
fn side((floor, ceiling): (f64, f64), ratio: Ratio, advantage: f64) -> Clipped {
    match advantage {
        a if a < 0.0 && ratio.value < floor => Clipped::Low,
        a if a > 0.0 && ratio.value > ceiling => Clipped::High,
        _ => Clipped::No,
    }
}

fn clip(config: &LossConfig, ratio: Ratio, advantage: f64, clipped: Clipped) -> Surrogate {
    let ((floor, ceiling), most) = (bounds(config), config.delta.unwrap_or(f64::INFINITY));
    let value = (ratio.value.min(most) * advantage).min(ratio.value.clamp(floor, ceiling) * advantage);
    let is_flat = clipped != Clipped::No || ratio.value > most;
    Surrogate { value, slope: if is_flat { 0.0 } else { ratio.slope * advantage }, clipped }
}

fn soft(config: &LossConfig, ratio: Ratio, advantage: f64) -> Surrogate {
    let temperature = if advantage > 0.0 { config.sapo_temperature_pos } else { config.sapo_temperature_neg };
    let gate = 1.0 / (1.0 + (-temperature * (ratio.value - 1.0)).exp());
    Surrogate {
        value: 4.0 / temperature * gate * advantage,
        slope: 4.0 * gate * (1.0 - gate) * ratio.slope * advantage,
        clipped: Clipped::No,
    }
}
