//! The loss of a token against plain formulas and finite differences.

use std::slice::from_ref;

use super::*;
use crate::model::TokenStats;
use clap::Parser;
use proptest::prelude::*;

#[derive(Parser)]
struct Options {
    #[command(flatten)]
    loss: LossConfig,
}

fn parse(options: &str) -> LossConfig {
    Options::parse_from(format!("test {options}").split_whitespace()).loss
}

fn config(kind: LossKind, beta: f64) -> LossConfig {
    LossConfig { kind, beta, ..parse("--epsilon-high 0.28 --max-completion-tokens 10") }
}

/// What is known of a token, and its log-probability under the policy in training.
struct Logprobs {
    now: f32,
    old: Option<f32>,
    sampled: f32,
    reference: Option<f32>,
}

/// The loss of a completion of one token.
fn token_loss(config: &LossConfig, advantage: f64, Logprobs { now, old, sampled, reference }: Logprobs) -> TokenLoss {
    let [old, reference] = [&old, &reference].map(|one| one.as_ref().map(from_ref));
    let known = Known {
        advantage,
        weight: 1.0,
        entropy_weight: 0.0,
        old,
        sampled: from_ref(&sampled),
        reference,
        teacher: None,
    };
    SequenceLoss::new(config, known, None).token(0, now)
}

/// A token that the old policy sampled.
fn logprobs(now: f32, old: Option<f32>, reference: Option<f32>) -> Logprobs {
    Logprobs { now, old, sampled: old.unwrap_or(now), reference }
}

proptest! {
    #[test]
    fn the_slope_is_the_derivative(
        advantage in -3.0f64..3.0, logprob in -6.0f32..-0.1, old in -6.0f32..-0.1, reference in -6.0f32..-0.1,
        sampled in -6.0f32..-0.1, most in prop::option::of(0.5f64..3.0),
    ) {
        let config = LossConfig { importance_sampling_clip_max: most, ..config(LossKind::Dapo, 0.04) };
        let step = 2.0f32.powi(-10);
        let at = |now: f32| {
            token_loss(&config, advantage, Logprobs { now, old: Some(old), sampled, reference: Some(reference) })
        };
        let (below, here, above) = (at(logprob - step), at(logprob), at(logprob + step));
        prop_assume!(below.clipped == above.clipped);
        let width = f64::from(logprob + step) - f64::from(logprob - step);
        let numeric = (above.loss - below.loss) / width;
        prop_assert!((numeric - here.slope).abs() < 1e-4 * (1.0 + here.slope.abs()), "{numeric} {}", here.slope);
    }

    /// Of a completion whose tokens share a ratio: each token's slope is that of the sum of all losses.
    #[test]
    fn slopes_of_a_shared_ratio_are_the_derivatives_of_the_sum(
        advantage in -3.0f64..3.0, now in prop::collection::vec(-6.0f32..-0.1, 4), moved in 0usize..4,
        off in prop::collection::vec(-0.3f32..0.3, 16),
        options in prop::sample::select(vec![
            "--loss gspo", "--loss luspo --kl-estimator k1", "--loss sapo --ratio-level sequence",
            "--loss gspo --kl-estimator k2 --importance-sampling-clip-max 1.1", "--loss gspo --delta 1.3 --kl-estimator k3",
        ]),
    ) {
        let config = parse(&format!("{options} --beta 0.2 --distill 0.3"));
        let near = |from: usize| now.iter().zip(&off[from..]).map(|(now, off)| now + off).collect::<Vec<f32>>();
        let [old, sampled, reference, teacher] = [near(0), near(4), near(8), near(12)];
        let known =
            Known { advantage, weight: 0.5, entropy_weight: 0.0, old: Some(&old), sampled: &sampled, reference: Some(&reference), teacher: Some(&teacher) };
        let losses = |now: &[f32]| {
            let survey: Vec<_> = now.iter().map(|logprob| TokenStats { logprob: *logprob, entropy: 1.0 }).collect();
            let loss = SequenceLoss::new(&config, known, Some(Survey { tokens: &survey, least_entropy: 0.0 }));
            now.iter().enumerate().map(|(at, now)| loss.token(at, *now)).collect::<Vec<_>>()
        };
        let at = |step: f32| {
            let mut now = now.clone();
            now[moved] += step;
            (f64::from(now[moved]), losses(&now))
        };
        let step = 2.0f32.powi(-10);
        let ((from, below), (_, here), (to, above)) = (at(-step), at(0.0), at(step));
        prop_assume!(below[0].clipped == above[0].clipped);
        prop_assume!(below.iter().zip(&above).all(|(a, b)| a.importance == b.importance));
        let sum = |losses: &[TokenLoss]| losses.iter().map(|one| one.loss).sum::<f64>();
        let numeric = (sum(&above) - sum(&below)) / (to - from);
        prop_assert!((numeric - here[moved].slope).abs() < 1e-3 * (1.0 + numeric.abs()), "{numeric} {:?}", here[moved]);
    }

    #[test]
    fn kl_is_never_negative(logprob in -30.0f32..0.0, reference in -30.0f32..0.0) {
        let found = token_loss(&config(LossKind::Grpo, 1.0), 0.0, logprobs(logprob, None, Some(reference)));
        prop_assert!(found.kl >= 0.0);
    }

    #[test]
    fn any_log_probabilities_give_a_finite_loss(
        now in -1e30f32..0.0, old in -1e30f32..0.0, sampled in -1e30f32..0.0, reference in -1e30f32..0.0,
    ) {
        let config = LossConfig { importance_sampling_clip_max: Some(1e30), ..config(LossKind::Grpo, 0.1) };
        let found = token_loss(&config, -1.0, Logprobs { now, old: Some(old), sampled, reference: Some(reference) });
        prop_assert!(found.loss.is_finite() && found.slope.is_finite());
    }
}

#[test]
fn without_an_old_policy_the_gradient_is_the_plain_policy_gradient() {
    let found = token_loss(&config(LossKind::Dapo, 0.0), 1.5, logprobs(-3.0, None, None));
    assert_eq!((found.loss, found.slope, found.clipped), (-1.5, -1.5, Some(Clipped::No)));
}

/// Of samples of the policy itself: the divergence of the policy from the reference, the reverse one, or nothing.
#[test]
fn the_expected_slope_of_each_penalty_is_the_gradient_of_what_it_says() {
    let (policy, reference) = ([0.7f32, 0.2, 0.1], [0.3f32, 0.3, 0.4].map(f64::from));
    let probabilities = |logits: [f64; 3]| {
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        logits.map(|logit| logit.exp() / sum)
    };
    let divergence = |p: [f64; 3], q: [f64; 3]| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
    let forward = |logits| divergence(probabilities(logits), reference);
    let reverse = |logits| divergence(reference, probabilities(logits));
    let what = |estimator: &str, logits| match estimator {
        "k1" => 0.0,
        "k3" => reverse(logits),
        _ => forward(logits),
    };
    let logits = policy.map(|p| f64::from(p).ln());
    for estimator in ["k3-weighted", "k2", "k3", "k1"] {
        let config = parse(&format!("--beta 1 --kl-estimator {estimator}"));
        for moved in 0..3 {
            let at = |offset: f64| {
                let mut logits = logits;
                logits[moved] += offset;
                what(estimator, logits)
            };
            let slope_of = |token: usize| {
                let known = logprobs(policy[token].ln(), None, Some(reference[token].ln() as f32));
                let slope = token_loss(&config, 0.0, known).slope;
                slope * (f64::from(u8::from(token == moved)) - f64::from(policy[moved]))
            };
            let expected: f64 = (0..3).map(|token| f64::from(policy[token]) * slope_of(token)).sum();
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((expected - numeric).abs() < 1e-6, "{estimator}: {expected} {numeric}");
        }
    }
}

#[test]
fn clipping_stops_the_gain_on_each_side_but_never_the_way_back() {
    let config = config(LossKind::Dapo, 0.0);
    let at = |advantage, ratio: f32| token_loss(&config, advantage, logprobs(ratio.ln() - 3.0, Some(-3.0), None));
    let high = at(1.0, 1.5);
    assert_eq!((high.slope, high.clipped), (0.0, Some(Clipped::High)));
    assert!((high.loss + 1.28).abs() < 1e-6);
    let low = at(-1.0, 0.5);
    assert_eq!((low.slope, low.clipped), (0.0, Some(Clipped::Low)));
    assert!((low.loss - 0.8).abs() < 1e-6);
    for (advantage, ratio) in [(-1.0, 1.5), (1.0, 0.5)] {
        let back = at(advantage, ratio);
        assert_eq!(back.clipped, Some(Clipped::No));
        assert!((back.slope + advantage * f64::from(ratio)).abs() < 1e-6);
    }
    assert_eq!(at(1.0, 1.27).clipped, Some(Clipped::No));
}

/// Whatever sampled the tokens, the weighted slopes are on average those of tokens that the policy itself sampled.
#[test]
fn importance_makes_good_for_another_sampler_as_far_as_it_is_not_truncated() {
    let (policy, sampler, advantages) = ([0.7f32, 0.2, 0.1], [0.3f32, 0.3, 0.4], [1.0, -2.0, 0.5]);
    let mean_slope = |most: f64, sampled_by: [f32; 3]| -> f64 {
        let config = LossConfig { importance_sampling_clip_max: Some(most), ..config(LossKind::Dapo, 0.0) };
        let slope = |token: usize| {
            let (now, sampled) = (policy[token].ln(), sampled_by[token].ln());
            token_loss(&config, advantages[token], Logprobs { now, old: None, sampled, reference: None }).slope
        };
        (0..3).map(|token| f64::from(sampled_by[token]) * slope(token)).sum()
    };
    let own = mean_slope(10.0, policy);
    assert!((own + (0.7 - 0.4 + 0.05)).abs() < 1e-6, "{own}");
    assert!((mean_slope(10.0, sampler) - own).abs() < 1e-6);
    // The first token is 7/3 times as likely as when it was sampled; half of that counts.
    let truncated = mean_slope(7.0 / 6.0, sampler);
    assert!((truncated + (0.35 - 0.4 + 0.05)).abs() < 1e-6, "{truncated}");
}

#[test]
fn clipping_holds_the_policy_near_the_old_one_and_not_near_the_sampler() {
    let config = LossConfig { importance_sampling_clip_max: Some(2.5), ..config(LossKind::Dapo, 0.0) };
    let at = |now: f32| {
        let known = Logprobs { now: now - 3.0, old: Some(-3.0), sampled: 0.5f32.ln() - 3.0, reference: None };
        token_loss(&config, 1.0, known)
    };
    let near = at(1.1f32.ln());
    assert_eq!(near.clipped, Some(Clipped::No)); // though 2.2 times as likely as when it was sampled
    assert!((near.slope + 2.2).abs() < 1e-5, "{near:?}");
    let far = at(1.5f32.ln());
    assert_eq!((far.slope, far.clipped), (0.0, Some(Clipped::High)));
    assert!((far.loss + 2.56).abs() < 1e-5, "{far:?}");
    assert_eq!(far.importance.map(|importance| importance.truncated), Some(false));
    assert_eq!(config.check().map_err(|err| err.exit_code()), Ok(()));
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let config = LossConfig { importance_sampling_clip_max: Some(wrong), ..config.clone() };
        assert_eq!(config.check().map_err(|err| err.exit_code()), Err(2), "{wrong}");
    }
}

#[test]
fn weights_sum_to_what_each_loss_averages_over() {
    let lengths = [4, 1, 0, 5];
    let total = |kind| {
        let weights = token_weights(&config(kind, 0.0), &lengths);
        weights.iter().zip(lengths).map(|(weight, length)| weight * length as f64).sum::<f64>()
    };
    assert!((total(LossKind::Grpo) - 0.75).abs() < 1e-12); // three of four completions count
    assert!((total(LossKind::Bnpo) - 1.0).abs() < 1e-12);
    assert!((total(LossKind::Dapo) - 1.0).abs() < 1e-12);
    assert!((total(LossKind::DrGrpo) - 10.0 / 40.0).abs() < 1e-12);
}

#[test]
fn the_gradient_of_each_token_for_itself_is_the_shared_one_where_nothing_tells_tokens_apart() {
    let (now, old) = ([-1.0f32, -2.5, -0.3], [-1.2f32, -2.4, -0.4]);
    let slopes = |options: &str| -> Vec<f64> {
        let config = parse(&format!("--loss gspo {options}"));
        let survey = now.map(|logprob| TokenStats { logprob, entropy: 1.0 });
        let known = Known {
            advantage: 1.5,
            weight: 1.0,
            entropy_weight: 0.0,
            old: Some(&old),
            sampled: &old,
            reference: None,
            teacher: None,
        };
        let loss = SequenceLoss::new(&config, known, Some(Survey { tokens: &survey, least_entropy: 0.0 }));
        (0..3).map(|at| loss.token(at, now[at]).slope).collect()
    };
    let shared = slopes("");
    let ratio = (0.2f64 / 3.0).exp();
    assert!(shared.iter().all(|slope| (slope + 1.5 * ratio).abs() < 1e-6), "{shared:?}");
    for (shared, own) in shared.iter().zip(slopes("--ratio-level sequence_token")) {
        assert!((shared - own).abs() < 1e-12);
    }
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    for options in [
        "--loss dr_grpo",
        "--loss cispo",
        "--loss gspo --ratio-level token",
        "--loss sapo --delta 2",
        "--delta 1.1",
        "--loss sapo --sapo-temperature-neg 0",
        "--sapo-temperature-neg 2",
        "--loss sapo --epsilon-high 0.3",
        "--top-entropy-quantile 0",
        "--off-policy-mask-threshold=-1",
        "--importance-sampling-mode token_mask",
        "--importance-sampling-clip-max 1 --importance-sampling-clip-min 2",
    ] {
        assert_eq!(parse(options).check().map_err(|err| err.exit_code()), Err(2), "{options}");
    }
    assert!(parse("--loss cispo --epsilon-high 5 --kl-estimator k3 --beta 0.04").check().is_ok());
}
