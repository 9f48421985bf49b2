//! Every loss, mask and KL estimate against TRL's numbers, and how the trainer puts them together.

use grpo_pipes::checkpoint;
use grpo_pipes::model::Model;
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::train::grpo_step::GrpoTrainer;
use grpo_pipes::train::trainer::Trainer;
use serde_json::{Value, json};

use crate::fixtures::{Reference, distance, on_cpu};
use crate::grpo::{
    LOSS_SCALE, Numbers, WHOLE, assert_close, assert_gradients, assert_metrics, assert_weights, by_hand, flat, groups,
    old_groups, parsed, records, step, tiny, weights,
};
use crate::process::{lines, run};

#[test]
fn losses_masks_and_kl_estimates_equal_trl() {
    let (reference, losses) = (Reference::load(), Reference::of_losses());
    let old = old_groups(&reference, "1.0");
    let [sampled, given, of_reference] =
        ["sampler_logprob.t1.0", "old_logprob.t1.0", "ref_logprob.t1.0"].map(|name| reference.tensor(name));
    for (options, want) in losses.json["losses"].as_object().unwrap() {
        let config = Numbers::of(options).grpo.loss;
        config.check().unwrap();
        let sampled = if config.importance_sampling_clip_max.is_some() { &sampled } else { &given };
        let (line, gradients) = by_hand(&config, &old, [sampled, &of_reference], 1.0);
        assert_metrics(options, &line, want);
        assert_gradients(&losses, options, &gradients, want);
        for (name, want) in
            want["metrics"].as_object().unwrap().iter().filter(|(name, _)| name.contains("sampling_ratio/m"))
        {
            assert_close(options, line[name].as_f64().unwrap(), want.as_f64().unwrap(), 0.01);
        }
    }
}

/// The model with all weights times the reference's factor, as a directory.
fn scaled(factor: f32, dir: &std::path::Path) {
    let mut model = Model::load(&tiny()).unwrap();
    model.parameters_mut().into_iter().flatten().for_each(|x| *x *= factor);
    checkpoint::copy_companions(&tiny(), dir, "float32").unwrap();
    model.save(&dir.join(checkpoint::WEIGHTS), Dtype::F32).unwrap();
}

#[test]
fn five_optimizer_steps_with_each_penalty_equal_trl() {
    let (reference, losses) = (Reference::load(), Reference::of_losses());
    let dir = tempfile::tempdir().unwrap();
    scaled(losses.json["reference_factor"].as_f64().unwrap() as f32, dir.path());
    let groups = old_groups(&reference, "1.0");
    for (estimator, want) in losses.json["optimizer"].as_object().unwrap() {
        let numbers = Numbers::of(&format!(
            "--loss grpo --scale-rewards none --max-staleness any --epsilon-high 0.28 --adam-beta2 0.99 --weight-decay 0.1 \
             --learning-rate 1e-4 --max-grad-norm 0.1 --beta 0.04 --kl-estimator {estimator} --reference {}",
            dir.path().display()
        ));
        let mut trainer = Trainer::open(&tiny(), numbers.optimizer, None, &on_cpu).unwrap();
        let start = weights(&mut trainer);
        let mut grpo = GrpoTrainer::new(&mut trainer, numbers.grpo.clone(), WHOLE, false).unwrap();
        for (index, want_step) in want["steps"].as_array().unwrap().iter().enumerate() {
            let mut line = Value::Null;
            grpo.step(&groups, &mut |metrics| line = parsed(metrics)).unwrap();
            let bound = if index < 2 { 1e-5 } else { 5e-5 };
            for (name, scale) in [("loss", LOSS_SCALE), ("grad_norm", 0.0), ("kl", 0.01)] {
                let (got, want) = (line[name].as_f64().unwrap(), want_step[name].as_f64().unwrap());
                assert!(
                    (got - want).abs() <= bound * want.abs().max(scale),
                    "{estimator} {index} {name}: {got} for {want}"
                );
            }
            assert_weights(&losses, (estimator, index + 1), &start, &weights(grpo.trainer()));
        }
    }
}

/// The trainer surveys a step by itself: with one completion after the other in the model it makes the same step.
#[test]
fn a_step_that_needs_a_survey_is_the_one_made_from_its_parts_in_any_cut() {
    let reference = Reference::load();
    let old = old_groups(&reference, "1.0");
    let sampled = reference.tensor("old_logprob.t1.0");
    for options in [
        "--loss gspo --epsilon 0.05",
        "--loss dapo --top-entropy-quantile 0.3",
        "--loss luspo --off-policy-mask-threshold 0.02",
        "--loss dapo --entropy-coef 0.5",
        "--loss grpo --entropy-coef 0.5 --top-entropy-quantile 0.3",
    ] {
        let (want_line, want) = by_hand(&Numbers::of(options).grpo.loss, &old, [&sampled, &sampled], 1.0);
        for micro_batch_tokens in [1, WHOLE] {
            let (line, gradients) = step(options, &old, micro_batch_tokens);
            assert_close(options, line["loss"].as_f64().unwrap(), want_line["loss"].as_f64().unwrap(), LOSS_SCALE);
            let off = distance(&flat(&gradients), &flat(&want));
            assert!(off < 1e-5, "{options}: {off:e}");
        }
    }
}

#[test]
fn rewards_that_are_normalised_before_they_are_added_give_the_advantages_of_trl() {
    let (reference, losses) = (Reference::load(), Reference::of_losses());
    let want = &losses.json["normalized_then_summed"];
    let mut records = records(&reference, "1.0", &reference.tensor("old_logprob.t1.0"), None);
    let weight = |name: &str| want["weights"][name].as_f64().unwrap();
    for (index, record) in records.iter_mut().enumerate() {
        let parts = ["a", "b"].map(|name| want["parts"][name][index].clone());
        let [a, b] = [&parts[0], &parts[1]].map(Value::as_f64);
        let sum = a.or(b).map(|_| weight("a") * a.unwrap_or(0.0) + weight("b") * b.unwrap_or(0.0));
        record["rewards"] = json!({"a": parts[0], "b": parts[1]});
        record["reward"] = json!(sum);
    }
    let options = format!("--normalize-then-sum a={},b={}", weight("a"), weight("b"));
    let advantages = Numbers::of(&options).grpo.advantage.of(&groups(&records)).unwrap();
    for (index, got) in advantages.groups.iter().flatten().enumerate() {
        assert_close(&index.to_string(), *got, want["advantages"][index].as_f64().unwrap(), 0.1);
    }
    let (line, _) = step(&format!("--epsilon-high 0.28 {options}"), &groups(&records), WHOLE);
    for (name, want) in want["metrics"].as_object().unwrap() {
        assert_close(name, line[name].as_f64().unwrap(), want.as_f64().unwrap(), 0.1);
    }
    records[3]["rewards"] = json!({"a": null, "c": 1});
    let refusal = Numbers::of(&options).grpo.advantage.of(&groups(&records)).unwrap_err();
    assert!(
        refusal.to_string().ends_with(":4: \"rewards\" has none of a, b, which --normalize-then-sum adds"),
        "{refusal}"
    );
}

/// On-policy distillation: a penalty alone, on the student's own samples, from a teacher of another family and depth.
#[test]
fn a_student_comes_nearer_to_a_teacher_by_its_own_samples() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = crate::fixtures::directory().join("tiny-llama");
    let prompts: Vec<Value> =
        (0..8).map(|i| json!({"prompt": [{"role": "user", "content": format!("{i}")}]})).collect();
    let options = format!(
        "--beta 1 --kl-estimator k2 --reference {} --learning-rate 3e-3 --groups-per-step 8",
        teacher.display()
    );
    let (mut student, mut divergences) = (tiny(), Vec::new());
    for step in 0..8 {
        let model = student.display().to_string();
        let sampled = run(
            env!("CARGO_BIN_EXE_rollout"),
            &["--model", &model, "-n", "16", "--max-completion-tokens", "8", "--seed", "3"],
            &lines(&prompts),
        );
        let records: Vec<Value> = sampled
            .records()
            .into_iter()
            .map(|mut record| {
                record["reward"] = json!(0);
                record
            })
            .collect();
        let next = dir.path().join(step.to_string());
        let arguments = format!("--policy {model} --out {} {options}", next.display());
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        let done = run(env!("CARGO_BIN_EXE_grpo-step"), &arguments, &lines(&records));
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        divergences.push(done.records()[0]["kl"].as_f64().unwrap());
        student = next;
    }
    let [first, last] = [divergences[0], divergences[7]];
    assert!(last < 0.8 * first, "{divergences:?}");
}
