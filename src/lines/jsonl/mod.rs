//! Reads and writes lines: standard input and output, files, compressed files, and publishing by rename.
//!
//! Knows bytes and lines; [`crate::lines::record`] knows what a line means.

mod input;
mod output;

use std::io;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

pub use input::{Input, MAX_LINE_BYTES};
pub use output::{Output, stdout_is_closed, write_zst};

/// Whether `file` becomes ready for `what`, or is closed or broken, within `nanoseconds`.
fn is_ready(file: impl AsFd, what: PollFlags, nanoseconds: i64) -> io::Result<bool> {
    let mut polled = [PollFd::new(&file, what)];
    match poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: nanoseconds })) {
        Err(Errno::INTR) => Ok(false),
        ready => Ok(ready? > 0),
    }
}
