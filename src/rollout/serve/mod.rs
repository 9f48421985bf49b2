//! `rollout --serve`: the model behind an endpoint that programs written for OpenAI's API can use.
//!
//! A thread per connection reads requests ([`http`], [`service`], [`api`]) and hands them to one engine, which samples them together. A request is a
//! group, whose tokens come back to its thread as they are drawn ([`completions`]). A client that leaves ends its sequences.

mod answers;
mod api;
mod choice;
mod completions;
mod http;
mod service;

use std::net::{IpAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::answers::Queue;
use self::api::{Defaults, Refusal};
use self::http::Connection;
use self::service::Service;
use super::{LongPrompt, NAME, Ready, RolloutJob, Source};
use crate::checkpoint::hub;
use crate::engine::{Completion, Request, Sink, Work};
use crate::error::{Error, Result};
use crate::process::cancel::Stop;
use crate::process::message::detail;

/// Most connections at once.
const MAX_CONNECTIONS: usize = 512;
/// How long answers may go on after a signal.
const GRACE: Duration = Duration::from_secs(5);
/// How often a signal is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Where to serve, and to whom.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// `HOST:PORT`, or the `PORT` of the loopback interface; port 0 is any that is free.
    pub address: String,
    /// What clients must know.
    pub api_key: Option<String>,
}

/// Serves a model until a signal comes. Then answers under way have five seconds to end.
///
/// # Errors
/// [`Error::Usage`] for an address that is no address, or open to others without a key; [`Error::Io`] when it is taken; those of
/// [`super::sample`]; [`Error::Interrupted`] after a signal.
pub fn serve(spec: &str, file: Option<&str>, mut job: RolloutJob, options: &ServeOptions) -> Result<()> {
    if job.prompts.on_long == LongPrompt::Skip {
        return Err(Error::Usage(
            "--on-long-prompt skip does not go with --serve: a client waits for an answer".into(),
        ));
    }
    let listener = listen(options)?;
    let source = Source::open(&hub::model(spec, file, &Source::other_types())?, &job.backend.device)?;
    let signals = Stop::on_signals()?;
    job.sizes = job.sizes.for_chats();
    let (seed, sampling, stop) = (job.seed, job.sampling, job.stop.clone());
    let Ready { mut backend, settings, origin, tokenizer, requests } = Ready::new(job, &source, None)?;
    let max_completion_tokens = settings.max_completion_tokens;
    let defaults = Defaults { model: spec.to_owned(), sampling, max_completion_tokens };
    let (queue, arrivals) = Queue::new();
    let key = options.api_key.as_ref().map(|key| blake3::hash(key.as_bytes()));
    let service = Arc::new(Service::new(queue, (requests, tokenizer), (defaults, seed), origin.identity, key));
    let place = listener.local_addr().map_err(Error::io(&options.address))?;
    detail(NAME, &format!("serving {spec} at http://{place}/v1"));
    let doors = {
        let (service, signals, stop) = (Arc::clone(&service), signals.clone(), stop.clone());
        thread::spawn(move || {
            let connections = Arc::new(AtomicUsize::new(0));
            accept(listener, &service, &connections, &signals);
            let closed = Instant::now();
            while !service.has_ended() && closed.elapsed() < GRACE {
                thread::sleep(LOOK);
            }
            stop.abandon();
        })
    };
    let ended = backend.sample(&settings, arrivals, &mut Unheard);
    service.end();
    let _ = doors.join();
    service.wait_for_answers(Duration::from_secs(1));
    signals.check()?;
    ended.map(|_| ())
}

/// Takes connections until a signal comes, or the service closes.
fn accept(listener: TcpListener, service: &Arc<Service>, connections: &Arc<AtomicUsize>, signals: &Stop) {
    while !signals.is_requested() && service.is_open() {
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
        let is_ready = poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&wait)).is_ok_and(|ready| ready > 0);
        if !is_ready {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => admit(stream, service, connections),
            Err(_) => thread::sleep(LOOK), // out of file descriptors, for a while
        }
    }
    service.close();
}

fn admit(stream: TcpStream, service: &Arc<Service>, connections: &Arc<AtomicUsize>) {
    let Ok(mut connection) = Connection::new(stream) else { return };
    if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
        connections.fetch_sub(1, Ordering::Relaxed);
        connection.end_after_answer();
        let body = Refusal::new(503, "too many connections").body();
        let _ = connection.respond(503, &[("Retry-After", "1")], &body);
        return;
    }
    let (service, open) = (Arc::clone(service), Arc::clone(connections));
    let handler = thread::Builder::new().spawn(move || {
        let refusal = |status, what: &str| Refusal::new(status, what).body();
        while let Some(request) = connection.receive(refusal) {
            if service.answer(&request, &mut connection).is_err() {
                break; // the client is gone
            }
        }
        drop(connection);
        open.fetch_sub(1, Ordering::Relaxed);
    });
    if handler.is_err() {
        connections.fetch_sub(1, Ordering::Relaxed);
    }
}

fn listen(options: &ServeOptions) -> Result<TcpListener> {
    let address = &options.address;
    let is_port = !address.is_empty() && address.bytes().all(|byte| byte.is_ascii_digit());
    let whole = if is_port { format!("127.0.0.1:{address}") } else { address.clone() };
    let wrong = |err| Error::Usage(format!("--serve {address}: {err}; it takes HOST:PORT or PORT"));
    let places: Vec<_> = whole.to_socket_addrs().map_err(wrong)?.collect();
    let is_open = |ip: IpAddr| !ip.is_loopback();
    if options.api_key.is_none() && places.iter().any(|place| is_open(place.ip())) {
        return Err(Error::Usage(format!("--serve {address} is open to other machines: it needs an --api-key")));
    }
    TcpListener::bind(&places[..]).map_err(Error::io(address))
}

/// Groups go to their clients token by token.
struct Unheard;

impl Sink<()> for Unheard {
    fn group(&mut self, _: Request<()>, _: Vec<Completion>) -> Result<()> {
        Ok(())
    }

    fn progress(&mut self, _: Work) -> Result<()> {
        Ok(())
    }
}
