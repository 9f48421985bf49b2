//! The way of a request to the engine, and of its tokens back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Mutex, PoisonError};

use crate::engine::{Heard, Listener, Request};
use crate::process::read_ahead::ReadAhead;

/// Most requests that wait for the engine.
const WAITING: usize = 256;

/// Requests that wait for the engine.
pub struct Queue {
    sender: Mutex<Option<SyncSender<Waiting>>>,
}

struct Waiting {
    request: Request<()>,
    wanted: Arc<[AtomicBool]>,
}

/// Why a request cannot wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotQueued {
    /// Too many do.
    Full,
    /// Nothing is sampled any more.
    Closed,
}

impl Queue {
    /// An empty queue, and the end that the engine takes requests from. Those that nobody wants any more are left out.
    pub fn new() -> (Self, ReadAhead<Request<()>>) {
        let (sender, receiver) = sync_channel::<Waiting>(WAITING);
        // Not ahead at all: a request waits here, where it can still be left out.
        let requests = ReadAhead::spawn(0, move |mut producer| {
            for Waiting { request, wanted } in receiver {
                let is_wanted = wanted.iter().any(|one| one.load(Ordering::Relaxed));
                if is_wanted && !(producer.push(Ok(request)) && producer.send()) {
                    return;
                }
            }
        });
        (Self { sender: Mutex::new(Some(sender)) }, requests)
    }

    /// Adds a request, whose listener belongs to `answers`.
    ///
    /// # Errors
    /// Why it cannot wait.
    pub fn add(&self, request: Request<()>, answers: &Answers) -> Result<(), NotQueued> {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = Waiting { request, wanted: Arc::clone(&answers.wanted) };
        match sender.as_ref().ok_or(NotQueued::Closed)?.try_send(waiting) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(NotQueued::Full),
            Err(TrySendError::Disconnected(_)) => Err(NotQueued::Closed),
        }
    }

    /// Takes no more requests; the engine ends after those that are there.
    pub fn close(&self) {
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether it takes requests.
    pub fn is_open(&self) -> bool {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// The client's side of a request. When it is dropped, the request's samples end.
pub struct Answers {
    /// Tokens as they are drawn; closed when there are no more.
    pub tokens: Receiver<Heard>,
    wanted: Arc<[AtomicBool]>,
}

/// The engine's side.
#[derive(Debug)]
struct Ear {
    tokens: Sender<Heard>,
    wanted: Arc<[AtomicBool]>,
}

impl Answers {
    /// Both sides, for so many samples.
    pub fn new(samples: usize) -> (Self, Arc<dyn Listener>) {
        let (sender, tokens) = channel();
        let wanted: Arc<[AtomicBool]> = (0..samples).map(|_| AtomicBool::new(true)).collect();
        let ear = Ear { tokens: sender, wanted: Arc::clone(&wanted) };
        (Self { tokens, wanted }, Arc::new(ear))
    }

    /// Ends a sample.
    pub fn end(&self, sample: usize) {
        self.wanted[sample].store(false, Ordering::Relaxed);
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        (0..self.wanted.len()).for_each(|sample| self.end(sample));
    }
}

impl Listener for Ear {
    fn hear(&self, token: Heard) -> bool {
        self.wanted[token.sample].load(Ordering::Relaxed) && self.tokens.send(token).is_ok()
    }
}
