//! What every long-running command needs from its process: cancellation, messages, progress and timings.
//!
//! Knows nothing of records or files.

pub mod cancel;
pub mod message;
pub mod progress;
pub mod stopwatch;
