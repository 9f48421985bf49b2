//! The rotary frequencies of each rope type, rounded to f32 where transformers rounds.

use std::f64::consts::TAU;

use super::parameters::{Llama3, RopeParameters, Scaling, Yarn};

impl RopeParameters {
    /// The angle that each pair of numbers of a head turns by per position (rad), and the factor of cosines and sines.
    ///
    /// # Source
    /// Su et al. 2021, <https://arxiv.org/abs/2104.09864>, eq. 15; `modeling_rope_utils.py` of transformers 5.23.
    pub(super) fn frequencies(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let base = self.rope_theta;
        match &self.scaling {
            // Not from `periods`, whose last bit sometimes differs: recorded runs used these frequencies.
            Scaling::Default => {
                let frequency = |i: usize| base.powf(-(2.0 * i as f64) / head_dim as f64) as f32;
                ((0..head_dim / 2).map(frequency).collect(), 1.0)
            }
            Scaling::Linear { factor } => {
                (periods(base, head_dim).map(|period| 1.0 / period / *factor as f32).collect(), 1.0)
            }
            // Up to the model's positions the base is multiplied by 1.
            Scaling::Dynamic { .. } => (periods(base, head_dim).map(|period| 1.0 / period).collect(), 1.0),
            Scaling::Llama3(llama3) => (llama3.frequencies(base, head_dim), 1.0),
            Scaling::Factors(factors) => {
                (periods(base, head_dim).zip(factors).map(|(period, factor)| 1.0 / period / factor).collect(), 1.0)
            }
            Scaling::Yarn(yarn) => (yarn.frequencies(base, head_dim), yarn.attention_factor as f32),
        }
    }
}

/// The inverse of each frequency without scaling, with the exponent and the power rounded to f32.
fn periods(base: f64, head_dim: usize) -> impl Iterator<Item = f32> {
    let base = f64::from(base as f32);
    (0..head_dim / 2).map(move |i| base.powf(f64::from(2.0 * i as f32 / head_dim as f32)) as f32)
}

impl Llama3 {
    /// What each frequency is divided by, `(E / 2)`.
    #[must_use]
    pub fn factors(&self, base: f64, head_dim: usize) -> Vec<f32> {
        let scaled = self.frequencies(base, head_dim);
        periods(base, head_dim).zip(scaled).map(|(period, scaled)| 1.0 / period / scaled).collect()
    }

    /// # Source
    /// `_compute_llama3_parameters` of transformers 5.23, after the code of Llama 3.1.
    fn frequencies(&self, base: f64, head_dim: usize) -> Vec<f32> {
        let (factor, low, high) = (self.factor as f32, self.low_freq_factor as f32, self.high_freq_factor as f32);
        let original = self.original_max_position_embeddings;
        let (longest, shortest) = ((original / self.low_freq_factor) as f32, (original / self.high_freq_factor) as f32);
        let frequency = |frequency: f32| {
            let wavelength = TAU as f32 / frequency;
            if wavelength > longest {
                frequency / factor
            } else if wavelength < shortest {
                frequency
            } else {
                let kept = (original as f32 / wavelength - low) / (high - low);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        };
        periods(base, head_dim).map(|period| frequency(1.0 / period)).collect()
    }
}

impl Yarn {
    /// # Source
    /// Peng et al. 2023, <https://arxiv.org/abs/2309.00071>, section 3.2, with the ramp of the authors' code over the index of a
    /// frequency, as transformers has it.
    fn frequencies(&self, base: f64, head_dim: usize) -> Vec<f32> {
        // The index of the frequency that makes this many turns over the original positions.
        let index = |turns: f64| {
            let period = self.original_max_position_embeddings / (turns * TAU);
            head_dim as f64 * period.ln() / (2.0 * base.ln())
        };
        let (mut low, mut high) = (index(self.beta_fast), index(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        if low == high {
            high += 0.001; // transformers' own way around a division by zero
        }
        let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let frequency = |(i, period): (usize, f32)| {
            let (kept, divided) = (1.0 / period, 1.0 / (self.factor as f32 * period));
            let share = 1.0 - ramp(i);
            divided * (1.0 - share) + kept * share
        };
        periods(base, head_dim).enumerate().map(frequency).collect()
    }
}
