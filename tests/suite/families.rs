//! Qwen3, Llama, SmolLM2 and Mistral against transformers' numbers, and through the commands.

use std::collections::BTreeMap;

use clap::Parser;
use grpo_pipes::lines::record::Message;
use grpo_pipes::model::{Config, Gradients, Model};
use grpo_pipes::optim::OptimizerConfig;
use grpo_pipes::tokenizer::{TemplateArgs, Tokenizer, stop_ids};
use grpo_pipes::train::config::SupervisedConfig;
use grpo_pipes::train::supervised::{self, Example};
use grpo_pipes::train::trainer::Trainer;
use serde_json::Value;

use crate::fixtures::{Reference, directory, distance, ids, on_cpu, worst};
use crate::model::{decoded_logits, lay};

fn each(mut check: impl FnMut(&str, &Model, &Value, &Reference)) {
    let reference = Reference::of_families();
    for (name, family) in reference.json["families"].as_object().unwrap() {
        let model = Model::load(&directory().join(format!("tiny-{name}"))).unwrap();
        check(name, &model, family, &reference);
    }
}

/// Every `stride`th number of each tensor, in the order of the names.
fn strided<'a>(config: &Config, tensors: impl Iterator<Item = &'a [f32]>, stride: &Value) -> Vec<f32> {
    let names = config.stored().named().into_iter().map(|(name, _)| name);
    let by_name: BTreeMap<String, &[f32]> = names.zip(tensors).collect();
    by_name.values().flat_map(|values| values.iter().step_by(stride.as_u64().unwrap() as usize).copied()).collect()
}

#[test]
fn logits_log_probabilities_and_entropies_equal_transformers() {
    each(|name, model, _, reference| {
        let sequences = reference.sequences();
        for (i, stride) in [(0, 1), (1, 10)] {
            let (prompt, completion) = &sequences[i];
            let got: Vec<Vec<f32>> = decoded_logits(model, &[&prompt[..], completion].concat(), 1);
            let got: Vec<f32> = got.into_iter().step_by(stride).flatten().collect();
            let off = worst(&got, &reference.tensor(&format!("logits.{name}.{i}")));
            assert!(off < 2e-4, "{name} {i}: {off:e}");
        }
        let (batch, targets) = lay(&sequences);
        let stats = model.logprobs(&batch, &targets, 1.0);
        let logprobs: Vec<f32> = stats.iter().map(|s| s.logprob).collect();
        let entropies: Vec<f32> = stats.iter().map(|s| s.entropy).collect();
        let off = worst(&logprobs, &reference.tensor(&format!("logprob.{name}")));
        assert!(off < 1e-4, "{name}: {off:e}");
        let off = worst(&entropies, &reference.tensor(&format!("entropy.{name}")));
        assert!(off < 1e-4, "{name}: {off:e}");
    });
}

#[test]
fn greedy_tokens_equal_transformers() {
    each(|name, model, family, _| {
        for case in family["greedy"].as_array().unwrap() {
            let (prompt, want) = (ids(&case["prompt_token_ids"]), ids(&case["completion_token_ids"]));
            let logits = decoded_logits(model, &[&prompt[..], &want].concat(), prompt.len());
            let best = |row: &Vec<f32>| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
            assert_eq!(logits[..want.len()].iter().map(best).collect::<Vec<_>>(), want, "{name}");
        }
    });
}

#[test]
fn gradients_equal_torch() {
    each(|name, model, family, reference| {
        let (batch, targets) = lay(&reference.sequences());
        let mut gradients = Gradients::zeros(model);
        let slope = -1.0 / targets.len() as f32;
        let stats = model.accumulate_gradients(&batch, &targets, 1.0, &mut gradients, &|_, _| slope.into());
        let loss: f64 = stats.iter().map(|s| f64::from(slope * s.logprob)).sum();
        assert!((loss / family["loss"].as_f64().unwrap() - 1.0).abs() < 1e-5, "{name}: {loss}");
        for ((parameter, _), gradient) in model.config().trainable().named().iter().zip(&gradients.0) {
            let norm = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            let want = family["grad_norms"][parameter].as_f64().unwrap();
            assert!((norm / want - 1.0).abs() < 1e-5, "{name} {parameter}: {norm} for {want}");
        }
        let got = strided(model.config(), gradients.0.iter().map(|g| &**g), &reference.json["gradient_stride"]);
        let off = distance(&got, &reference.tensor(&format!("grad.{name}")));
        assert!(off < 1e-5, "{name}: {off:e}");
    });
}

#[derive(Parser)]
struct Numbers {
    #[command(flatten)]
    optimizer: OptimizerConfig,
}

/// Trains the model `name` of the fixtures by torch's AdamW on the cross-entropy of the completions, a step for each of `losses`, which
/// these must be.
pub fn trained(name: &str, sequences: Vec<(Vec<u32>, Vec<u32>)>, losses: &Value) -> Trainer {
    let options = "test --learning-rate 1e-3 --adam-beta2 0.99 --weight-decay 0.1 --max-grad-norm 0";
    let optimizer = Numbers::parse_from(options.split(' ')).optimizer;
    let mut trainer = Trainer::open(&directory().join(name), optimizer, None, &on_cpu).unwrap();
    let example = |(prompt, completion)| Example { prompt, completion, digest: [0; 32] };
    let examples: Vec<Example> = sequences.into_iter().map(example).collect();
    for want in losses.as_array().unwrap() {
        let config = SupervisedConfig { loss_on_prompt: false, micro_batch_tokens: 1000 };
        let line = supervised::step(&mut trainer, config, &examples).unwrap().to_json();
        let loss = serde_json::from_slice::<Value>(&line).unwrap()["loss"].as_f64().unwrap();
        assert!((loss / want.as_f64().unwrap() - 1.0).abs() < 1e-4, "{name}: {loss} for {want}");
    }
    trainer
}

#[test]
fn weights_after_five_steps_equal_torch() {
    each(|name, _, family, reference| {
        let mut trainer = trained(&format!("tiny-{name}"), reference.sequences(), &family["losses"]);
        let model = trainer.weights().unwrap();
        let got = strided(model.config(), model.parameters().into_iter(), &reference.json["weight_stride"]);
        let off = distance(&got, &reference.tensor(&format!("weights.{name}")));
        assert!(off < 1e-5, "{name}: {off:e}");
    });
}

fn chats() -> Vec<Value> {
    let text = std::fs::read_to_string(directory().join("family_chats.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn arguments(chat: &Value) -> Vec<(String, Value)> {
    chat["args"].as_object().unwrap().clone().into_iter().collect()
}

#[test]
fn chats_are_those_of_transformers_with_one_bos() {
    for want in chats().into_iter().filter(|line| line.get("messages").is_some()) {
        let dir = directory().join(format!("tiny-{}", want["family"].as_str().unwrap()));
        let template = TemplateArgs { chat_template: None, chat_template_arg: arguments(&want) };
        let tokenizer = Tokenizer::with_template(&dir, &template).unwrap();
        let messages: Vec<Message> = serde_json::from_value(want["messages"].clone()).unwrap();
        let text = tokenizer.chat(&messages).unwrap();
        assert_eq!(text, want["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&text).unwrap(), ids(&want["ids"]), "{text}");
    }
}

#[test]
fn texts_are_encoded_and_decoded_as_in_transformers_with_one_bos() {
    for want in chats().into_iter().filter(|line| line.get("raw").is_some()) {
        let tokenizer =
            Tokenizer::load(&directory().join(format!("tiny-{}", want["family"].as_str().unwrap()))).unwrap();
        let (raw, wanted) = (want["raw"].as_str().unwrap(), ids(&want["ids"]));
        let got = tokenizer.encode_raw(raw).unwrap();
        assert_eq!(got, wanted, "{raw}");
        assert_eq!(tokenizer.decode(&got).unwrap(), want["decoded"].as_str().unwrap());
    }
    let llama = Tokenizer::load(&directory().join("tiny-llama")).unwrap();
    assert_eq!(llama.encode_raw("<|begin_of_text|>How").unwrap(), llama.encode_raw("How").unwrap());
}

#[test]
fn a_turn_ends_with_the_tokenizers_eos_and_a_completion_with_any() {
    let dir = directory().join("tiny-llama");
    let (tokenizer, stops) = (Tokenizer::load(&dir).unwrap(), stop_ids(&dir).unwrap());
    assert_eq!((stops.clone(), tokenizer.end_of_turn(&stops)), (vec![316, 319], 319));
    assert_eq!(tokenizer.end_of_turn(&[5, 6]), 5, "it has a token that ends nothing");
}
