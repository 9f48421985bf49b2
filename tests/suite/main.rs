//! Everything seen from outside: each command as a process, and the library against its references.

mod gsm8k_prep;
mod hub;
