//! The transformer against transformers' numbers and against its slow, plain twin; sampler against trainer, bit for bit.

use std::collections::BTreeMap;

use grpo_pipes::model::{
    Config, DecodeRow, Family, Gradients, KvCache, Model, Normalizer, Packed, Target, TrainableParts,
};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::train::microbatch::{self, Sequence};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixtures::{Reference, directory, distance, ids, worst};
use crate::plain_transformer::PlainTransformer;

fn tiny() -> Model {
    Model::load(&directory().join("tiny-qwen2")).unwrap()
}

/// A shape in which nothing is a multiple of a vector, and more than one block of everything but of the depth of a product.
fn odd() -> Model {
    shaped(30, 71, 0.2)
}

/// The same with products over long depths, one of them more than one block.
fn deep() -> Model {
    shaped(150, 1100, 0.05)
}

fn shaped(hidden: usize, intermediate: usize, range: f32) -> Model {
    with_rope(hidden, intermediate, range, json!({"rope_type": "default", "rope_theta": 10000.0}))
}

/// The odd one, with frequencies and scores scaled.
fn scaled() -> Model {
    let yarn = json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
        "attention_factor": 1.4});
    with_rope(30, 71, 0.2, yarn)
}

fn with_rope(hidden: usize, intermediate: usize, range: f32, rope: Value) -> Model {
    let config: Config = serde_json::from_value(json!({
        "model_type": "qwen2", "vocab_size": 37, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 300, "rms_norm_eps": 1e-5,
        "rope_parameters": rope, "tie_word_embeddings": false, "initializer_range": range
    }))
    .unwrap();
    with_config(config, range)
}

/// Without biases, and with heads that are wider together than the stream.
fn wide_heads() -> Model {
    with_config(Config { family: Family::Llama, head_dim: Some(14), qkv_bias: false, ..odd().config().clone() }, 0.2)
}

/// The same with norms of heads.
fn normed_heads() -> Model {
    with_config(Config { family: Family::Qwen3, qk_norm: true, ..wide_heads().config().clone() }, 0.2)
}

fn with_config(config: Config, range: f32) -> Model {
    let mut model = Model::random(config, 3);
    for (i, parameter) in model.parameters_mut().into_iter().enumerate() {
        parameter.iter_mut().enumerate().for_each(|(j, x)| *x += 0.5 * range * ((i * 31 + j * 7) as f32).sin());
    }
    model
}

fn tokens(n: usize, vocab: usize, salt: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 7 + i * 13 + salt * 29) % vocab) as u32).collect()
}

/// Sequences end to end, with every completion token a target.
pub fn lay(sequences: &[(Vec<u32>, Vec<u32>)]) -> (Packed, Vec<Target>) {
    let mut batch = Packed { starts: vec![0], ..Packed::default() };
    let mut targets = Vec::new();
    for (prompt, completion) in sequences {
        let first = batch.tokens.len() + prompt.len() - 1;
        targets.extend(completion.iter().enumerate().map(|(i, &token)| Target { row: first + i, token }));
        batch.tokens.extend(prompt.iter().chain(completion));
        batch.starts.push(batch.tokens.len());
        batch.prefixes.push(None);
    }
    (batch, targets)
}

/// Logits after each token: prefill of the first, decode of the rest.
pub fn decoded_logits(model: &Model, sequence: &[u32], prefilled: usize) -> Vec<Vec<f32>> {
    let (prompt, logits) = model.prefill(&[], &[&sequence[..prefilled]]).remove(0);
    let mut own = KvCache::new(model.config(), sequence.len());
    let mut all = vec![logits];
    for &token in &sequence[prefilled..] {
        let mut logits = vec![0.0; model.config().vocab_size];
        model.decode(&mut [DecodeRow { token, prompt: &prompt, own: &mut own }], &mut logits);
        all.push(logits);
    }
    all
}

#[test]
fn logits_equal_transformers() {
    let (reference, model) = (Reference::load(), tiny());
    for (i, (prompt, completion)) in reference.sequences().into_iter().enumerate().step_by(2) {
        let sequence: Vec<u32> = prompt.into_iter().chain(completion).collect();
        let got: Vec<f32> = decoded_logits(&model, &sequence, 1).concat();
        let off = worst(&got, &reference.tensor(&format!("logits.{i}")));
        assert!(off < 2e-4, "sequence {i}: {off}");
    }
}

#[test]
fn logprobs_and_entropies_equal_transformers() {
    let (reference, model) = (Reference::load(), tiny());
    let (batch, targets) = lay(&reference.sequences());
    for temperature in ["1.0", "0.9"] {
        let stats = model.logprobs(&batch, &targets, temperature.parse().unwrap());
        let logprobs: Vec<f32> = stats.iter().map(|s| s.logprob).collect();
        let entropies: Vec<f32> = stats.iter().map(|s| s.entropy).collect();
        assert!(worst(&logprobs, &reference.tensor(&format!("logprob.t{temperature}"))) < 1e-4);
        assert!(worst(&entropies, &reference.tensor(&format!("entropy.t{temperature}"))) < 1e-4);
    }
}

#[test]
fn greedy_tokens_equal_transformers() {
    let (reference, model) = (Reference::load(), tiny());
    for case in reference.json["greedy"].as_array().unwrap() {
        let (prompt, want) = (ids(&case["prompt_token_ids"]), ids(&case["completion_token_ids"]));
        let sequence: Vec<u32> = prompt.iter().chain(&want).copied().collect();
        let logits = decoded_logits(&model, &sequence, prompt.len());
        let best = |row: &Vec<f32>| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
        let got: Vec<u32> = logits[..want.len()].iter().map(best).collect();
        assert_eq!(got, want);
    }
}

#[test]
fn supervised_gradients_equal_torch() {
    let (reference, model) = (Reference::load(), tiny());
    let (batch, targets) = lay(&reference.sequences());
    let mut gradients = Gradients::zeros(&model);
    let slope = -1.0 / targets.len() as f32;
    let stats = model.accumulate_gradients(&batch, &targets, 1.0, &mut gradients, &|_, _| slope.into());
    let loss: f32 = stats.iter().map(|s| slope * s.logprob).sum();
    let want = &reference.json["supervised"]["completion"];
    assert!((f64::from(loss) / want["loss"].as_f64().unwrap() - 1.0).abs() < 1e-5);
    let names = model.config().trainable().named().into_iter().map(|(name, _)| name);
    let by_name: BTreeMap<String, &[f32]> = names.zip(gradients.0.iter().map(|g| &**g)).collect();
    for (name, gradient) in &by_name {
        let norm = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        let want = want["grad_norms"][name].as_f64().unwrap();
        assert!((norm / want - 1.0).abs() < 1e-5, "{name}: {norm} for {want}");
    }
    let stride = reference.json["gradient_stride"].as_u64().unwrap() as usize;
    let sample: Vec<f32> = by_name.values().flat_map(|g| g.iter().step_by(stride).copied()).collect();
    let off = distance(&sample, &reference.tensor("grad_sample.supervised.completion"));
    assert!(off < 1e-5, "{off}");
}

#[test]
fn odd_and_deep_shapes_equal_the_plain_model() {
    for model in [odd(), deep(), scaled(), wide_heads(), normed_heads()] {
        let plain = PlainTransformer::of(&model);
        let sequence = tokens(150, 37, 1);
        let got = decoded_logits(&model, &sequence, 40).concat();
        let want: Vec<f32> = plain.logits(&sequence)[39..].concat().iter().map(|&x| x as f32).collect();
        let off = worst(&got, &want);
        assert!(off < 1e-4, "{off}");
    }
}

#[test]
fn every_gradient_equals_finite_differences_of_the_plain_model() {
    for model in [odd(), scaled(), wide_heads(), normed_heads()] {
        check_gradients(&model);
    }
}

fn check_gradients(model: &Model) {
    let mut plain = PlainTransformer::of(model);
    let sequence = tokens(21, 37, 2);
    let (batch, targets) = lay(&[(sequence[..6].to_vec(), sequence[6..].to_vec())]);
    let mut gradients = Gradients::zeros(model);
    let weight = |i: usize| (i as f32 * 0.7).cos();
    model.accumulate_gradients(&batch, &targets, 0.9, &mut gradients, &|i, _| weight(i).into());
    let loss = |plain: &PlainTransformer| -> f64 {
        let logprobs = plain.logprobs(&sequence, f64::from(0.9f32));
        logprobs[5..].iter().enumerate().map(|(i, l)| f64::from(weight(i)) * l).sum()
    };
    for ((name, _), gradient) in model.config().trainable().named().iter().zip(&gradients.0) {
        let used = if name.contains("embed") { sequence[3] as usize * 30 } else { 0 };
        for at in [used, used + 7, used + 29].into_iter().filter(|&at| at < gradient.len()) {
            let original = plain.parameters[name][at];
            let mut at_offset = |offset: f64| {
                plain.parameters.get_mut(name).unwrap()[at] = original + offset;
                loss(&plain)
            };
            let numeric = (at_offset(1e-5) - at_offset(-1e-5)) / 2e-5;
            at_offset(0.0);
            let got = f64::from(gradient[at]);
            assert!((got - numeric).abs() < 2e-4 * numeric.abs().max(0.1), "{name}[{at}]: {got} for {numeric}");
        }
        assert!(gradient.iter().any(|&g| g != 0.0), "{name} has no gradient");
    }
}

#[test]
fn the_row_of_the_padding_token_learns_only_from_a_tied_head() {
    let (batch, targets) = lay(&[(vec![1, 2, 3, 2], vec![5, 2, 7])]);
    for tied in [false, true] {
        let gradient = |padding: Option<u32>| {
            let mut config = odd().config().clone();
            (config.pad_token_id, config.tie_word_embeddings) = (padding, tied);
            let mut model = Model::random(config.clone(), 3);
            let row = model.parameters()[0][2 * 30..3 * 30].to_vec();
            assert_eq!(row.iter().all(|x| *x == 0.0), padding.is_some(), "as transformers starts it");
            model.parameters_mut()[0][2 * 30..3 * 30].fill(0.1);
            let mut gradients = Gradients::zeros(&model);
            model.accumulate_gradients(&batch, &targets, 1.0, &mut gradients, &|_, _| 1.0.into());
            gradients.0[0].to_vec()
        };
        let (all, without) = (gradient(None), gradient(Some(2)));
        assert_eq!(all[30..2 * 30], without[30..2 * 30]);
        assert_ne!(all[2 * 30..3 * 30], without[2 * 30..3 * 30]);
        assert_eq!(without[2 * 30..3 * 30].iter().all(|x| *x == 0.0), !tied);
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_any_batch_and_in_prefill() {
    for model in [tiny(), odd(), deep(), normed_heads()] {
        check_rows(&model);
        check_rows(&model.to_bf16());
    }
}

fn check_rows(model: &Model) {
    let vocab = model.config().vocab_size;
    let sequences: Vec<Vec<u32>> = (0..23).map(|i| tokens(3 + i * 2, vocab, i)).collect();
    let prompts: Vec<&[u32]> = sequences.iter().map(|s| &s[..s.len() - 1]).collect();
    let packed = model.prefill(&[], &prompts).into_iter();
    let mut caches: Vec<_> = packed.map(|(cache, _)| (cache, KvCache::new(model.config(), 1))).collect();
    let mut rows: Vec<DecodeRow<'_>> = (sequences.iter().zip(&mut caches))
        .map(|(s, (prompt, own))| DecodeRow { token: s[s.len() - 1], prompt, own })
        .collect();
    let mut together = vec![0.0; rows.len() * vocab];
    model.decode(&mut rows, &mut together);
    let whole: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let packed = model.prefill(&[], &whole);
    for ((sequence, together), packed) in sequences.iter().zip(together.chunks(vocab)).zip(packed) {
        assert_eq!(decoded_logits(model, sequence, 2).pop().unwrap(), together);
        assert_eq!(packed.1, together);
    }
}

#[test]
fn prompts_that_begin_alike_have_the_bits_of_prompts_run_whole() {
    for model in [tiny(), odd(), deep(), normed_heads()] {
        check_stems(&model);
        check_stems(&model.to_bf16());
    }
}

fn check_stems(model: &Model) {
    let vocab = model.config().vocab_size;
    for stem in [1, 16, 37] {
        let whole: Vec<_> = (0..7).map(|i| [tokens(stem, vocab, 1), tokens(1 + i * 3, vocab, i)].concat()).collect();
        let rests: Vec<&[u32]> = whole.iter().map(|prompt| &prompt[stem..]).collect();
        let shared = model.prefill(&whole[0][..stem], &rests);
        for ((shared, logits), whole) in shared.into_iter().zip(&whole) {
            let (alone, want) = model.prefill(&[], &[whole]).remove(0);
            assert_eq!(logits, want);
            let mut next = [vec![0.0; vocab], vec![0.0; vocab]];
            for (prompt, next) in [&shared, &alone].into_iter().zip(&mut next) {
                let own = &mut KvCache::new(model.config(), 1);
                model.decode(&mut [DecodeRow { token: 5, prompt, own }], next);
            }
            assert_eq!(next[0], next[1], "the caches hold the same");
        }
    }
}

#[test]
fn a_sequence_has_the_same_log_probabilities_alone_and_packed() {
    let model = tiny();
    let sequences: Vec<_> = (0..5).map(|i| (tokens(4 + i, 300, i), tokens(9 + 3 * i, 300, i + 9))).collect();
    let (batch, targets) = lay(&sequences);
    let mut stats = model.logprobs(&batch, &targets, 1.0).into_iter();
    for (prompt, completion) in &sequences {
        let (alone, own_targets) = lay(&[(prompt.clone(), completion.clone())]);
        for alone in model.logprobs(&alone, &own_targets, 1.0) {
            assert_eq!(alone.logprob, stats.next().unwrap().logprob);
        }
    }
}

#[test]
fn a_prompt_run_once_gives_the_bits_and_the_gradient_of_one_run_for_each_completion() {
    for (model, vocab) in [(tiny(), 300), (odd(), 37), (deep(), 37), (normed_heads(), 37)] {
        let prompts = [tokens(19, vocab, 1), tokens(2, vocab, 2), tokens(33, vocab, 3)];
        let completions: Vec<_> = (0..9).map(|i| tokens(1 + 5 * i % 23, vocab, i + 9)).collect();
        let member = |i: usize| Sequence { prompt: &prompts[i / 3], completion: &completions[i] };
        let sequences: Vec<_> = (0..9).map(member).collect();
        let once = microbatch::pack(&sequences, &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(once.packed.prefixes.iter().any(Option::is_some));
        let of = |run: &[usize]| -> (Vec<f32>, Vec<f32>) {
            let batch = microbatch::pack(&sequences, run);
            let mut gradients = Gradients::zeros(&model);
            let slope = |i: usize, _| (0.1 * (once_index(&once, batch.origins[i]) as f32 * 0.37).sin()).into();
            let stats = model.accumulate_gradients(&batch.packed, &batch.targets, 0.9, &mut gradients, &slope);
            assert_eq!(
                stats.iter().map(|s| s.logprob).collect::<Vec<_>>(),
                model.logprobs(&batch.packed, &batch.targets, 0.9).iter().map(|s| s.logprob).collect::<Vec<_>>()
            );
            (stats.iter().map(|s| s.logprob).collect(), gradients.0.iter().flat_map(|g| g.to_vec()).collect())
        };
        let (logprobs, gradient) = of(&[0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let alone: Vec<_> = (0..9).map(|i| of(&[i])).collect();
        let alone_logprobs: Vec<f32> = alone.iter().flat_map(|(logprobs, _)| logprobs.clone()).collect();
        assert_eq!(logprobs, alone_logprobs);
        let sum: Vec<f32> = (0..gradient.len()).map(|i| alone.iter().map(|(_, g)| g[i]).sum()).collect();
        let off = distance(&gradient, &sum);
        assert!(off < 1e-5, "{off}");
    }
}

fn once_index(batch: &microbatch::MicroBatch, origin: (usize, usize)) -> usize {
    batch.origins.iter().position(|&one| one == origin).unwrap()
}

#[test]
fn order_and_cut_of_the_batch_leave_the_gradient_unchanged() {
    let model = tiny();
    let sequences: Vec<_> = (0..7).map(|i| (tokens(4 + i, 300, i), tokens(9 + 5 * i, 300, i + 9))).collect();
    let gradient_of = |parts: Vec<Vec<(Vec<u32>, Vec<u32>)>>| -> Vec<f32> {
        let mut gradients = Gradients::zeros(&model);
        for part in parts {
            let (batch, targets) = lay(&part);
            let slope = |i: usize| 0.1 * (targets[i].token as f32 * 0.37).sin();
            model.accumulate_gradients(&batch, &targets, 1.0, &mut gradients, &|i, _| slope(i).into());
        }
        gradients.0.iter().flat_map(|g| g.iter().copied()).collect()
    };
    let whole = gradient_of(vec![sequences.clone()]);
    let cut = gradient_of(sequences.iter().map(|s| vec![s.clone()]).collect());
    let reversed = gradient_of(vec![sequences.iter().rev().cloned().collect()]);
    assert!(distance(&cut, &whole) < 1e-5);
    assert!(distance(&reversed, &whole) < 1e-5);
    assert_eq!(whole, gradient_of(vec![sequences]), "the same batch gives the same bits");
}

#[test]
fn saved_weights_are_loaded_bit_for_bit() {
    let model = odd();
    let loaded = Model::load(saved(&model, Dtype::F32).path()).unwrap();
    assert_eq!(model.parameters(), loaded.parameters());
}

fn saved(model: &Model, storage: Dtype) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), serde_json::to_string(model.config()).unwrap()).unwrap();
    model.save(&dir.path().join("model.safetensors"), storage).unwrap();
    dir
}

/// Whatever the checkpoint stores, and whether it is mapped or converted.
#[test]
fn a_model_in_bf16_has_the_rounded_weights_and_is_near_the_one_in_f32() {
    for model in [tiny(), odd(), deep(), normed_heads()] {
        for storage in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let dir = saved(&model, storage);
            let (full, half) = (Model::load(dir.path()).unwrap(), Model::load_as(dir.path(), Dtype::Bf16).unwrap());
            let sequence = tokens(20, model.config().vocab_size, 3);
            let [got, same, want] =
                [&half, &full.to_bf16(), &full].map(|model| decoded_logits(model, &sequence, 9).concat());
            assert_eq!(got, same);
            let (off, scale) = (worst(&got, &want), want.iter().fold(0.0f32, |max, x| max.max(x.abs())));
            assert!(off > 0.0 && off < 0.03 * scale, "{off:e} of {scale:e}");
        }
    }
}

/// Training in bf16 computes the logits that sampling in bf16 does, and nearly the gradients of f32; a changed weight is packed again.
#[test]
fn training_in_bf16_has_the_bits_of_sampling_and_nearly_the_gradients_of_f32() {
    for model in [tiny(), odd(), deep(), normed_heads()] {
        let sequence = tokens(24, model.config().vocab_size, 5);
        let packed = Packed { tokens: sequence.clone(), starts: vec![0, 24], prefixes: vec![None] };
        let targets: Vec<_> = (8..23).map(|row| Target { row, token: sequence[row + 1] }).collect();
        let learned = |model: &Model| {
            let mut gradients = Gradients::zeros(model);
            let slope = |i: usize, _: f32| (0.3 - (i % 3) as f32 * 0.25).into();
            let stats = model.accumulate_gradients(&packed, &targets, 1.0, &mut gradients, &slope);
            (stats.iter().map(|stats| stats.logprob).collect::<Vec<_>>(), gradients)
        };
        let mut half = model.clone().with_bf16_products();
        let (logprobs, gradients) = learned(&half);
        let sampled = |model: &Model| -> Vec<f32> {
            let logits = decoded_logits(&model.to_bf16(), &sequence, 9);
            let rows = logits.into_iter().zip(&targets);
            rows.map(|(mut row, target)| {
                let logit = row[target.token as usize];
                Normalizer::of(&mut row, 1.0).logprob(logit)
            })
            .collect()
        };
        assert_eq!(logprobs, sampled(&model));
        let names = model.config().trainable().named();
        for (((name, _), got), want) in names.iter().zip(&gradients.0).zip(&learned(&model).1.0) {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let cosine = dot(got, want) / (dot(got, got) * dot(want, want)).sqrt();
            let longer = (dot(got, got) / dot(want, want)).sqrt();
            // The gradient of the keys' biases is zero but for rounding: it moves all scores of a query alike.
            assert!(
                name.ends_with("k_proj.bias") || (cosine > 0.99 && (0.95..1.05).contains(&longer)),
                "{name}: {cosine} {longer}"
            );
        }
        for TrainableParts { values, numbers_of_a_part, parts } in half.trainable_parts() {
            values.iter_mut().for_each(|x| *x *= 1.25);
            parts.into_iter().zip(values.chunks(numbers_of_a_part)).for_each(|(part, rows)| part.pack(rows));
        }
        let mut changed = model.clone();
        changed.trained_values_mut().into_iter().for_each(|values| values.iter_mut().for_each(|x| *x *= 1.25));
        assert_eq!(learned(&half).0, sampled(&changed));
    }
}
