//! How those who train notice that those who sample are gone: while they wait for records, and in the middle of a step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::{Holder, Lock, Role, Run};
use crate::error::Result;
use crate::stop::Stop;

/// Between two looks for the sampler.
const PROBE: Duration = Duration::from_millis(100);

/// An eye on the sampler at the other end of the pipe, from a thread of its own: a step may take minutes.
pub struct SamplerWatch {
    run: Run,
    /// Whether there was a sampler. Without one the records come from a file.
    seen: Arc<AtomicBool>,
    /// The thread ends with it.
    _end: Sender<()>,
}

impl SamplerWatch {
    /// Watches until it is dropped, and abandons what `stop` ends when the sampler ends before its work is done.
    #[must_use]
    pub fn start(run: &Run, stop: &Stop) -> Self {
        let (end, ended) = channel::<()>();
        let seen = Arc::new(AtomicBool::new(false));
        let watch = Self { run: run.clone(), seen: Arc::clone(&seen), _end: end };
        let (run, stop) = (run.clone(), stop.clone());
        thread::spawn(move || {
            loop {
                if matches!(became(&run, &seen), Ok(Holder::Gone | Holder::FoundNumerics)) {
                    stop.abandon();
                }
                if ended.recv_timeout(PROBE) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        watch
    }

    /// What became of the sampler.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn became(&self) -> Result<Holder> {
        became(&self.run, &self.seen)
    }
}

/// Looks; who was never seen at work is of an earlier time.
fn became(run: &Run, seen: &AtomicBool) -> Result<Holder> {
    let holder = Lock::holder(run, Role::Sample)?;
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
            let watch = SamplerWatch::start(&run, &stop);
            assert_eq!(watch.became().unwrap(), Holder::Nobody);
            let lock = Lock::take(&run, Role::Sample).unwrap();
            thread::sleep(2 * PROBE);
            assert!(!stop.is_wished());
            lock.leave(&ended);
            assert_eq!(watch.became().unwrap(), holder);
            let left = Instant::now();
            while !stop.is_wished() && left.elapsed() < 5 * PROBE {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(stop.is_wished(), holder == Holder::Gone);
        }
    }
}
