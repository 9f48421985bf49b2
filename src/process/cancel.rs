//! A wish that long work ends before it is done: a signal, or a partner in a pipe that is gone.
//!
//! Who works long looks at a [`Stop`] often, and ends with its error. What is half done is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// Not the number of a signal.
const ABANDONED: usize = usize::MAX;

/// Shared by all who should end together. The default one is never asked for unless by [`Stop::abandon`].
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// Takes SIGINT and SIGTERM as the wish, from now on and for the whole process.
    ///
    /// # Errors
    /// [`Error::Device`] when the system has no such signals to give.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register_usize(signal, Arc::clone(&stop.0), signal as usize)
                .map_err(|err| Error::Device(format!("cannot take signals: {err}")))?;
        }
        Ok(stop)
    }

    /// Nobody will take what is being made.
    pub fn abandon(&self) {
        // A signal that came before is the better reason.
        let _ = self.0.compare_exchange(0, ABANDONED, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether to end.
    #[must_use]
    pub fn is_wished(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Ends who calls it, if that is wished.
    ///
    /// # Errors
    /// [`Error::Interrupted`] or [`Error::Abandoned`].
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            ABANDONED => Err(Error::Abandoned),
            signal => Err(Error::Interrupted { signal: signal as i32 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_a_better_reason_than_being_abandoned() {
        let stop = Stop::default();
        let other = stop.clone();
        assert!(stop.check().is_ok() && !stop.is_wished());
        other.abandon();
        assert!(matches!(stop.check(), Err(Error::Abandoned)));
        stop.0.store(SIGTERM as usize, Ordering::Relaxed);
        other.abandon();
        let error = stop.check().unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().as_str()), (143, "ended by SIGTERM"));
    }
}
