//! The training step against TRL's and transformers' numbers: advantages, losses, gradients, optimizer steps.

use std::collections::BTreeMap;
use std::path::Path;

use clap::Parser;
use grpo_pipes::checkpoint;
use grpo_pipes::grpo::advantage::{ScaleRewards, advantages};
use grpo_pipes::grpo::completion::ScoredCompletion;
use grpo_pipes::grpo::groups::{Group, Groups};
use grpo_pipes::grpo::loss::{Known, LossConfig, SequenceLoss, Survey, token_weights};
use grpo_pipes::grpo::metrics::Metrics;
use grpo_pipes::grpo::pass_stats::PassStats;
use grpo_pipes::lines::jsonl::Input;
use grpo_pipes::model::{Gradients, Model, TokenSlope};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::tensors::TensorFile;
use grpo_pipes::optim::{OptimizerConfig, Schedule};
use grpo_pipes::train::config::{GrpoConfig, SupervisedConfig};
use grpo_pipes::train::grpo_step::GrpoTrainer;
use grpo_pipes::train::microbatch::{self, Sequence};
use grpo_pipes::train::supervised::{self, Example};
use grpo_pipes::train::trainer::Trainer;
use serde_json::{Value, json};

use crate::fixtures::{Reference, directory, distance, on_cpu};
use crate::process::lines;

pub type ByName = BTreeMap<String, Vec<f32>>;

pub const WHOLE: usize = 100_000;

/// The numbers of a step, from the options that give them.
#[derive(Parser)]
pub struct Numbers {
    #[command(flatten)]
    pub grpo: GrpoConfig,
    #[command(flatten)]
    pub optimizer: OptimizerConfig,
}

impl Numbers {
    pub fn of(options: &str) -> Self {
        Self::parse_from(format!("test {options}").split_whitespace())
    }
}

/// Numbers of an update whose first moment is the gradient itself.
fn probe() -> OptimizerConfig {
    Numbers::of("--learning-rate 0 --adam-beta1 0 --max-grad-norm 0").optimizer
}

pub fn tiny() -> std::path::PathBuf {
    directory().join("tiny-qwen2")
}

fn floats(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The reference's advantages, which sum to 0 in each group but for their rounding.
fn reference_advantages(reference: &Reference) -> Vec<f64> {
    let mut all = floats(&reference.json["advantages"]["train.group"]["advantages"]);
    all.chunks_mut(4).for_each(|group| group[3] = -group[..3].iter().sum::<f64>());
    all
}

/// Rollouts with advantages as rewards: `--scale-rewards none` leaves them as they are. For TRL a completion without a reward
/// counts as one of advantage 0; here it would not count at all.
pub fn records(reference: &Reference, temperature: &str, logprobs: &[f32], policy_id: Option<&str>) -> Vec<Value> {
    let rewards = reference_advantages(reference);
    let mut logprobs = logprobs;
    let mut record = |(index, one): (usize, &Value)| {
        let own = logprobs.split_off(..one["completion_token_ids"].as_array().unwrap().len()).unwrap();
        let mut record = one.clone();
        let group = index / 4;
        let more = json!({"group_id": format!("g{group}"), "group_size": 4, "sample_index": index % 4, "logprobs": own,
                          "reward": rewards[index], "temperature": temperature.parse::<f64>().unwrap(), "policy_id": policy_id});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        record
    };
    reference.json["sequences"].as_array().unwrap().iter().enumerate().map(&mut record).collect()
}

pub fn groups(records: &[Value]) -> Vec<Group> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scored.jsonl");
    std::fs::write(&path, lines(records)).unwrap();
    let limits = Model::load(&tiny()).unwrap().config().into();
    Groups::new(Input::open(&path).unwrap(), limits).collect::<grpo_pipes::Result<_>>().unwrap()
}

/// Rollouts of an older policy, as the reference has them.
pub fn old_groups(reference: &Reference, temperature: &str) -> Vec<Group> {
    groups(&records(reference, temperature, &reference.tensor(&format!("old_logprob.t{temperature}")), None))
}

/// Metrics and gradients of one step by the public way: the optimizer's first moment.
pub fn step(options: &str, groups: &[Group], micro_batch_tokens: usize) -> (Value, ByName) {
    let scale = if options.contains("normalize") { "" } else { "--scale-rewards none" };
    let config = Numbers::of(&format!("{scale} --max-staleness any {options}")).grpo;
    let mut trainer = Trainer::open(&tiny(), probe(), None, &on_cpu).unwrap();
    let mut line = Value::Null;
    let mut grpo = GrpoTrainer::new(&mut trainer, config, micro_batch_tokens, false).unwrap();
    grpo.step(groups, &mut |metrics| line = parsed(metrics)).unwrap();
    (line, first_moments(&mut trainer))
}

pub fn parsed(metrics: &Metrics) -> Value {
    serde_json::from_slice(&metrics.to_json()).unwrap()
}

fn first_moments(trainer: &mut Trainer) -> ByName {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("next");
    trainer.publish(&out, &[], Vec::new()).unwrap();
    let file = TensorFile::open(&out.join(checkpoint::OPTIMIZER)).unwrap();
    let read =
        |name: String| Some((name.strip_prefix("exp_avg.")?.to_owned(), file.read::<f32>(&name).unwrap().to_vec()));
    file.names().into_iter().filter_map(read).collect()
}

fn strided<'a>(tensors: impl IntoIterator<Item = &'a Vec<f32>>, stride: &Value) -> Vec<f32> {
    let stride = stride.as_u64().unwrap() as usize;
    tensors.into_iter().flat_map(|tensor| tensor.iter().step_by(stride).copied()).collect()
}

pub fn flat(gradients: &ByName) -> Vec<f32> {
    gradients.values().flatten().copied().collect()
}

/// 1e-5 relative; what is smaller than `scale` counts as `scale`.
pub fn assert_close(name: &str, got: f64, want: f64, scale: f64) {
    let off = (got - want).abs() / want.abs().max(scale);
    assert!(off < 1e-5, "{name}: {got} for {want}: {off:e}");
}

/// Losses are sums of terms near 1 that almost cancel out, so that f32 leaves them 1e-6.
pub const LOSS_SCALE: f64 = 0.1;

pub fn assert_metrics(case: &str, got: &Value, want: &Value) {
    assert_close(case, got["loss"].as_f64().unwrap(), want["loss"].as_f64().unwrap(), LOSS_SCALE);
    for name in [
        "kl",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "clip_ratio/low_min",
        "clip_ratio/high_max",
    ] {
        if let Some(want) = want["metrics"][name].as_f64() {
            assert_close(&format!("{case} {name}"), got[name].as_f64().unwrap(), want, 0.01);
        }
    }
}

pub fn assert_gradients(reference: &Reference, case: &str, got: &ByName, want: &Value) {
    let norm = |gradient: &Vec<f32>| gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    for (name, want) in want["grad_norms"].as_object().unwrap() {
        assert_close(&format!("{case} {name}"), norm(&got[name]), want.as_f64().unwrap(), 0.0);
    }
    let sample = strided(got.values(), &reference.json["gradient_stride"]);
    let off = distance(&sample, &reference.tensor(&format!("grad_sample.{case}")));
    assert!(off < 1e-5, "{case}: {off:e}");
}

#[test]
fn advantages_equal_trl() {
    let reference = Reference::load();
    for (case, want) in reference.json["advantages"].as_object().unwrap() {
        let (rewards, scale) = case.split_once('.').unwrap();
        let rewards: Vec<Option<f64>> = serde_json::from_value(reference.json["rewards"][rewards].clone()).unwrap();
        let rewards: Vec<_> = rewards.chunks(4).map(<[_]>::to_vec).collect();
        let scale = <ScaleRewards as clap::ValueEnum>::from_str(scale, false).unwrap();
        let got = advantages(&rewards, scale, false);
        for (got, want) in got.groups.iter().flatten().zip(floats(&want["advantages"])) {
            assert_close(case, *got, want, 0.1);
        }
        assert_close(case, got.reward_mean, want["metrics"]["reward"].as_f64().unwrap(), 0.0);
    }
}

#[test]
fn steps_without_a_reference_policy_equal_trl() {
    let reference = Reference::load();
    let old = old_groups(&reference, "1.0");
    for loss in ["grpo", "bnpo", "dr_grpo", "dapo"] {
        let case = format!("{loss}.beta0.0.t1.0");
        let options = format!("--loss {loss} --epsilon-high 0.28 --max-completion-tokens 16");
        let (line, gradients) = step(&options, &old, WHOLE);
        let want = &reference.json["losses"][&case];
        assert_metrics(&case, &line, want);
        assert_close(&case, line["grad_norm"].as_f64().unwrap(), want["grad_norm"].as_f64().unwrap(), 0.0);
        assert_gradients(&reference, &case, &gradients, want);
    }
}

#[test]
fn a_step_on_rollouts_of_the_same_weights_equals_trl_on_policy() {
    let reference = Reference::load();
    let held = checkpoint::identity(&tiny()).unwrap().policy_id;
    for temperature in ["1.0", "0.9"] {
        let case = format!("grpo.beta0.0.t{temperature}.on_policy");
        let logprobs = reference.tensor(&format!("logprob.t{temperature}"));
        let groups = groups(&records(&reference, temperature, &logprobs, Some(&held)));
        let (line, gradients) = step("--loss grpo", &groups, WHOLE);
        assert_metrics(&case, &line, &reference.json["losses"][&case]);
        assert_gradients(&reference, &case, &gradients, &reference.json["losses"][&case]);
        assert!(line["sampling/sampling_logp_difference/max"].as_f64().unwrap() < 1e-4);
    }
}

/// The part of each completion in `all`, which are one number per token.
fn each<T: Clone>(completions: &[&ScoredCompletion], all: &[T]) -> Vec<Vec<T>> {
    let mut rest = all;
    completions.iter().map(|one| rest.split_off(..one.tokens.len()).unwrap().to_vec()).collect()
}

/// A step put together from its parts, with the log-probabilities of any sampler and of any reference policy.
pub fn by_hand(config: &LossConfig, groups: &[Group], known: [&[f32]; 2], temperature: f32) -> (Value, ByName) {
    let model = Model::load(&tiny()).unwrap();
    let completions: Vec<_> = groups.iter().flat_map(|group| &group.completions).collect();
    let sequences: Vec<_> =
        completions.iter().map(|one| Sequence { prompt: &one.prompt, completion: &one.tokens }).collect();
    let counts = |index: usize| !(config.mask_truncated && completions[index].truncated);
    let length = |index: usize| if counts(index) { completions[index].tokens.len() } else { 0 };
    let weights = token_weights(config, &(0..16).map(length).collect::<Vec<_>>());
    let batch = microbatch::pack(&sequences, &(0..16).collect::<Vec<_>>());
    let known = known.map(|logprobs| each(&completions, logprobs));
    let survey = each(&completions, &model.logprobs(&batch.packed, &batch.targets, temperature));
    let entropies = (0..16).filter(|index| counts(*index)).flat_map(|index| &survey[index]);
    let mut entropies: Vec<f32> = entropies.map(|token| token.entropy).collect();
    entropies.sort_by(f32::total_cmp);
    let least_entropy = entropies[((1.0 - config.top_entropy_quantile) * (entropies.len() - 1) as f64).ceil() as usize];
    let acting = entropies.iter().filter(|entropy| **entropy >= least_entropy).count();
    let entropy_weight = -config.entropy_coef / acting as f64;
    let of = |member: usize| {
        let [sampled, reference] = [&known[0][member], &known[1][member]];
        let (old, advantage) = (Some(&completions[member].logprobs[..]), completions[member].reward.unwrap());
        let known = Known {
            advantage,
            weight: weights[member],
            entropy_weight,
            old,
            sampled,
            reference: Some(reference),
            teacher: None,
        };
        SequenceLoss::new(config, known, Some(Survey { tokens: &survey[member], least_entropy }))
    };
    let losses: Vec<_> = (0..16).map(|member| counts(member).then(|| of(member))).collect();
    let (mut tally, mut gradients) = (PassStats::new(16), Gradients::zeros(&model));
    let part = |target: usize, logprob: f32| {
        let (member, index) = batch.origins[target];
        losses[member].as_ref().map(|loss| loss.token(index, logprob))
    };
    let slope = |target: usize, logprob: f32| {
        part(target, logprob).map_or(TokenSlope::default(), |part| TokenSlope {
            logprob: part.slope as f32,
            entropy: part.entropy_slope as f32,
        })
    };
    let stats = model.accumulate_gradients(&batch.packed, &batch.targets, temperature, &mut gradients, &slope);
    for (target, stats) in stats.iter().enumerate() {
        tally.add(batch.origins[target].0, stats, None, part(target, stats.logprob));
    }
    let mut line = Metrics::default();
    line.real("loss", tally.loss);
    tally.report(&mut line, true);
    let names = model.config().trainable().named().into_iter().map(|(name, _)| name);
    (parsed(&line), names.zip(gradients.0.iter().map(|gradient| gradient.to_vec())).collect())
}

#[test]
fn losses_with_a_reference_policy_and_with_masks_equal_trl() {
    let reference = Reference::load();
    let cases = ["grpo", "bnpo", "dr_grpo", "dapo"].map(|loss| [(loss, "1.0", false), (loss, "1.0", true)]);
    for (loss, temperature, masked) in cases.into_iter().flatten().chain([("grpo", "0.9", false)]) {
        let (suffix, flag) = if masked { (".masked", "--mask-truncated") } else { ("", "") };
        let case = format!("{loss}.beta0.04.t{temperature}{suffix}");
        let options = format!("--loss {loss} --beta 0.04 --epsilon-high 0.28 --max-completion-tokens 16 {flag}");
        let groups = old_groups(&reference, temperature);
        let logprobs = reference.tensor(&format!("ref_logprob.t{temperature}"));
        let config = Numbers::of(&options).grpo.loss;
        let (line, gradients) = by_hand(&config, &groups, [&logprobs; 2], temperature.parse().unwrap());
        assert_metrics(&case, &line, &reference.json["losses"][&case]);
        assert_gradients(&reference, &case, &gradients, &reference.json["losses"][&case]);
    }
}

#[test]
fn importance_sampling_of_stale_rollouts_equals_trl_on_the_first_pass_and_on_later_ones() {
    let reference = Reference::load();
    let old = old_groups(&reference, "1.0");
    let compare = |case: &str, (line, gradients): (Value, ByName)| {
        let want = &reference.json["losses"][case];
        assert_metrics(case, &line, want);
        assert_gradients(&reference, case, &gradients, want);
        for name in ["min", "mean", "max"].map(|part| format!("sampling/importance_sampling_ratio/{part}")) {
            assert_close(&name, line[&name].as_f64().unwrap(), want["metrics"][&name].as_f64().unwrap(), 0.0);
        }
        let truncated = line["sampling/importance_sampling_ratio/clipped_ratio"].as_f64().unwrap();
        assert!((0.02..0.3).contains(&truncated), "{case}: {truncated}");
    };
    let options = "--epsilon-high 0.28 --importance-sampling-clip-max 1.5";
    compare("dapo.beta0.0.t1.0.importance.first", step(&format!("--loss dapo {options}"), &old, WHOLE));
    let [sampled, of_reference] = ["sampler_logprob.t1.0", "ref_logprob.t1.0"].map(|name| reference.tensor(name));
    for loss in ["grpo", "dapo"] {
        let config = Numbers::of(&format!("--loss {loss} --beta 0.04 {options}")).grpo.loss;
        let got = by_hand(&config, &old, [&sampled, &of_reference], 1.0);
        compare(&format!("{loss}.beta0.04.t1.0.importance.later"), got);
    }
}

#[test]
fn in_a_second_iteration_importance_stays_that_of_the_weights_that_the_step_began_with() {
    let reference = Reference::load();
    let (groups, lines) = (old_groups(&reference, "1.0"), std::cell::RefCell::new(Vec::new()));
    let options = "--scale-rewards none --max-staleness any --num-iterations 2 --importance-sampling-clip-max 1.5";
    let optimizer = Numbers::of("--learning-rate 1e-3").optimizer;
    let mut trainer = Trainer::open(&tiny(), optimizer, None, &on_cpu).unwrap();
    let mut grpo = GrpoTrainer::new(&mut trainer, Numbers::of(options).grpo, WHOLE, false).unwrap();
    grpo.step(&groups, &mut |line| lines.borrow_mut().push(parsed(line))).unwrap();
    let [first, second] = &lines.borrow()[..] else { panic!("two lines") };
    for name in ["min", "mean", "max"].map(|part| format!("sampling/importance_sampling_ratio/{part}")) {
        assert_eq!(first[&name], second[&name]);
    }
    assert_eq!(first["clip_ratio/region_mean"], 0.0);
    assert_ne!(second["clip_ratio/region_mean"], 0.0, "the ratio is that to the first iteration");
}

/// The tiny model with noise on every weight, as a directory.
fn noisy(dir: &Path) -> Model {
    let mut model = Model::load(&tiny()).unwrap();
    for (i, parameter) in model.parameters_mut().into_iter().enumerate() {
        parameter.iter_mut().enumerate().for_each(|(j, x)| *x *= 1.0 + 0.05 * ((i * 31 + j * 7) as f32).sin());
    }
    checkpoint::copy_companions(&tiny(), dir, "float32").unwrap();
    model.save(&dir.join(checkpoint::WEIGHTS), Dtype::F32).unwrap();
    model
}

#[test]
fn a_step_with_a_reference_policy_is_the_one_made_from_its_parts() {
    let (reference, dir) = (Reference::load(), tempfile::tempdir().unwrap());
    let other = noisy(dir.path());
    let groups = old_groups(&reference, "0.9");
    let sequences = groups.iter().flat_map(|group| &group.completions);
    let sequences: Vec<_> = sequences.map(|one| Sequence { prompt: &one.prompt, completion: &one.tokens }).collect();
    let batch = microbatch::pack(&sequences, &(0..16).collect::<Vec<_>>());
    let logprobs: Vec<f32> =
        other.logprobs(&batch.packed, &batch.targets, 0.9).iter().map(|stats| stats.logprob).collect();
    for more in ["", "--mask-truncated"] {
        let options = format!("--loss dapo --beta 0.04 --epsilon-high 0.28 {more}");
        let with_directory = format!("{options} --reference {}", dir.path().display());
        let (line, gradients) = step(&with_directory, &groups, WHOLE);
        let (want_line, want) = by_hand(&Numbers::of(&options).grpo.loss, &groups, [&logprobs; 2], 0.9);
        assert!(want_line["kl"].as_f64().unwrap() > 0.01);
        for name in ["loss", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"] {
            assert_close(name, line[name].as_f64().unwrap(), want_line[name].as_f64().unwrap(), LOSS_SCALE);
        }
        let off = distance(&flat(&gradients), &flat(&want));
        assert!(off < 1e-5, "{off:e}");
    }
}

#[test]
fn an_unscored_completion_has_no_gradient_and_no_token_in_the_denominator() {
    let reference = Reference::load();
    let mut with = records(&reference, "1.0", &reference.tensor("old_logprob.t1.0"), None);
    with[6]["reward"] = Value::Null;
    let mut without = with.clone();
    without.remove(6);
    without[4..7].iter_mut().for_each(|record| record["group_size"] = 3.into());
    let of = |records: &[Value], loss: &str| step(&format!("--loss {loss}"), &groups(records), WHOLE);
    let (line, with_it) = of(&with, "dapo");
    let (_, without_it) = of(&without, "dapo");
    assert!(distance(&flat(&with_it), &flat(&without_it)) < 1e-5);
    assert_eq!(line["num_unscored"], 1);
    let scaled: Vec<f32> = flat(&of(&without, "grpo").1).iter().map(|gradient| gradient * (15.0 / 16.0)).collect();
    assert!(distance(&flat(&of(&with, "grpo").1), &scaled) < 1e-5, "grpo still divides by all completions");
}

#[test]
fn neither_the_order_nor_the_cut_of_a_batch_changes_the_gradient() {
    let (reference, dir) = (Reference::load(), tempfile::tempdir().unwrap());
    noisy(dir.path());
    let records = records(&reference, "1.0", &reference.tensor("old_logprob.t1.0"), None);
    let order = |indices: &[usize]| groups(&indices.iter().map(|index| records[*index].clone()).collect::<Vec<_>>());
    let as_is = order(&(0..16).collect::<Vec<_>>());
    let mixed = order(&[9, 3, 14, 0, 8, 1, 4, 12, 5, 2, 15, 6, 13, 7, 11, 10]);
    assert_ne!(as_is[0].id, mixed[0].id);
    for loss in ["grpo", "bnpo", "dr_grpo", "dapo"] {
        let more = format!("--mask-truncated --max-completion-tokens 16 --reference {}", dir.path().display());
        let options = format!("--loss {loss} --beta 0.04 {more}");
        let (line, whole) = step(&options, &as_is, WHOLE);
        for (groups, micro_batch_tokens) in [(&as_is, 1), (&as_is, 50), (&mixed, WHOLE), (&mixed, 33)] {
            let (other_line, other) = step(&options, groups, micro_batch_tokens);
            let off = distance(&flat(&other), &flat(&whole));
            assert!(off < 1e-5, "{loss} {micro_batch_tokens}: {off:e}");
            assert_close(loss, other_line["loss"].as_f64().unwrap(), line["loss"].as_f64().unwrap(), LOSS_SCALE);
        }
    }
}

#[test]
fn five_optimizer_steps_equal_trl() {
    let reference = Reference::load();
    let groups = old_groups(&reference, "1.0");
    for (run, want) in reference.json["optimizer"].as_object().unwrap() {
        let of = |name: &str| want["options"][name].to_string().replace('"', "");
        let options = format!(
            "--loss grpo --scale-rewards none --max-staleness any --epsilon-high 0.28 --adam-beta2 0.99 --weight-decay 0.1 \
             --learning-rate {} --schedule {} --warmup-ratio {} --total-steps {} --max-grad-norm {}",
            of("learning_rate"),
            of("lr_scheduler_type"),
            of("warmup_ratio"),
            of("total_steps"),
            of("max_grad_norm")
        );
        let numbers = Numbers::of(&options);
        let mut trainer = Trainer::open(&tiny(), numbers.optimizer, None, &on_cpu).unwrap();
        let start = weights(&mut trainer);
        for (index, want_step) in want["steps"].as_array().unwrap().iter().enumerate() {
            let mut line = Value::Null;
            let mut grpo = GrpoTrainer::new(&mut trainer, numbers.grpo.clone(), WHOLE, false).unwrap();
            grpo.step(&groups, &mut |metrics| line = parsed(metrics)).unwrap();
            // Rounding of the first updates comes back, larger, in the ratios of the later ones.
            let bound = if index < 2 { 1e-5 } else { 5e-5 };
            for (name, scale) in [("loss", LOSS_SCALE), ("grad_norm", 0.0), ("learning_rate", 1e-12)] {
                let (got, want) = (line[name].as_f64().unwrap(), want_step[name].as_f64().unwrap());
                assert!((got - want).abs() <= bound * want.abs().max(scale), "{run} {index} {name}: {got} for {want}");
            }
            assert_weights(&reference, (run, index + 1), &start, &weights(&mut trainer));
        }
    }
}

pub fn weights(trainer: &mut Trainer) -> ByName {
    let names = trainer.model_config().stored().named().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    names.into_iter().zip(trainer.weights().unwrap().parameters().into_iter().map(<[f32]>::to_vec)).collect()
}

pub fn assert_weights(reference: &Reference, (run, step): (&str, usize), start: &ByName, got: &ByName) {
    let wanted = &reference.json["optimizer"][run]["update_norms"][step.to_string()];
    let Some(norms) = wanted.as_object() else { return };
    for (name, want) in norms.iter().filter(|(name, _)| got.contains_key(*name)) {
        let squares = got[name].iter().zip(&start[name]).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
        let (norm, want) = (squares.sum::<f64>().sqrt(), want.as_f64().unwrap());
        // A weight's own rounding is up to 1e-4 of what one step adds to it. What all keys share moves no softmax: of a key's bias
        // the slowly turning elements have a gradient that is rounding alone, and Adam brings any gradient to the same size.
        let rounding = if name.ends_with("k_proj.bias") { 3e-4 } else { 1e-4 };
        assert!((norm - want).abs() <= rounding * step as f64 * want, "{run} step {step} {name}: {norm} for {want}");
    }
    if norms.values().any(|norm| norm.as_f64() != Some(0.0)) {
        let sample = strided(got.values(), &reference.json["weight_stride"]);
        let off = distance(&sample, &reference.tensor(&format!("weight_sample.{run}.step{step}")));
        assert!(off < 1e-6, "{run} step {step}: {off:e}");
    }
}

#[test]
fn learning_rates_equal_transformers() {
    let reference = Reference::load();
    for (case, want) in reference.json["schedules"].as_object().unwrap() {
        let (name, rest) = case.split_once(".warmup").unwrap();
        let (warmup_ratio, total) = rest.split_once(".total").unwrap();
        let schedule = match name {
            "constant" if warmup_ratio != "0.0" => continue, // transformers' `constant` knows no warm-up
            "constant" | "constant_with_warmup" => Schedule::Constant,
            "linear" => Schedule::Linear,
            _ => Schedule::Cosine,
        };
        let options = format!("--learning-rate 1 --total-steps {total} --warmup-ratio {warmup_ratio}");
        let config = OptimizerConfig { schedule, ..Numbers::of(&options).optimizer };
        for pair in want["factors"].as_array().unwrap() {
            let (got, want) = (config.learning_rate_at(pair[0].as_u64().unwrap()), pair[1].as_f64().unwrap());
            assert!((got - want).abs() < 1e-12, "{case} {}: {got} for {want}", pair[0]);
        }
    }
}

#[test]
fn supervised_steps_equal_transformers() {
    let reference = Reference::load();
    let examples: Vec<Example> = (reference.sequences().into_iter())
        .map(|(prompt, completion)| Example { prompt, completion, digest: [0; 32] })
        .collect();
    for (case, loss_on_prompt) in [("completion", false), ("all", true)] {
        let want = &reference.json["supervised"][case];
        for micro_batch_tokens in [WHOLE, 30] {
            let mut trainer = Trainer::open(&tiny(), probe(), None, &on_cpu).unwrap();
            let config = SupervisedConfig { loss_on_prompt, micro_batch_tokens };
            let line = parsed(&supervised::step(&mut trainer, config, &examples).unwrap());
            for name in ["loss", "grad_norm"] {
                assert_close(case, line[name].as_f64().unwrap(), want[name].as_f64().unwrap(), 0.0);
            }
            assert_gradients(&reference, &format!("supervised.{case}"), &first_moments(&mut trainer), want);
        }
    }
}
