//! The sampler against a slow one that sorts, in f64, written from transformers' definitions.

use grpo_pipes::engine::Sampler;
use grpo_pipes::model::Sampling;
use grpo_pipes::numbers::rng::Stream;
use proptest::prelude::*;

/// Probability of each token: repetition penalty, temperature, top-k, top-p, min-p.
fn plain(logits: &[f32], history: &[u32], sampling: &Sampling) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    let penalty = f64::from(sampling.repetition_penalty);
    for (token, score) in scores.iter_mut().enumerate().filter(|(token, _)| history.contains(&(*token as u32))) {
        let logit = f64::from(logits[token]);
        *score = if logit < 0.0 { logit * penalty } else { logit / penalty };
    }
    scores.iter_mut().for_each(|score| *score /= f64::from(sampling.temperature));
    let mut descending: Vec<usize> = (0..scores.len()).collect();
    descending.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    if sampling.top_k > 0 {
        let least = scores[descending[sampling.top_k.min(scores.len()) - 1]];
        scores.iter_mut().filter(|score| **score < least).for_each(|score| *score = f64::NEG_INFINITY);
    }
    if sampling.top_p < 1.0 {
        let probabilities = softmax(&scores);
        let mut likelier = 0.0;
        for &token in &descending {
            if likelier >= f64::from(sampling.top_p) {
                scores[token] = f64::NEG_INFINITY;
            }
            likelier += probabilities[token];
        }
    }
    let probabilities = softmax(&scores);
    let least = f64::from(sampling.min_p) * probabilities.iter().copied().fold(0.0, f64::max);
    for (score, _) in scores.iter_mut().zip(probabilities).filter(|(_, p)| *p < least) {
        *score = f64::NEG_INFINITY;
    }
    softmax(&scores)
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

fn settings() -> impl Strategy<Value = Sampling> {
    let truncation = (
        prop_oneof![Just(0usize), 1..40usize, Just(5000)],
        prop_oneof![Just(1.0f32), 0.05..0.999f32],
        prop_oneof![Just(0.0f32), 0.001..0.9f32],
    );
    (0.2..3.0f32, truncation, prop_oneof![Just(1.0f32), 0.7..1.6f32]).prop_map(
        |(temperature, (top_k, top_p, min_p), repetition_penalty)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_token_and_its_log_probability_are_those_of_the_plain_distribution(
        logits in prop::collection::vec(-12.0..12.0f32, 1..3000),
        sampling in settings(),
        picks in prop::collection::vec(0..3000u32, 0..40),
        uniform in 0.0..1.0f64,
    ) {
        let history: Vec<u32> = picks.into_iter().filter(|&token| (token as usize) < logits.len()).collect();
        let (before, since) = history.split_at(history.len() / 2);
        let (token, logprob) = Sampler::default().draw(&logits, [before, since], uniform, &sampling).unwrap();
        let p = plain(&logits, &history, &sampling);
        let below: f64 = p[..token as usize].iter().sum();
        // A cut within rounding of a token's own probability may fall on either side of it: nothing to compare then.
        prop_assume!(p.iter().all(|&p| p == 0.0 || p > 1e-12));
        let edge = |p: f64| p > 0.0;
        prop_assert!(edge(p[token as usize]), "token {token} has probability 0");
        prop_assert!(below <= uniform + 1e-5 && uniform - 1e-5 <= below + p[token as usize], "{below} {uniform}");
        prop_assert!((f64::from(logprob) - p[token as usize].ln()).abs() < 1e-4, "{logprob} {}", p[token as usize].ln());
    }
}

/// Draws follow the plain distribution: the chi-square statistic stays below its 99.99 % quantile, approximated by Wilson and
/// Hilferty.
fn check_distribution(logits: &[f32], history: &[u32], sampling: Sampling) {
    const DRAWS: u64 = 200_000;
    let p = plain(logits, history, &sampling);
    let stream = Stream::new(3, 1, "chi-square");
    let mut sampler = Sampler::default();
    let mut counts = vec![0u64; logits.len()];
    for i in 0..DRAWS {
        let uniform = stream.uniform(i % 16, i / 16);
        counts[sampler.draw(logits, [history, &[]], uniform, &sampling).unwrap().0 as usize] += 1;
    }
    let (mut statistic, mut cells, mut rare) = (0.0, 0.0, (0.0, 0.0));
    let mut add = |count: f64, expected: f64| {
        statistic += (count - expected).powi(2) / expected;
        cells += 1.0;
    };
    for (&count, p) in counts.iter().zip(p) {
        let expected = p * DRAWS as f64;
        assert!(p > 0.0 || count == 0, "an impossible token was drawn");
        if expected >= 10.0 {
            add(count as f64, expected);
        } else {
            rare = (rare.0 + count as f64, rare.1 + expected);
        }
    }
    if rare.1 >= 10.0 {
        add(rare.0, rare.1);
    }
    let freedom: f64 = cells - 1.0;
    let spread = 2.0 / (9.0 * freedom);
    let quantile = freedom * (1.0 - spread + 3.719 * spread.sqrt()).powi(3);
    assert!(freedom > 3.0 && statistic < quantile, "{statistic} of {quantile}, {freedom} degrees of freedom");
}

fn some_logits(n: usize) -> Vec<f32> {
    let stream = Stream::new(9, 9, "logits");
    (0..n).map(|i| (stream.uniform(0, i as u64) * 9.0 - 5.0) as f32).collect()
}

#[test]
fn drawn_tokens_follow_the_distribution() {
    let plain = Sampling::default();
    check_distribution(&some_logits(400), &[], plain);
    check_distribution(&some_logits(400), &[], Sampling { temperature: 0.7, ..plain });
    check_distribution(&some_logits(400), &[1, 2, 3, 50], Sampling { repetition_penalty: 1.3, ..plain });
    check_distribution(&some_logits(2500), &[], Sampling { top_k: 20, ..plain });
    check_distribution(&some_logits(2500), &[], Sampling { top_p: 0.8, ..plain });
    check_distribution(&some_logits(400), &[], Sampling { min_p: 0.1, temperature: 1.2, ..plain });
    let all = Sampling { temperature: 0.9, top_k: 50, top_p: 0.9, min_p: 0.05, repetition_penalty: 1.1 };
    check_distribution(&some_logits(400), &[7, 8], all);
}

#[test]
fn greedy_takes_the_lowest_of_the_likeliest_and_records_the_softmax() {
    let logits = [0.5, 2.0, -1.0, 2.0];
    let greedy = Sampling { temperature: 0.0, top_k: 1, ..Sampling::default() };
    let (token, logprob) = Sampler::default().draw(&logits, [&[], &[]], 0.99, &greedy).unwrap();
    let p = plain(&logits, &[], &Sampling::default());
    assert_eq!(token, 1);
    assert!((f64::from(logprob) - p[1].ln()).abs() < 1e-6);
}

#[test]
fn a_token_without_probability_is_never_drawn() {
    // e^-200 is 0 in f32: only the tokens in the middle can come, whatever the draw.
    let mut logits = vec![-200.0; 5000];
    logits[2047] = 1.0;
    logits[3000] = 1.0;
    for uniform in [0.0, 0.25, 0.5, 1.0 - f64::EPSILON] {
        let (token, _) = Sampler::default().draw(&logits, [&[], &[]], uniform, &Sampling::default()).unwrap();
        assert!([2047, 3000].contains(&token), "{token} at {uniform}");
    }
}

#[test]
fn logits_that_are_not_finite_give_nothing() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            let mut logits = some_logits(100);
            logits[63] = bad;
            assert_eq!(Sampler::default().draw(&logits, [&[], &[]], 0.5, &sampling), None);
        }
    }
}
