//! The engine on the tiny model: the same completions in any batch, the trainer's log-probabilities, the ends of a run.

use grpo_pipes::engine::{Completion, CpuDecoder, Engine, Request, Settings, Sink, Work};
use grpo_pipes::model::{Model, Packed, Parameter, Sampling, Target};
use grpo_pipes::process::read_ahead::ReadAhead;
use grpo_pipes::{Error, Result};

use crate::fixtures::{Reference, directory, ids};
use crate::sampled::{OwnRequest, own_completions, own_requests};

fn tiny() -> Model {
    Model::load(&directory().join("tiny-qwen2")).unwrap()
}

fn settings() -> Settings {
    Settings {
        group_size: 4,
        max_sequences: 64,
        max_completion_tokens: 24,
        sampling: Sampling::default(),
        stop_ids: vec![319, 317],
        seed: 1,
        step: 0,
    }
}

/// Prompts of several lengths.
fn prompts() -> Vec<(String, Vec<u32>)> {
    (0..11u32).map(|i| (format!("p/{i}"), (0..1 + 3 * i).map(|j| (j * 37 + i * 11) % 317).collect())).collect()
}

#[derive(Default)]
struct Groups {
    groups: Vec<(String, Vec<Completion>)>,
    refuse_after: Option<usize>,
}

impl Sink<()> for Groups {
    fn group(&mut self, request: Request<()>, completions: Vec<Completion>) -> Result<()> {
        if self.refuse_after == Some(self.groups.len()) {
            return Err(Error::Output(std::io::ErrorKind::BrokenPipe.into()));
        }
        self.groups.push((request.prompt_id, completions));
        Ok(())
    }

    fn progress(&mut self, _: Work) -> Result<()> {
        Ok(())
    }
}

fn requests(prompts: &[(String, Vec<u32>)]) -> ReadAhead<Request<()>> {
    let request = |(prompt_id, tokens): &(String, Vec<u32>)| Request {
        prompt_id: prompt_id.clone(),
        tokens: tokens.clone(),
        payload: (),
        own: None,
    };
    ReadAhead::ready(prompts.iter().map(request).collect())
}

fn sampled(model: &Model, settings: Settings, prompts: &[(String, Vec<u32>)]) -> Vec<(String, Vec<Completion>)> {
    let mut sink = Groups::default();
    let mut decoder = CpuDecoder::new(model, &settings);
    let work = Engine::new(&mut decoder, settings).run(requests(prompts), &mut sink).unwrap();
    let completions = || sink.groups.iter().flat_map(|(_, completions)| completions);
    assert_eq!(work.sequences, completions().count());
    assert_eq!(work.tokens, completions().map(|one| one.tokens.len()).sum::<usize>());
    sink.groups
}

#[test]
fn a_completion_is_the_same_alone_in_any_batch_and_in_any_order() {
    let (model, prompts) = (tiny(), prompts());
    let whole = sampled(&model, settings(), &prompts);
    let order: Vec<&str> = whole.iter().map(|(prompt_id, _)| &prompt_id[..]).collect();
    assert_eq!(order, prompts.iter().map(|(prompt_id, _)| &prompt_id[..]).collect::<Vec<_>>());
    for max_sequences in [1, 2, 5, 7] {
        assert_eq!(sampled(&model, Settings { max_sequences, ..settings() }, &prompts), whole);
    }
    let reversed: Vec<_> = prompts.iter().rev().cloned().collect();
    let mut again = sampled(&model, settings(), &reversed);
    again.reverse();
    assert_eq!(again, whole);
    for (prompt, group) in prompts.iter().zip(&whole) {
        let alone = sampled(&model, Settings { group_size: 1, ..settings() }, std::slice::from_ref(prompt));
        assert_eq!(alone[0].1[0], group.1[0]);
    }
}

#[test]
fn a_request_with_settings_of_its_own_gets_what_an_engine_with_these_settings_samples() {
    let (model, own, prompts) = (tiny(), own_requests(), prompts());
    let tokens = prompts.iter().map(|(_, tokens)| tokens.clone());
    for max_sequences in [2, 64] {
        let settings = Settings { max_sequences, ..settings() };
        let mut decoder = CpuDecoder::new(&model, &settings);
        let groups = own_completions(&mut decoder, settings.clone(), &own, tokens.clone()).unwrap();
        assert!(groups.iter().map(Vec::len).eq(own.iter().map(|own| own.group_size)));
        for ((own, prompt), group) in own.iter().zip(&prompts).zip(groups) {
            let OwnRequest { sampling, seed, group_size, limit, wanted } = *own;
            let alone = Settings { sampling, seed, group_size, max_completion_tokens: limit, ..settings.clone() };
            let whole = sampled(&model, alone, std::slice::from_ref(prompt)).remove(0).1;
            for (got, want) in group.iter().zip(&whole) {
                let heard = want.tokens.len().min(wanted);
                assert_eq!((&got.tokens[..], &got.logprobs[..]), (&want.tokens[..heard], &want.logprobs[..heard]));
            }
        }
    }
}

#[test]
fn seed_step_and_sample_change_a_completion() {
    let (model, prompts) = (tiny(), &prompts()[3..4]);
    let group = |settings| sampled(&model, settings, prompts).remove(0).1;
    let first = group(settings());
    assert_ne!(first[0], first[1]);
    assert_ne!(group(Settings { seed: 2, ..settings() }), first);
    assert_ne!(group(Settings { step: 1, ..settings() }), first);
}

#[test]
fn recorded_log_probabilities_are_the_trainers_bit_for_bit() {
    let (model, prompts) = (tiny(), prompts());
    for temperature in [1.0, 0.9] {
        let sampling = Sampling { temperature, ..Sampling::default() };
        let groups = sampled(&model, Settings { sampling, ..settings() }, &prompts);
        for ((_, prompt), (_, completions)) in prompts.iter().zip(&groups) {
            for completion in completions {
                let tokens = [&prompt[..], &completion.tokens[..]].concat();
                let targets: Vec<Target> = (0..completion.tokens.len())
                    .map(|i| Target { row: prompt.len() + i - 1, token: completion.tokens[i] })
                    .collect();
                let batch = Packed { starts: vec![0, tokens.len()], tokens, prefixes: vec![None] };
                let stats = model.logprobs(&batch, &targets, temperature);
                let trainers: Vec<f32> = stats.iter().map(|stats| stats.logprob).collect();
                assert_eq!(completion.logprobs, trainers);
            }
        }
    }
}

#[test]
fn greedy_tokens_equal_transformers() {
    let reference = Reference::load();
    let list = reference.json["greedy"].as_array().unwrap();
    let wanted: Vec<Vec<u32>> = list.iter().map(|one| ids(&one["completion_token_ids"])).collect();
    let prompts: Vec<(String, Vec<u32>)> =
        list.iter().enumerate().map(|(i, one)| (i.to_string(), ids(&one["prompt_token_ids"]))).collect();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let max_completion_tokens = wanted.iter().map(Vec::len).max().unwrap();
    let settings = Settings { group_size: 1, max_completion_tokens, max_sequences: 7, sampling, ..settings() };
    let groups = sampled(&tiny(), settings, &prompts);
    for ((_, completions), wanted) in groups.iter().zip(wanted) {
        assert_eq!(completions[0].tokens, wanted);
    }
}

#[test]
fn a_completion_ends_with_its_end_token_or_at_its_length() {
    let (model, prompts) = (tiny(), prompts());
    let stop_ids: Vec<u32> = (0..40).collect();
    for limit in [1, 2, 24] {
        let settings = Settings { stop_ids: stop_ids.clone(), max_completion_tokens: limit, ..settings() };
        for completion in sampled(&model, settings, &prompts).into_iter().flat_map(|(_, completions)| completions) {
            let (last, before) = completion.tokens.split_last().unwrap();
            assert!(before.iter().all(|token| !stop_ids.contains(token)));
            assert_eq!(completion.stopped, stop_ids.contains(last));
            assert!(completion.stopped || completion.tokens.len() == limit);
            assert_eq!(completion.logprobs.len(), completion.tokens.len());
        }
    }
}

#[test]
fn what_came_before_a_bad_request_is_sampled() {
    let requests = requests(&prompts()[..2]).chain([Err(Error::Data("bad".into()))]);
    let sink = Groups::default();
    let (model, mut sink) = (tiny(), sink);
    let outcome =
        Engine::new(&mut CpuDecoder::new(&model, &settings()), settings()).run(ReadAhead::new(requests, 3), &mut sink);
    assert_eq!(outcome.unwrap_err().exit_code(), 3);
    assert_eq!(sink.groups.len(), 2);
}

#[test]
fn a_sink_that_refuses_ends_the_run() {
    let mut sink = Groups { refuse_after: Some(1), ..Groups::default() };
    let model = tiny();
    let settings = Settings { max_sequences: 2, ..settings() };
    let mut decoder = CpuDecoder::new(&model, &settings);
    let outcome = Engine::new(&mut decoder, settings).run(requests(&prompts()), &mut sink);
    assert!(matches!(outcome, Err(Error::Output(_))));
    assert_eq!(sink.groups.len(), 1);
}

#[test]
fn logits_that_are_not_finite_name_step_prompt_sample_position_and_layer() {
    let list = tiny().config().stored();
    let norm = |layer| list.of_layer(layer, Parameter::InputNorm);
    let norms = [(norm(0), "layer 0"), (norm(1), "layer 1"), (list.of_model(Parameter::FinalNorm), "the LM head")];
    for (parameter, place) in norms {
        let mut model = tiny();
        model.parameters_mut()[parameter.unwrap()][0] = f32::NAN;
        let mut sink = Groups::default();
        let settings = Settings { step: 7, ..settings() };
        let mut decoder = CpuDecoder::new(&model, &settings);
        let outcome = Engine::new(&mut decoder, settings).run(requests(&prompts()[2..3]), &mut sink);
        let err = outcome.unwrap_err();
        let want = format!("step 7, prompt p/2, sample 0, position 0: logits are not finite, first in {place}");
        assert_eq!((err.to_string(), err.exit_code()), (want, 4));
    }
}
