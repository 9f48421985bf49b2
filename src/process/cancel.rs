//! Cooperative cancellation: by a signal, or because the next command in the pipe is gone.
//!
//! Long computations check a [`Stop`] often and return its error. What is half done is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// Not the number of a signal.
const ABANDONED: usize = usize::MAX;

/// A request to stop, shared by every part of a command. The default one is only requested by [`Stop::abandon`].
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// Installs handlers of SIGINT and SIGTERM, for the whole process, that request a stop instead of killing it.
    ///
    /// # Errors
    /// [`Error::Signals`] when the system refuses.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_usize(signal, Arc::clone(&stop.0), signal as usize).map_err(Error::Signals)?;
        }
        Ok(stop)
    }

    /// Requests a stop because nothing will read the results.
    pub fn abandon(&self) {
        // A signal that came before is the better reason.
        let _ = self.0.compare_exchange(0, ABANDONED, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether a stop was requested.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Returns an error if a stop was requested.
    ///
    /// # Errors
    /// [`Error::Interrupted`] after a signal, [`Error::Abandoned`] after [`Stop::abandon`].
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            ABANDONED => Err(Error::Abandoned),
            signal => Err(Error::Interrupted { signal: signal as i32 }),
        }
    }
}

/// A flag that Ctrl-C raises, for work that it ends without ending the command.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Installs a handler of SIGINT, for the whole process.
    ///
    /// # Errors
    /// [`Error::Signals`] when the system refuses.
    pub fn on_sigint() -> Result<Self> {
        let raised = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGINT, Arc::clone(&raised)).map_err(Error::Signals)?;
        Ok(Self(raised))
    }

    /// Whether it is raised.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Lowers it; returns whether it was raised.
    pub fn lower(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_a_better_reason_than_being_abandoned() {
        let stop = Stop::default();
        let other = stop.clone();
        assert!(stop.check().is_ok() && !stop.is_requested());
        other.abandon();
        assert!(matches!(stop.check(), Err(Error::Abandoned)));
        stop.0.store(SIGTERM as usize, Ordering::Relaxed);
        other.abandon();
        let error = stop.check().unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().as_str()), (143, "ended by SIGTERM"));
    }
}
