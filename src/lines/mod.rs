//! JSONL: lines of text in and out, the records on them, and the threads that read ahead.

pub mod batches;
pub mod jsonl;
pub mod map;
pub mod prompt;
pub mod record;
