//! Maps the lines of an input on all cores, in order and without waiting for the end of the input.
//!
//! A thread reads. Lines that could be read without waiting form a batch, so a filter in a resident pipe answers each batch as it
//! comes, and one on a file works on large ones.

use std::task::Poll;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::lines::batches::batches;
use crate::lines::jsonl::{Input, Output};
use crate::lines::record::Line;
use crate::process::read_ahead::ReadAhead;

/// Size at which a batch goes to work even when more could be read (bytes).
const BATCH_BYTES: usize = 1 << 18;

/// Batches read ahead, and worked on together; bounds memory when the output is slower than the input.
const BATCHES_AHEAD: usize = 8;

/// Lines per task of the thread pool, if a line is quick work.
pub const LINES_PER_TASK: usize = 32;

/// What a stage typically adds to a line (bytes).
const ROOM_FOR_MORE: usize = 192;

/// Writes what `f` appends to a buffer for each line of `input`, as lines in their order. A thread takes `lines_per_task` at a time.
///
/// # Errors
/// The first error of `f` or of reading, once what came before it is written; errors of writing.
pub fn map_lines(
    input: Input,
    out: &mut Output,
    lines_per_task: usize,
    f: impl Fn(&Line, &mut Vec<u8>) -> Result<()> + Sync,
) -> Result<()> {
    let mut batches = ReadAhead::new(batches(input, BATCH_BYTES), BATCHES_AHEAD);
    while let Some(first) = next_batch(&mut batches, out) {
        let mut ready = vec![first?];
        let mut read = Ok(());
        while ready.len() <= BATCHES_AHEAD
            && read.is_ok()
            && let Poll::Ready(Some(next)) = batches.poll()
        {
            read = next.map(|batch| ready.push(batch));
        }
        let tasks: Vec<&[Line]> = ready.iter().flat_map(|batch| batch.chunks(lines_per_task)).collect();
        let done: Vec<_> = tasks.into_par_iter().map(|lines| map_task(lines, &f)).collect();
        for (text, error) in done {
            out.write_lines(&text)?;
            error.map_or(Ok(()), Err)?;
        }
        read?;
    }
    Ok(())
}

/// The next batch. Flushes what was written before waiting for it.
fn next_batch(batches: &mut ReadAhead<Vec<Line>>, out: &mut Output) -> Option<Result<Vec<Line>>> {
    match batches.poll() {
        Poll::Ready(batch) => batch,
        Poll::Pending => match out.flush() {
            Ok(()) => batches.next(),
            Err(error) => Some(Err(error)),
        },
    }
}

/// The results of some lines, with line ends, up to the first error.
fn map_task(lines: &[Line], f: &impl Fn(&Line, &mut Vec<u8>) -> Result<()>) -> (Vec<u8>, Option<Error>) {
    let mut text = Vec::with_capacity(lines.iter().map(|line| line.text.len() + ROOM_FOR_MORE).sum());
    for line in lines {
        let whole = text.len();
        if let Err(error) = f(line, &mut text) {
            text.truncate(whole);
            return (text, Some(error));
        }
        text.push(b'\n');
    }
    (text, None)
}
