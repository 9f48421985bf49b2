//! How sampler and trainer notice that the other is gone in the middle of work that may take minutes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::{Holder, Lock, Role, Run};
use crate::error::Result;
use crate::lines::jsonl::stdout_is_closed;
use crate::process::cancel::Stop;

/// Between two looks for the partner.
const PROBE: Duration = Duration::from_millis(100);

/// An eye on who has a role at the other end of the pipe, from a thread of its own.
pub struct PartnerWatch {
    run: Run,
    role: Role,
    /// Whether there was anybody. Without a sampler the records come from a file.
    seen: Arc<AtomicBool>,
    /// The thread ends with it.
    _end: Sender<()>,
}

impl PartnerWatch {
    /// Watches until it is dropped, and abandons what `stop` ends when the partner ends before its work is done, or nobody takes what
    /// is made for it.
    #[must_use]
    pub fn start(run: &Run, role: Role, stop: &Stop) -> Self {
        let (end, ended) = channel::<()>();
        let seen = Arc::new(AtomicBool::new(false));
        let watch = Self { run: run.clone(), role, seen: Arc::clone(&seen), _end: end };
        let (run, stop) = (run.clone(), stop.clone());
        thread::spawn(move || {
            loop {
                let gone = matches!(became(&run, role, &seen), Ok(Holder::Gone | Holder::FoundNumerics));
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

    /// What became of the partner.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn became(&self) -> Result<Holder> {
        became(&self.run, self.role, &self.seen)
    }
}

/// Looks; who was never seen at work is of an earlier time.
fn became(run: &Run, role: Role, seen: &AtomicBool) -> Result<Holder> {
    let holder = Lock::holder(run, role)?;
    let seen = seen.fetch_or(holder == Holder::Working, Ordering::Relaxed);
    Ok(if seen || holder == Holder::Working { holder } else { Holder::Nobody })
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
        let endings = [(Ok(()), Holder::Done), (Err(Error::Data("x".into())), Holder::Gone)];
        for (ended, holder) in endings {
            let stop = Stop::default();
            let watch = PartnerWatch::start(&run, Role::Sample, &stop);
            assert_eq!(watch.became().unwrap(), Holder::Nobody);
            let lock = Lock::take(&run, Role::Sample).unwrap();
            thread::sleep(2 * PROBE);
            assert!(!stop.is_requested());
            lock.leave(&ended);
            assert_eq!(watch.became().unwrap(), holder);
            let left = Instant::now();
            while !stop.is_requested() && left.elapsed() < 5 * PROBE {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(stop.is_requested(), holder == Holder::Gone);
        }
    }
}
