//! Everything seen from outside: each command as a process, and the library against its references.

#![allow(clippy::unwrap_used)] // a test that panics has failed, which is what it is for

mod gsm8k_prep;
mod hub;
