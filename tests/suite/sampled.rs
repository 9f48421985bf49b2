//! Runs the engine to its end on any decoder.

use std::sync::{Arc, Mutex};

use grpo_pipes::Result;
use grpo_pipes::engine::{Completion, Decoder, Engine, Heard, Listener, OwnSettings, Request, Settings, Sink, Work};
use grpo_pipes::model::Sampling;
use grpo_pipes::process::read_ahead::ReadAhead;

struct Groups(Vec<Vec<Completion>>);

impl Sink<()> for Groups {
    fn group(&mut self, _: Request<()>, completions: Vec<Completion>) -> Result<()> {
        self.0.push(completions);
        Ok(())
    }

    fn progress(&mut self, _: Work) -> Result<()> {
        Ok(())
    }
}

/// The completions of each prompt; prompts are named p/0, p/1, ...
pub fn completions(
    decoder: &mut dyn Decoder,
    settings: Settings,
    prompts: impl Iterator<Item = Vec<u32>>,
) -> Result<Vec<Vec<Completion>>> {
    let request = |(i, tokens)| Request { prompt_id: format!("p/{i}"), tokens, payload: (), own: None };
    let requests = ReadAhead::ready(prompts.enumerate().map(request).collect());
    let mut sink = Groups(Vec::new());
    Engine::new(decoder, settings).run(requests, &mut sink)?;
    Ok(sink.0)
}

/// A request with settings of its own, whose samples are wanted up to so many tokens.
#[derive(Clone, Copy)]
pub struct OwnRequest {
    pub sampling: Sampling,
    pub seed: u64,
    pub group_size: usize,
    pub limit: usize,
    pub wanted: usize,
}

/// Requests of their own kinds, all of which an engine gets at once: some greedy, some truncated, some short, some not heard out.
pub fn own_requests() -> Vec<OwnRequest> {
    let own = |i: usize| OwnRequest {
        sampling: Sampling {
            temperature: [1.0, 0.0, 0.7][i % 3],
            top_p: if i % 4 == 3 { 0.8 } else { 1.0 },
            ..Sampling::default()
        },
        seed: 5 + i as u64 / 2,
        group_size: 1 + i % 3,
        limit: if i.is_multiple_of(2) { 7 } else { 3 },
        wanted: if i % 5 == 2 { 2 } else { usize::MAX },
    };
    (0..9).map(own).collect()
}

/// The completions of these requests; prompts are those of [`completions`].
pub fn own_completions(
    decoder: &mut dyn Decoder,
    settings: Settings,
    requests: &[OwnRequest],
    prompts: impl Iterator<Item = Vec<u32>>,
) -> Result<Vec<Vec<Completion>>> {
    let ears: Vec<_> =
        requests.iter().map(|own| Arc::new(Ear { heard: Mutex::default(), wanted: own.wanted })).collect();
    let request = |(i, tokens): (usize, Vec<u32>)| {
        let OwnRequest { sampling, seed, group_size, limit, .. } = requests[i];
        let listener = Arc::clone(&ears[i]) as Arc<dyn Listener>;
        let own = OwnSettings { group_size, max_completion_tokens: limit, sampling, seed, listener };
        Request { prompt_id: format!("p/{i}"), tokens, payload: (), own: Some(own) }
    };
    let requests = ReadAhead::ready(prompts.take(requests.len()).enumerate().map(request).collect());
    let mut sink = Groups(Vec::new());
    Engine::new(decoder, settings).run(requests, &mut sink)?;
    for (ear, group) in ears.iter().zip(&sink.0) {
        let heard = ear.heard.lock().unwrap();
        for (sample, completion) in group.iter().enumerate() {
            let of_sample: Vec<&Heard> = heard.iter().filter(|heard| heard.sample == sample).collect();
            assert!(of_sample.iter().map(|heard| heard.token).eq(completion.tokens.iter().copied()));
            assert!(of_sample.iter().map(|heard| heard.logprob).eq(completion.logprobs.iter().copied()));
            let end = of_sample.last().unwrap().end;
            assert!(end == Some(completion.stopped) || end.is_none() && completion.tokens.len() == ear.wanted);
        }
    }
    Ok(sink.0)
}

#[derive(Debug)]
struct Ear {
    heard: Mutex<Vec<Heard>>,
    wanted: usize,
}

impl Listener for Ear {
    fn hear(&self, token: Heard) -> bool {
        let mut heard = self.heard.lock().unwrap();
        heard.push(token);
        heard.iter().filter(|one| one.sample == token.sample).count() < self.wanted
    }
}
