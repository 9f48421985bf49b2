//! Samples many sequences at once from one model: token ids in, token ids out.
//!
//! Knows no text, records or files. Sequences run in a fixed number of slots, which are refilled as sequences finish. The keys and values
//! of a prompt are computed once and shared by the samples of its group. A completion depends on (seed, step, prompt, sample) alone: the
//! model computes the same logits in any batch, and [`crate::numbers::rng`] makes the same draws in any order.

#[cfg(feature = "candle")]
mod candle;
mod cpu;
mod decoder;
mod gpu;
mod request;
mod sampler;
mod scheduler;

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::model::Sampling;
use crate::process::cancel::Stop;
use crate::process::read_ahead::ReadAhead;

#[cfg(feature = "candle")]
pub use candle::{CandleDecoder, Teacher};
pub use cpu::CpuDecoder;
pub use decoder::{Decoder, Drawn, Prefill};
pub use gpu::{GpuDecoder, GpuOptions};
pub use request::{Heard, Listener, OwnSettings, Request};
pub use sampler::Sampler;
pub use scheduler::{Scheduler, Start};

/// Events that wait for a slow sink before sampling waits too.
const EVENTS: usize = 64;

const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// How to sample.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Samples per prompt, at least 1.
    pub group_size: usize,
    /// Sequences sampled at once, at least 1.
    pub max_sequences: usize,
    /// Longest completion, end token included, at least 1 (tokens).
    pub max_completion_tokens: usize,
    /// The distribution.
    pub sampling: Sampling,
    /// Tokens that end a completion.
    pub stop_ids: Vec<u32>,
    /// Seed of all draws.
    pub seed: u64,
    /// Step of the policy that the samples will train; each step draws differently.
    pub step: u64,
}

/// A sampled completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Its tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each token (nats).
    pub logprobs: Vec<f32>,
    /// Whether the last token is an end token; if not, the completion reached its longest length.
    pub stopped: bool,
}

/// Work done so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Sequences finished.
    pub sequences: usize,
    /// Tokens sampled.
    pub tokens: usize,
}

/// Receives what an [`Engine`] samples.
pub trait Sink<T> {
    /// Called once per group, in the order of the requests.
    ///
    /// # Errors
    /// Any; it ends the run at once.
    fn group(&mut self, request: Request<T>, completions: Vec<Completion>) -> Result<()>;

    /// Called at most ten times per second.
    ///
    /// # Errors
    /// Any; it ends the run at once.
    fn progress(&mut self, work: Work) -> Result<()>;
}

/// Runs sequences in the slots of a [`Decoder`].
pub struct Engine<'d> {
    decoder: &'d mut dyn Decoder,
    settings: Settings,
    slots: Vec<Option<Sequence>>,
    drawn: Vec<Drawn>,
    work: Work,
    stop: Stop,
}

struct Sequence {
    group: usize,
    sample: usize,
    completion: Completion,
    /// Longest completion (tokens).
    limit: usize,
    listener: Option<Arc<dyn Listener>>,
}

/// Requests, and the one that is not admitted yet.
struct Arrivals<T> {
    requests: ReadAhead<Request<T>>,
    held: Option<Request<T>>,
}

/// A group until its last sample has finished.
struct Group<T> {
    request: Request<T>,
    completions: Vec<Option<Completion>>,
}

impl<T> Group<T> {
    fn into_event(self) -> Event<T> {
        let completions = self.completions.into_iter().map(|one| one.expect("all samples have finished"));
        Event::Group(self.request, completions.collect())
    }
}

/// A call of the sink, which runs on another thread.
enum Event<T> {
    Group(Request<T>, Vec<Completion>),
    Progress(Work),
}

impl<'d> Engine<'d> {
    /// Makes an engine with empty slots. `decoder` must have been made with the same settings, except for seed and step.
    #[must_use]
    pub fn new(decoder: &'d mut dyn Decoder, settings: Settings) -> Self {
        let slots = (0..settings.max_sequences).map(|_| None).collect();
        Self { decoder, settings, slots, drawn: Vec::new(), work: Work::default(), stop: Stop::default() }
    }

    /// Ends the sampling early when `stop` is requested.
    #[must_use]
    pub fn until(self, stop: &Stop) -> Self {
        Self { stop: stop.clone(), ..self }
    }

    /// Samples a group for each request until there are no more. Takes a request when a slot is free for it, and waits for one only
    /// when nothing runs. An error among the requests is returned after what came before it is sampled.
    ///
    /// # Errors
    /// Those of the requests, the sink and the stop, [`Error::Numerics`] when logits are not finite, [`Error::Device`] of the decoder.
    pub fn run<T: Send>(&mut self, requests: ReadAhead<Request<T>>, sink: &mut dyn Sink<T>) -> Result<Work> {
        let (sender, events) = sync_channel(EVENTS);
        let mut outcome = Ok(());
        // Sampling runs on a thread of the pool, where parallel loops start without a switch of threads. The sink stays on this one.
        let taken = rayon::in_place_scope(|scope| {
            scope.spawn(|_| outcome = self.work_through(requests, sender));
            events.into_iter().try_for_each(|event| match event {
                Event::Group(request, completions) => sink.group(request, completions),
                Event::Progress(work) => sink.progress(work),
            })
        });
        taken.and(outcome).map(|()| self.work)
    }

    fn work_through<T>(&mut self, requests: ReadAhead<Request<T>>, events: SyncSender<Event<T>>) -> Result<()> {
        let mut scheduler = Scheduler::new(self.settings.max_sequences);
        let mut arrivals = Arrivals { requests, held: None };
        let mut ended: Option<Result<()>> = None;
        let mut said = Instant::now();
        loop {
            while ended.is_none() && scheduler.wants_group() {
                match self.next_request(&mut arrivals, scheduler.is_idle())? {
                    Poll::Ready(Some(Ok(request))) => {
                        let size = request.group_size(&self.settings);
                        scheduler.add(Group { request, completions: vec![None; size] }, size);
                    }
                    Poll::Ready(Some(Err(err))) => ended = Some(Err(err)),
                    Poll::Ready(None) => ended = Some(Ok(())),
                    Poll::Pending => break,
                }
            }
            self.stop.check()?;
            self.start(&mut scheduler)?;
            if self.slots.iter().any(Option::is_some) {
                self.decoder.step(&mut self.drawn)?;
                self.absorb(&mut scheduler)?;
            }
            while let Some(group) = scheduler.take_finished() {
                if events.send(group.into_event()).is_err() {
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

    /// The next request that can run beside those that do. Waits for one only when nothing runs.
    fn next_request<T>(&mut self, from: &mut Arrivals<T>, is_idle: bool) -> Result<Poll<Option<Result<Request<T>>>>> {
        let next = match from.held.take() {
            Some(held) => Poll::Ready(Some(Ok(held))),
            None if is_idle => Poll::Ready(from.requests.next()),
            None => from.requests.poll(),
        };
        let Poll::Ready(Some(Ok(request))) = next else { return Ok(next) };
        if self.decoder.admits(&request.sampling(&self.settings), is_idle)? {
            return Ok(Poll::Ready(Some(Ok(request))));
        }
        from.held = Some(request);
        Ok(Poll::Pending)
    }

    /// Starts waiting samples in free slots. The first sample of a group prefills its prompt.
    fn start<T>(&mut self, scheduler: &mut Scheduler<Group<T>>) -> Result<()> {
        let starts: Vec<Start> = std::iter::from_fn(|| scheduler.start()).collect();
        if starts.is_empty() {
            return Ok(());
        }
        let first = starts.iter().filter(|start| start.sample == 0).map(|start| {
            let request = &scheduler.group(start.group).request;
            let (stream, sampling) = (request.stream(&self.settings), request.sampling(&self.settings));
            Prefill { group: start.group, tokens: &request.tokens, stream, sampling }
        });
        self.decoder.prefill(&first.collect::<Vec<_>>())?;
        for start in &starts {
            let request = &scheduler.group(start.group).request;
            self.slots[start.slot] = Some(Sequence::new(*start, request, &self.settings));
        }
        self.decoder.begin(&starts, &mut self.drawn)?;
        self.absorb(scheduler)
    }

    /// Appends the tokens that were drawn, and takes finished completions out of their slots.
    fn absorb<T>(&mut self, scheduler: &mut Scheduler<Group<T>>) -> Result<()> {
        for Drawn { slot, drawn } in self.drawn.drain(..) {
            let sequence = self.slots[slot].as_mut().expect("only slots with a sequence draw");
            let (group, sample) = (sequence.group, sequence.sample);
            let Some((token, logprob)) = drawn else {
                let request = &scheduler.group(group).request;
                let tokens = [&request.tokens[..], &sequence.completion.tokens].concat();
                let layer = self.decoder.first_not_finite(&tokens)?;
                let at = format!("prompt {}, sample {sample}", request.prompt_id);
                return Err(not_finite(self.settings.step, &at, sequence.completion.tokens.len(), layer));
            };
            if sequence.goes_on_with(token, logprob, &self.settings) {
                continue;
            }
            let completion = self.slots[slot].take().expect("as above").completion;
            self.work.sequences += 1;
            self.work.tokens += completion.tokens.len();
            if completion.stopped || completion.tokens.len() == self.settings.max_completion_tokens {
                self.decoder.end(slot);
            } else {
                self.decoder.cut(slot);
            }
            let (whole, is_finished) = scheduler.finish(slot, group);
            whole.completions[sample] = Some(completion);
            if is_finished {
                self.decoder.forget(group);
            }
        }
        Ok(())
    }
}

impl Sequence {
    fn new<T>(start: Start, request: &Request<T>, settings: &Settings) -> Self {
        let limit = request.max_completion_tokens(settings);
        let (tokens, logprobs) = (Vec::with_capacity(limit), Vec::with_capacity(limit));
        let completion = Completion { tokens, logprobs, stopped: false };
        let listener = request.own.as_ref().map(|own| Arc::clone(&own.listener));
        Self { group: start.group, sample: start.sample, completion, limit, listener }
    }

    /// Appends a token; returns whether the sequence goes on.
    fn goes_on_with(&mut self, token: u32, logprob: f32, settings: &Settings) -> bool {
        let Completion { tokens, logprobs, stopped } = &mut self.completion;
        tokens.push(token);
        logprobs.push(logprob);
        *stopped = settings.stop_ids.contains(&token);
        let end = (*stopped || tokens.len() >= self.limit).then_some(*stopped);
        let heard = Heard { sample: self.sample, token, logprob, end };
        let is_wanted = self.listener.as_ref().is_none_or(|listener| listener.hear(heard));
        is_wanted && end.is_none()
    }
}

fn not_finite(step: u64, sequence: &str, position: usize, layer: Option<usize>) -> Error {
    let place = layer.map_or("the LM head".into(), |layer| format!("layer {layer}"));
    Error::Numerics(format!("step {step}, {sequence}, position {position}: logits are not finite, first in {place}"))
}
