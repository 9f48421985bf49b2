//! `rollout --server`: completions from a server that speaks OpenAI's API, as the same records.
//!
//! Several groups are asked for at once; they are written in the order of their prompts.

mod api;
mod client;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread;
use std::time::Duration;

use self::api::{Asked, Group, Served};
use self::client::Client;
use super::requests::RequestBuilder;
use super::{LongPrompt, NAME, RolloutJob, requests_of};
use crate::engine::{Request, Work};
use crate::error::{Error, Result};
use crate::lines::jsonl::{Input, Output};
use crate::lines::prompt::Prompt;
use crate::lines::record::Line;
use crate::model::Sampling;
use crate::process::cancel::Stop;
use crate::process::message::{detail, note};
use crate::process::progress::Progress;
use crate::process::read_ahead::ReadAhead;
use crate::rollout::records::speed;

/// Sequences asked for at once where nothing is said.
const SEQUENCES: usize = 64;
/// Groups that may wait for an earlier one to be written, for each that is asked for.
const WAITING: usize = 4;
/// How often a signal is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Which server, and what of it.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Its address, with or without `/v1`.
    pub url: String,
    /// Its name of the model; `None` for the only one that it has.
    pub model: Option<String>,
    /// The key that it wants.
    pub api_key: Option<String>,
}

/// A prompt that waits for its completions, and these.
type Done = (u64, Request<Line>, Result<Group>);

/// Samples a group for each of these lines of `input` from a server.
///
/// # Errors
/// [`Error::Usage`] for options that only a model of one's own has, [`Error::Server`] when the server cannot be used; groups before the
/// failure are written first. Those of the input, the output and the stop.
pub fn sample_from(
    options: &ServerOptions,
    job: RolloutJob,
    (input, lines): (Input, Range<u64>),
    out: &mut Output,
) -> Result<()> {
    check(&job)?;
    let served =
        Served::find(Client::new(&options.url, options.api_key.clone(), &job.stop)?, options.model.as_deref())?;
    detail(NAME, &served.describe());
    if !served.has_logprobs(&job.sampling) {
        note(
            NAME,
            "records get no log-probabilities: this server's are those of temperature 1 without --top-p, --top-k and --min-p",
        );
    }
    let system = job.prompts.format.system_prompt(Path::new("."))?;
    let asked = Asked {
        group_size: job.group_size,
        sampling: job.sampling,
        max_completion_tokens: job.sizes.completion_tokens,
        seed: job.seed,
    };
    let groups_at_once = (job.sizes.sequences.unwrap_or(SEQUENCES) / job.group_size).max(1);
    let builder = RequestBuilder::for_a_server(job.prompts, system);
    let requests = requests_of(input, lines, builder, Box::new(|_| Ok(false)));
    let mut writer =
        Writer { asked: asked.clone(), policy_step: served.policy_step, policy_id: None, work: Work::default(), out };
    let mut progress = Progress::new(NAME);
    let workers = Workers::start(groups_at_once, served, asked);
    workers.run(requests, &job.stop, &mut |request, group| {
        writer.write(request, group)?;
        let (work, seconds) = (writer.work, progress.seconds());
        progress.update(|| speed(work, seconds));
        Ok(())
    })?;
    progress.detail(&speed(writer.work, progress.seconds()));
    Ok(())
}

/// Refuses what a server decides, or does not know.
fn check(job: &RolloutJob) -> Result<()> {
    job.sampling.check()?;
    let refused = [
        (job.prompts.raw, "--raw", "the server applies its chat template"),
        (job.prompts.on_long != LongPrompt::Refuse, "--on-long-prompt", "the server refuses prompts that are too long"),
        (
            job.sampling.repetition_penalty != Sampling::default().repetition_penalty,
            "--repetition-penalty",
            "it is not asked for",
        ),
    ];
    match refused.into_iter().find(|(is_given, ..)| *is_given) {
        Some((_, option, why)) => Err(Error::Usage(format!("{option} does not go with --server: {why}"))),
        None => Ok(()),
    }
}

/// Threads that ask the server, each for a group at a time.
struct Workers {
    count: usize,
    to_do: Sender<(u64, Request<Line>)>,
    done: Receiver<Done>,
}

impl Workers {
    /// They are not waited for in the end: one may sit in a request whose answer nobody needs.
    fn start(count: usize, served: Served, asked: Asked) -> Self {
        let (to_do, arrivals) = channel::<(u64, Request<Line>)>();
        let (finished, done) = channel();
        let shared = Arc::new((served, asked, Mutex::new(arrivals)));
        for _ in 0..count {
            let (shared, finished) = (Arc::clone(&shared), finished.clone());
            thread::spawn(move || {
                let (served, asked, arrivals) = &*shared;
                let next = || arrivals.lock().unwrap_or_else(PoisonError::into_inner).recv();
                while let Ok((place, request)) = next() {
                    let group = sample(served, &request, asked);
                    if finished.send((place, request, group)).is_err() {
                        return;
                    }
                }
            });
        }
        Self { count, to_do, done }
    }

    /// Passes each request with its group to `write`, in their order.
    fn run(
        self,
        mut requests: ReadAhead<Request<Line>>,
        stop: &Stop,
        write: &mut dyn FnMut(Request<Line>, Group) -> Result<()>,
    ) -> Result<()> {
        let (mut begun, mut written, mut has_more) = (0, 0, true);
        let mut waiting: BTreeMap<u64, (Request<Line>, Result<Group>)> = BTreeMap::new();
        loop {
            while let Some((request, group)) = waiting.remove(&written) {
                write(request, group?)?;
                written += 1;
            }
            stop.check()?;
            let unwritten = begun - written;
            let asking = unwritten - waiting.len() as u64;
            if has_more && asking < self.count as u64 && unwritten < (WAITING * self.count) as u64 {
                match next(&mut requests, asking == 0) {
                    Next::Some(request) => {
                        self.to_do
                            .send((begun, request?))
                            .map_err(|_| Error::Panicked("a thread that asks the server"))?;
                        begun += 1;
                        continue;
                    }
                    Next::End => has_more = false,
                    Next::Later => {}
                }
            }
            if asking == 0 && !has_more {
                return Ok(());
            }
            match self.done.recv_timeout(LOOK) {
                Ok((place, request, group)) => drop(waiting.insert(place, (request, group))),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Panicked("a thread that asks the server")),
            }
        }
    }
}

/// The next request of an input that may be slow.
enum Next {
    Some(Result<Request<Line>>),
    /// It has not come yet.
    Later,
    End,
}

/// Waits for it only if there is nothing else to wait for.
fn next(requests: &mut ReadAhead<Request<Line>>, may_wait: bool) -> Next {
    let found = match requests.poll() {
        Poll::Ready(found) => found,
        Poll::Pending if may_wait => requests.next(),
        Poll::Pending => return Next::Later,
    };
    found.map_or(Next::End, Next::Some)
}

fn sample(served: &Served, request: &Request<Line>, asked: &Asked) -> Result<Group> {
    let prompt = Prompt::of(&request.payload.record()?)?;
    served.sample(&request.prompt_id, &prompt.messages, asked).map_err(|err| match err {
        Error::Server { address, what } => {
            Error::Server { address, what: format!("prompt {}: {what}", request.prompt_id) }
        }
        other => other,
    })
}

/// Writes groups as records.
struct Writer<'a> {
    asked: Asked,
    policy_step: Option<u64>,
    /// Of the first group.
    policy_id: Option<String>,
    work: Work,
    out: &'a mut Output,
}

impl Writer<'_> {
    fn write(&mut self, request: Request<Line>, group: Group) -> Result<()> {
        self.check_policy(&group)?;
        let mut record = request.payload.record()?;
        record.set("group_id", &format!("{}:{}", self.policy_step.unwrap_or_default(), request.prompt_id));
        record.set("group_size", &group.completions.len());
        record.set("sample_index", &0);
        record.set("policy_id", &group.policy_id);
        if let Some(step) = self.policy_step {
            record.set("policy_step", &step);
        }
        record.set("seed", &self.asked.seed);
        record.set("temperature", &self.asked.sampling.temperature);
        if let Some(tokens) = &group.prompt_token_ids {
            record.set("prompt_token_ids", tokens);
        }
        for (sample, completion) in group.completions.iter().enumerate() {
            let mut record = record.clone();
            record.set("sample_index", &sample);
            if let Some(tokens) = &completion.tokens {
                record.set("completion_token_ids", tokens);
            }
            if let Some(logprobs) = &completion.logprobs {
                record.set("logprobs", logprobs);
            }
            record.set("finish_reason", &completion.finish_reason);
            record.set("completion", &completion.text);
            if let Some(reasoning) = &completion.reasoning {
                record.set("reasoning_content", reasoning);
            }
            self.out.write_line(&record.to_json())?;
        }
        self.work.sequences += group.completions.len();
        self.work.tokens += group.sampled;
        self.out.flush()
    }

    /// Says of the first group what its records are good for, and refuses others' weights.
    fn check_policy(&mut self, group: &Group) -> Result<()> {
        let Some(first) = &self.policy_id else {
            self.policy_id = Some(group.policy_id.clone());
            let has_ids = group.prompt_token_ids.is_some() && group.completions.iter().all(|one| one.tokens.is_some());
            if !has_ids {
                note(
                    NAME,
                    "this server returns no token ids: `score` and `evaluate` take the records, and `grpo-step` refuses them",
                );
            }
            return Ok(());
        };
        if *first == group.policy_id {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "the server's weights changed from {first} to {} while it was asked",
            group.policy_id
        )))
    }
}
