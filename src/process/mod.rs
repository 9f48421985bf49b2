//! What every long-running command needs from its process: cancellation, limits, messages, progress, timings, threads that read ahead.
//!
//! Knows nothing of records or files.

pub mod cancel;
pub mod memory_limit;
pub mod message;
pub mod panel;
pub mod progress;
pub mod read_ahead;
pub mod stopwatch;
