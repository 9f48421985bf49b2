//! One update of AdamW, in chunks shared out to threads. What a number becomes depends on its index alone, not on the chunks.

use std::ops::{DerefMut, Range};

use half::bf16;
use rayon::prelude::*;

use super::{CHUNK, Held, Means, Moments, OptimizerConfig};
use crate::numbers::aligned::Number;
use crate::numbers::rng::{Stream, philox4x32};

/// Added to the norm before it divides, as in `torch.nn.utils.clip_grad_norm_`.
const CLIP_EPSILON: f64 = 1e-6;

/// Random words per block of the generator.
const WORDS: usize = 4;

/// The scalars of one update, computed in f64 and rounded once, as in PyTorch.
pub struct Rule {
    pub(crate) gradient_scale: f32,
    pub(crate) keep: f32,
    pub(crate) first_rate: f32,
    pub(crate) second_keep: f32,
    pub(crate) second_rate: f32,
    pub(crate) correction_root: f32,
    pub(crate) epsilon: f32,
    pub(crate) step_size: f32,
    /// Key of the random numbers.
    pub(crate) key: [u32; 2],
}

impl Rule {
    /// The scalars of update `step`, counted from 1, with gradients of norm `norm`, in the run with seed `seed`.
    #[must_use]
    pub fn new(config: &OptimizerConfig, norm: f64, step: u64, seed: u64) -> Self {
        let (rate, limit) = (config.learning_rate_at(step - 1), config.max_grad_norm);
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let gradient_scale = if limit > 0.0 { (limit / (norm + CLIP_EPSILON)).min(1.0) } else { 1.0 };
        Self {
            gradient_scale: gradient_scale as f32,
            keep: (1.0 - rate * config.weight_decay) as f32,
            first_rate: (1.0 - config.adam_beta1) as f32,
            second_keep: config.adam_beta2 as f32,
            second_rate: (1.0 - config.adam_beta2) as f32,
            correction_root: correction(config.adam_beta2).sqrt() as f32,
            epsilon: config.adam_epsilon as f32,
            step_size: (rate / correction(config.adam_beta1)) as f32,
            key: Stream::new(seed, step, "exp_avg_sq").key(),
        }
    }

    /// Updates a weight by its gradient, and returns its next moments.
    #[inline(always)]
    fn number(&self, keep: f32, w: &mut f32, g: f32, [m, v]: [f32; 2]) -> [f32; 2] {
        let g = g * self.gradient_scale;
        let m = m + self.first_rate * (g - m);
        let v = v * self.second_keep + self.second_rate * g * g;
        *w = *w * keep - self.step_size * m / (v.sqrt() / self.correction_root + self.epsilon);
        [m, v]
    }

    fn apply(&self, part: Part<'_, f32>) {
        for (((w, g), m), v) in part.weights.iter_mut().zip(part.gradients).zip(part.first).zip(part.second) {
            [*m, *v] = self.number(part.keep, w, *g, [*m, *v]);
        }
    }

    /// The update with moments in bf16. The first moment, a mean over some ten steps, is rounded to the nearest. The second is a mean over
    /// some thousand steps: its changes are below half a unit in the last place, and rounding to the nearest would freeze it, so it
    /// is rounded stochastically.
    fn apply_bf16(&self, part: Part<'_, bf16>) {
        let mut words = [0; WORDS];
        let numbers = part.weights.iter_mut().zip(part.gradients).zip(part.first).zip(part.second);
        for (i, (((w, g), m), v)) in numbers.enumerate() {
            let (block, word) = ((part.start + i) / WORDS, (part.start + i) % WORDS);
            if i == 0 || word == 0 {
                words = philox4x32([block as u32, (block >> 32) as u32, 0, 0], self.key);
            }
            let [first, second] = self.number(part.keep, w, *g, [m.widen(), v.widen()]);
            (*m, *v) = (bf16::of(first), by_chance(second, words[word]));
        }
    }
}

/// Stochastic rounding to one of the two bf16 around a finite number: the average over all words is the number.
fn by_chance(x: f32, word: u32) -> bf16 {
    bf16::from_bits(((x.to_bits() + (word & 0xffff)) >> 16) as u16)
}

/// Called with a chunk of updated weights while they are in the cache.
pub type Then<'a> = Box<dyn FnOnce(&[f32]) + Send + 'a>;

/// A parameter to update.
pub struct Trained<'a> {
    /// Its numbers.
    pub weights: &'a mut [f32],
    /// Whether it has weight decay, as matrices do.
    pub decays: bool,
    /// Those of its numbers that have moments, and are updated.
    pub held: Range<usize>,
    /// What uses its updated weights, and how many numbers each is called with; one for each chunk of those held, or none.
    pub then: (usize, Vec<Then<'a>>),
}

impl<'a> Trained<'a> {
    /// A parameter whose updated weights nothing waits for.
    pub fn new(weights: &'a mut [f32], decays: bool) -> Self {
        Self { held: 0..weights.len(), weights, decays, then: (CHUNK, Vec::new()) }
    }
}

/// A parameter in training.
struct Tensor<'a> {
    /// Index of its first number among those of all parameters.
    start: usize,
    /// The factor that weight decay multiplies its weights by.
    keep: f32,
    weights: &'a mut [f32],
    gradients: &'a mut [f32],
    then: (usize, Vec<Then<'a>>),
}

/// A chunk of a parameter, with its gradients and moments.
struct Part<'a, T> {
    start: usize,
    keep: f32,
    weights: &'a mut [f32],
    gradients: &'a [f32],
    first: &'a mut [T],
    second: &'a mut [T],
}

/// Applies one AdamW update to all numbers with moments, and sets their gradients to zero.
///
/// # Source
/// Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>, in the order of operations of `torch.optim.AdamW`.
pub fn update<G: DerefMut<Target = [f32]> + Sync>(
    rule: &Rule,
    parameters: Vec<Trained<'_>>,
    gradients: &mut [G],
    moments: &mut Moments,
) {
    assert_eq!(parameters.len(), gradients.len(), "one gradient a parameter");
    let places = places(&parameters);
    let tensors = parameters.into_iter().zip(gradients).zip(places);
    let tensors = tensors.map(|((Trained { weights, decays, held, then }, gradients), place)| {
        let keep = if decays { rule.keep } else { 1.0 };
        let (start, gradients) = (place + held.start, &mut gradients[held.clone()]);
        Tensor { start, keep, weights: &mut weights[held], gradients, then }
    });
    match &mut moments.held {
        Held::F32(means) => each_part(tensors.collect(), means, |part| rule.apply(part)),
        Held::Bf16(means) => each_part(tensors.collect(), means, |part| rule.apply_bf16(part)),
    }
    moments.steps += 1;
}

/// Index of each parameter's first number among all, matrices first: the order on a GPU, so that the same number meets the same
/// random word there.
fn places(parameters: &[Trained<'_>]) -> Vec<usize> {
    let (mut places, mut next) = (vec![0; parameters.len()], 0);
    for matrices in [true, false] {
        for (i, parameter) in parameters.iter().enumerate().filter(|(_, parameter)| parameter.decays == matrices) {
            places[i] = next;
            next += parameter.weights.len();
        }
    }
    places
}

fn each_part<T: Number>(tensors: Vec<Tensor<'_>>, means: &mut Means<T>, apply: impl Fn(Part<'_, T>) + Sync) {
    let with_means = tensors.into_par_iter().zip(&mut means.first).zip(&mut means.second);
    with_means.for_each(|((Tensor { start, keep, weights, gradients, then: (size, then) }, first), second)| {
        assert!(then.is_empty() || then.len() == weights.len().div_ceil(size), "one for each chunk, or none");
        let mut then: Vec<Option<Then<'_>>> = then.into_iter().map(Some).collect();
        then.resize_with(weights.len().div_ceil(size), || None);
        let chunks = weights.par_chunks_mut(size).zip(gradients.par_chunks_mut(size));
        let chunks = chunks.zip(first.par_chunks_mut(size)).zip(second.par_chunks_mut(size)).zip(then).enumerate();
        chunks.for_each(|(i, ((((weights, gradients), first), second), then))| {
            apply(Part { start: start + i * size, keep, weights, gradients: &*gradients, first, second });
            gradients.fill(0.0);
            if let Some(then) = then {
                then(weights);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;
    use crate::numbers::dtype::Dtype;

    fn parameters() -> Vec<(String, Vec<usize>)> {
        vec![("a.weight".into(), vec![2, 2]), ("a.bias".into(), vec![3])]
    }

    /// AdamW as its paper states it, in f64 and one number at a time.
    fn plain(config: &OptimizerConfig, mut w: f64, gradients: &[f64], decay: f64) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for (step, g) in (1..).zip(gradients) {
            m = config.adam_beta1 * m + (1.0 - config.adam_beta1) * g;
            v = config.adam_beta2 * v + (1.0 - config.adam_beta2) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - config.adam_beta1.powi(step)), v / (1.0 - config.adam_beta2.powi(step)));
            w -= config.learning_rate * (m_hat / (v_hat.sqrt() + config.adam_epsilon) + decay * w);
        }
        w
    }

    #[test]
    fn five_updates_are_those_of_the_paper_and_only_matrices_decay() {
        let config = config();
        let mut weights = [vec![1.0f32, -0.5, 0.25, 2.0], vec![0.3, 0.0, -1.0]];
        let start = weights.clone();
        let gradient = |step: u64, index: usize| ((step * 7 + index as u64 * 3) % 11) as f32 / 10.0 - 0.45;
        let mut moments = Moments::zeros(&parameters(), Dtype::F32);
        for step in 0..5 {
            let mut gradients =
                [0, 1].map(|t| (0..weights[t].len()).map(|i| gradient(step, t + i)).collect::<Vec<_>>());
            let views = weights.iter_mut().zip([true, false]).map(|(weights, decays)| Trained::new(weights, decays));
            update(&Rule::new(&config, 1.0, step + 1, 1), views.collect(), &mut gradients, &mut moments);
            assert!(gradients.concat().iter().all(|g| *g == 0.0));
        }
        for (tensor, decay) in [(0, 0.1), (1, 0.0)] {
            for (index, (found, first)) in weights[tensor].iter().zip(&start[tensor]).enumerate() {
                let gradients: Vec<f64> = (0..5).map(|step| f64::from(gradient(step, tensor + index))).collect();
                let expected = plain(&config, f64::from(*first), &gradients, decay);
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
            }
        }
        assert_eq!(moments.steps, 5);
    }

    #[test]
    fn clipping_scales_the_gradient_to_the_limit_and_leaves_a_small_one() {
        let mut config = config();
        config.max_grad_norm = 1.0;
        assert!((Rule::new(&config, 4.0, 1, 1).gradient_scale - 0.25).abs() < 1e-6);
        assert_eq!(Rule::new(&config, 0.5, 1, 1).gradient_scale, 1.0);
        config.max_grad_norm = 0.0;
        assert_eq!(Rule::new(&config, 4.0, 1, 1).gradient_scale, 1.0);
    }

    #[test]
    fn chance_rounds_to_a_neighbour_and_to_the_number_in_the_mean() {
        for x in [1.0f32, 1.001, 0.123_456, 3e-30, 1e-40, 0.0] {
            let rounded: Vec<f64> = (0..1 << 16).map(|word| f64::from(by_chance(x, word).to_f32())).collect();
            let mean = rounded.iter().sum::<f64>() / rounded.len() as f64;
            assert!((mean - f64::from(x)).abs() <= 1e-9 * f64::from(x), "{x}: {mean}");
            let last_place = f64::from(f32::from_bits(x.to_bits() + (1 << 16))) - f64::from(x);
            assert!(rounded.iter().all(|one| (one - f64::from(x)).abs() < last_place), "{x}");
        }
    }

    /// 4,096 numbers whose gradients were 1 and then 0: their moments after `steps` steps of 0.
    fn fading(steps: u64, seed: u64) -> Moments {
        let config = OptimizerConfig { adam_beta1: 0.9, adam_beta2: 0.999, ..config() };
        let mut moments = Moments::zeros(&[("a".into(), vec![64, 64])], Dtype::Bf16);
        let mut weights = vec![0.0f32; 4096];
        for step in 1..=steps + 1 {
            let mut gradients = [vec![if step == 1 { 1.0 } else { 0.0 }; 4096]];
            let rule = Rule::new(&config, 1.0, step, seed);
            update(&rule, vec![Trained::new(&mut weights, true)], &mut gradients, &mut moments);
        }
        moments
    }

    #[test]
    fn moments_in_bf16_do_not_stand_still_and_are_the_same_for_the_same_seed() {
        let moments = fading(500, 1);
        let Held::Bf16(means) = &moments.held else { panic!("{moments:?}") };
        let mean = |numbers: &[bf16]| numbers.iter().map(|one| f64::from(one.to_f32())).sum::<f64>() / 4096.0;
        let expected = 0.001 * 0.999f64.powi(500);
        assert!((mean(&means.second[0]) / expected - 1.0).abs() < 0.005, "{} for {expected}", mean(&means.second[0]));
        let first = mean(&fading_first(20));
        assert!((first / (0.1 * 0.9f64.powi(20)) - 1.0).abs() < 0.02, "{first}");
        assert!(fading(500, 1) == moments && fading(500, 2) != moments);
    }

    fn fading_first(steps: u64) -> Vec<bf16> {
        let Held::Bf16(means) = fading(steps, 1).held else { unreachable!("made so") };
        means.first[0].to_vec()
    }
}
