//! Tokens to tokens: many sequences sampled at once from one model.
//!
//! Knows no text, records or files. A fixed number of slots, refilled as sequences end; the prompt's keys and values are computed
//! once a group and shared by its samples. A completion is a function of (seed, step, prompt, sample) alone: the model gives the same
//! logits in any batch, and [`crate::rng`] the same draws in any order.

mod sampler;
mod scheduler;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::model::{DecodeRow, KvCache, Model};
use crate::rng::Stream;

pub use sampler::{Sampler, Sampling};
pub use scheduler::{Scheduler, Start};

/// Models up to this many bytes of weights prefill several prompts side by side; larger ones share out each product.
const SMALL_MODEL: usize = 16 << 20;

/// Most tokens of prompts packed together: enough for products at full speed, and bounds memory [tokens].
const PREFILL_TOKENS: usize = 512;

/// Groups made ahead of a sink that is slow to take them.
const EVENTS: usize = 64;

const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// How to sample.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Samples of each prompt, at least 1.
    pub group_size: usize,
    /// Sequences in flight, at least 1.
    pub max_sequences: usize,
    /// Tokens of a completion, end token included, at least 1.
    pub max_completion_tokens: usize,
    /// The distribution.
    pub sampling: Sampling,
    /// Tokens that end a completion.
    pub stop_ids: Vec<u32>,
    /// Of everything random.
    pub seed: u64,
    /// Step of the policy, from which the draws differ too.
    pub step: u64,
}

/// A prompt to sample from.
#[derive(Debug)]
pub struct Request<T> {
    /// Names the prompt's draws, and the prompt in errors.
    pub prompt_id: String,
    /// At least one token; with [`Settings::max_completion_tokens`] no more than the model has positions, which callers check.
    pub tokens: Vec<u32>,
    /// What the caller wants back with the completions.
    pub payload: T,
}

/// A sampled completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Its tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each token [nats].
    pub logprobs: Vec<f32>,
    /// Whether the last token is an end token; else the length was reached.
    pub stopped: bool,
}

/// Work done so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Sequences ended.
    pub sequences: usize,
    /// Tokens sampled.
    pub tokens: usize,
}

/// Who takes what an [`Engine`] makes.
pub trait Sink<T> {
    /// A group, in the order of the requests, its samples in order.
    ///
    /// # Errors
    /// Any; it ends the run at once.
    fn group(&mut self, request: Request<T>, completions: Vec<Completion>) -> Result<()>;

    /// Ten times a second or less.
    ///
    /// # Errors
    /// Any; it ends the run at once.
    fn progress(&mut self, work: Work) -> Result<()>;
}

/// A model with slots for sequences.
pub struct Engine<'m> {
    model: &'m Model,
    settings: Settings,
    slots: Vec<Slot>,
    samplers: Vec<Sampler>,
    logits: Vec<f32>,
    work: Work,
}

#[derive(Default)]
struct Slot {
    /// Memory for the completion's keys and values, taken when the slot is first used and kept.
    own: Option<KvCache>,
    sequence: Option<Sequence>,
}

struct Prompt {
    cache: KvCache,
    logits: Vec<f32>,
    stream: Stream,
    tokens: Vec<u32>,
}

struct Sequence {
    group: usize,
    sample: usize,
    prompt: Arc<Prompt>,
    completion: Completion,
    finite: bool,
}

/// A group from its arrival until it leaves.
struct Group<T> {
    request: Request<T>,
    /// From the start of its first sample to that of its last.
    prompt: Option<Arc<Prompt>>,
    completions: Vec<Option<Completion>>,
}

/// The groups that have arrived and not left.
struct Groups<T> {
    waiting: VecDeque<Group<T>>,
    /// How many have left.
    left: usize,
}

impl<T> Groups<T> {
    fn arrive(&mut self, request: Request<T>, size: usize) {
        self.waiting.push_back(Group { request, prompt: None, completions: vec![None; size] });
    }

    fn at(&self, group: usize) -> &Group<T> {
        &self.waiting[group - self.left]
    }

    fn at_mut(&mut self, group: usize) -> &mut Group<T> {
        &mut self.waiting[group - self.left]
    }

    fn leave(&mut self) -> Event<T> {
        let group = self.waiting.pop_front().expect("a group that leaves has arrived");
        self.left += 1;
        let completions = group.completions.into_iter().map(|one| one.expect("all samples have ended"));
        Event::Group(group.request, completions.collect())
    }
}

/// What the sink is told.
enum Event<T> {
    Group(Request<T>, Vec<Completion>),
    Progress(Work),
}

impl<'m> Engine<'m> {
    /// Makes room for the slots; nothing is computed.
    #[must_use]
    pub fn new(model: &'m Model, settings: Settings) -> Self {
        let slots = (0..settings.max_sequences).map(|_| Slot::default()).collect();
        let samplers = (0..rayon::current_num_threads()).map(|_| Sampler::default()).collect();
        Self { model, settings, slots, samplers, logits: Vec::new(), work: Work::default() }
    }

    /// Samples a group for each request until the sender is gone. A request is taken when a slot is free for it; nothing waits for
    /// requests while there is work. An error among the requests ends them: what came before it is sampled, then it is returned.
    ///
    /// # Errors
    /// That of a request or of the sink, and [`Error::Numerics`] when logits are not finite.
    pub fn run<T: Send>(&mut self, requests: Receiver<Result<Request<T>>>, sink: &mut dyn Sink<T>) -> Result<Work> {
        let (sender, events) = sync_channel(EVENTS);
        let mut outcome = Ok(());
        // On a thread of the pool, where each step's parallel loops start without a switch of threads; the sink stays on this one.
        let taken = rayon::in_place_scope(|scope| {
            scope.spawn(|_| outcome = self.work_through(requests, sender));
            events.into_iter().try_for_each(|event| match event {
                Event::Group(request, completions) => sink.group(request, completions),
                Event::Progress(work) => sink.progress(work),
            })
        });
        taken.and(outcome).map(|()| self.work)
    }

    fn work_through<T>(&mut self, requests: Receiver<Result<Request<T>>>, events: SyncSender<Event<T>>) -> Result<()> {
        let mut scheduler = Scheduler::new(self.settings.max_sequences, self.settings.group_size);
        let mut groups = Groups { waiting: VecDeque::new(), left: 0 };
        let mut ended: Option<Result<()>> = None;
        let mut said = Instant::now();
        loop {
            while ended.is_none() && scheduler.wants_group() {
                match receive(&requests, scheduler.is_idle()) {
                    Next::Request(request) => {
                        scheduler.arrive();
                        groups.arrive(request, self.settings.group_size);
                    }
                    Next::Later => break,
                    Next::End(outcome) => ended = Some(outcome),
                }
            }
            let starts: Vec<Start> = std::iter::from_fn(|| scheduler.start()).collect();
            self.start(&starts, &mut groups)?;
            self.retire(&mut scheduler, &mut groups);
            self.decode(&groups)?;
            self.retire(&mut scheduler, &mut groups);
            while scheduler.leave().is_some() {
                if events.send(groups.leave()).is_err() {
                    return Ok(()); // the sink has an error of its own
                }
            }
            if said.elapsed() >= PROGRESS_INTERVAL {
                said = Instant::now();
                if events.send(Event::Progress(self.work)).is_err() {
                    return Ok(()); // as above
                }
            }
            if let Some(outcome) = ended.take_if(|_| scheduler.is_idle()) {
                return outcome;
            }
        }
    }

    /// Prefills the prompts of groups that start, and draws the first token of each sample from its prompt's logits.
    fn start<T>(&mut self, starts: &[Start], groups: &mut Groups<T>) -> Result<()> {
        let first: Vec<usize> = starts.iter().filter(|start| start.sample == 0).map(|start| start.group).collect();
        let prompts = self.prefill(first.iter().map(|&i| &groups.at(i).request).collect());
        for (i, prompt) in first.into_iter().zip(prompts) {
            groups.at_mut(i).prompt = Some(Arc::new(prompt));
        }
        for start in starts {
            let group = groups.at_mut(start.group);
            let prompt = group.prompt.as_ref().expect("held until the last sample starts").clone();
            if start.sample + 1 == self.settings.group_size {
                group.prompt = None; // from here on its samples hold it, and the last to end frees it
            }
            let slot = &mut self.slots[start.slot];
            match &mut slot.own {
                Some(own) => own.clear(),
                None => slot.own = Some(KvCache::new(self.model.config(), self.settings.max_completion_tokens)),
            }
            slot.sequence = Some(Sequence::new(*start, prompt, self.settings.max_completion_tokens));
        }
        let running = self.slots.iter_mut().filter_map(|slot| slot.sequence.as_mut());
        let new = running.filter(|sequence| sequence.completion.tokens.is_empty());
        sample(&mut new.map(|sequence| (None, sequence)).collect::<Vec<_>>(), &mut self.samplers, &self.settings);
        self.check(groups)
    }

    /// The prompts' keys, values and logits: each alone on a thread, or packed where a product is worth all threads.
    fn prefill<T>(&self, requests: Vec<&Request<T>>) -> Vec<Prompt> {
        let tokens: Vec<&[u32]> = requests.iter().map(|request| &request.tokens[..]).collect();
        let weights: usize = self.model.parameters().iter().map(|parameter| size_of_val(*parameter)).sum();
        let computed: Vec<(KvCache, Vec<f32>)> = if weights <= SMALL_MODEL {
            tokens.par_iter().flat_map_iter(|tokens| self.model.prefill(&[tokens])).collect()
        } else {
            in_runs(&tokens, PREFILL_TOKENS).into_iter().flat_map(|run| self.model.prefill(run)).collect()
        };
        let prompts = requests.into_iter().zip(computed).map(|(request, (cache, logits))| {
            let stream = Stream::new(self.settings.seed, self.settings.step, &request.prompt_id);
            Prompt { cache, logits, stream, tokens: request.tokens.clone() }
        });
        prompts.collect()
    }

    /// One token more for each sequence.
    fn decode<T>(&mut self, groups: &Groups<T>) -> Result<()> {
        let mut rows: Vec<DecodeRow<'_>> = Vec::with_capacity(self.slots.len());
        for slot in &mut self.slots {
            if let (Some(sequence), Some(own)) = (&slot.sequence, &mut slot.own) {
                let token = *sequence.completion.tokens.last().expect("drawn when it started");
                rows.push(DecodeRow { token, prompt: &sequence.prompt.cache, own });
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let vocabulary = self.model.config().vocab_size;
        self.logits.resize(rows.len() * vocabulary, 0.0);
        self.model.decode(&mut rows, &mut self.logits);
        let running = self.slots.iter_mut().filter_map(|slot| slot.sequence.as_mut());
        let logits = self.logits.chunks_exact(vocabulary).map(Some);
        sample(&mut logits.zip(running).collect::<Vec<_>>(), &mut self.samplers, &self.settings);
        self.check(groups)
    }

    fn check<T>(&self, groups: &Groups<T>) -> Result<()> {
        let mut running = self.slots.iter().filter_map(|slot| slot.sequence.as_ref());
        let Some(broken) = running.find(|sequence| !sequence.finite) else {
            return Ok(());
        };
        let prompt_id = &groups.at(broken.group).request.prompt_id;
        let (sample, position) = (broken.sample, broken.completion.tokens.len());
        Err(Error::Numerics(format!("prompt {prompt_id}, sample {sample}, position {position}: logits are not finite")))
    }

    /// Takes completions that have ended out of their slots.
    fn retire<T>(&mut self, scheduler: &mut Scheduler, groups: &mut Groups<T>) {
        let limit = self.settings.max_completion_tokens;
        for (i, slot) in self.slots.iter_mut().enumerate() {
            let ended =
                |sequence: &mut Sequence| sequence.completion.stopped || sequence.completion.tokens.len() == limit;
            if let Some(sequence) = slot.sequence.take_if(ended) {
                self.work.sequences += 1;
                self.work.tokens += sequence.completion.tokens.len();
                scheduler.end(i, sequence.group);
                groups.at_mut(sequence.group).completions[sequence.sample] = Some(sequence.completion);
            }
        }
    }
}

impl Sequence {
    fn new(start: Start, prompt: Arc<Prompt>, limit: usize) -> Self {
        let (tokens, logprobs) = (Vec::with_capacity(limit), Vec::with_capacity(limit));
        let completion = Completion { tokens, logprobs, stopped: false };
        Self { group: start.group, sample: start.sample, prompt, completion, finite: true }
    }

    fn extend(&mut self, logits: Option<&[f32]>, sampler: &mut Sampler, settings: &Settings) {
        let completion = &mut self.completion;
        let uniform = self.prompt.stream.uniform(self.sample as u64, completion.tokens.len() as u64);
        let history = [&self.prompt.tokens[..], &completion.tokens[..]];
        let logits = logits.unwrap_or(&self.prompt.logits);
        match sampler.draw(logits, history, uniform, &settings.sampling) {
            Some((token, logprob)) => {
                completion.tokens.push(token);
                completion.logprobs.push(logprob);
                completion.stopped = settings.stop_ids.contains(&token);
            }
            None => self.finite = false,
        }
    }
}

/// Logits, those of the prompt for `None`, and the sequence they belong to.
type Row<'a> = (Option<&'a [f32]>, &'a mut Sequence);

/// One token more for each row, the rows shared out in as many runs as there are samplers.
fn sample(rows: &mut [Row<'_>], samplers: &mut [Sampler], settings: &Settings) {
    let share = rows.len().div_ceil(samplers.len()).max(1);
    rows.par_chunks_mut(share).zip(samplers).for_each(|(rows, sampler)| {
        for (logits, sequence) in rows {
            sequence.extend(*logits, sampler, settings);
        }
    });
}

/// Cuts prompts into runs of at most `max_tokens`; a longer one is a run of its own.
fn in_runs<'a, 'b>(mut prompts: &'a [&'b [u32]], max_tokens: usize) -> Vec<&'a [&'b [u32]]> {
    let mut runs = Vec::new();
    while !prompts.is_empty() {
        let mut tokens = 0;
        let fit = prompts.iter().take_while(|prompt| {
            tokens += prompt.len();
            tokens <= max_tokens
        });
        let (run, rest) = prompts.split_at(fit.count().max(1));
        runs.push(run);
        prompts = rest;
    }
    runs
}

enum Next<T> {
    Request(Request<T>),
    Later,
    End(Result<()>),
}

/// The next request; waits for it only if asked to.
fn receive<T>(requests: &Receiver<Result<Request<T>>>, wait: bool) -> Next<T> {
    let received = if wait { requests.recv().map_err(|_| TryRecvError::Disconnected) } else { requests.try_recv() };
    match received {
        Ok(Ok(request)) => Next::Request(request),
        Ok(Err(err)) => Next::End(Err(err)),
        Err(TryRecvError::Empty) => Next::Later,
        Err(TryRecvError::Disconnected) => Next::End(Ok(())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_prompts_are_full_and_a_long_prompt_goes_alone() {
        let prompts: Vec<Vec<u32>> = [3, 3, 9, 2, 4, 1].map(|len| vec![0; len]).to_vec();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let lengths = |max| -> Vec<Vec<usize>> {
            in_runs(&prompts, max).into_iter().map(|run| run.iter().map(|prompt| prompt.len()).collect()).collect()
        };
        assert_eq!(lengths(6), [vec![3, 3], vec![9], vec![2, 4], vec![1]]);
        assert_eq!(lengths(100), [[3, 3, 9, 2, 4, 1]]);
    }
}
