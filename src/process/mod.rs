//! What a command is to the system: its options and exit code, its messages, interrupts and clock.

pub mod cancel;
pub mod command;
pub mod progress;
pub mod stopwatch;
