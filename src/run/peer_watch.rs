//! Notices, during work that may take minutes, that the sampler or the trainer at the other end of the pipe is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::{Lock, PeerState, Role, Run};
use crate::error::Result;
use crate::lines::jsonl::stdout_is_closed;
use crate::process::cancel::Stop;

/// Time between two looks at the peer.
const PROBE: Duration = Duration::from_millis(100);

/// Watches the process that has a role in the run, from a thread of its own.
pub struct PeerWatch {
    run: Run,
    role: Role,
    /// Whether the peer was ever seen at work. Without a sampler the records come from a file.
    seen: Arc<AtomicBool>,
    /// Dropping it ends the thread.
    _end: Sender<()>,
}

impl PeerWatch {
    /// Watches until it is dropped. When the peer ends before its work is done, or the reader of standard output is gone, it abandons
    /// the work that `stop` ends.
    #[must_use]
    pub fn start(run: &Run, role: Role, stop: &Stop) -> Self {
        let (end, ended) = channel::<()>();
        let seen = Arc::new(AtomicBool::new(false));
        let watch = Self { run: run.clone(), role, seen: Arc::clone(&seen), _end: end };
        let (run, stop) = (run.clone(), stop.clone());
        thread::spawn(move || {
            loop {
                let gone = matches!(peer_state(&run, role, &seen), Ok(PeerState::Gone | PeerState::FoundNumerics));
                if gone || role == Role::Train && stdout_is_closed() {
                    stop.abandon();
                }
                if ended.recv_timeout(PROBE) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        watch
    }

    /// Whether the peer is at work, or how it ended.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn peer_state(&self) -> Result<PeerState> {
        peer_state(&self.run, self.role, &self.seen)
    }
}

/// Looks at the lock; a state left by a process that was never seen at work is of an earlier run.
fn peer_state(run: &Run, role: Role, seen: &AtomicBool) -> Result<PeerState> {
    let state = Lock::state(run, role)?;
    let seen = seen.fetch_or(state == PeerState::Working, Ordering::Relaxed);
    Ok(if seen || state == PeerState::Working { state } else { PeerState::Absent })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::time::Instant;

    #[test]
    fn a_sampler_that_goes_ends_the_work_unless_its_own_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        drop(Lock::take(&run, Role::Sample).unwrap()); // of an earlier time
        let endings = [(Ok(()), PeerState::Done), (Err(Error::Data("x".into())), PeerState::Gone)];
        for (ended, holder) in endings {
            let stop = Stop::default();
            let watch = PeerWatch::start(&run, Role::Sample, &stop);
            assert_eq!(watch.peer_state().unwrap(), PeerState::Absent);
            let lock = Lock::take(&run, Role::Sample).unwrap();
            thread::sleep(2 * PROBE);
            assert!(!stop.is_requested());
            lock.leave(&ended);
            assert_eq!(watch.peer_state().unwrap(), holder);
            let left = Instant::now();
            while !stop.is_requested() && left.elapsed() < 5 * PROBE {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(stop.is_requested(), holder == PeerState::Gone);
        }
    }
}
