//! Everything seen from outside: each command as a process, and the library against its references.

mod evaluate;
mod process;
mod score;
