//! Lines through a function on all cores: the order is kept, and nothing waits for the end of the input.
//!
//! A thread reads; what it could read without waiting goes out as one batch, so a filter in a resident pipe answers each batch as it
//! comes and one on a file works on large ones.

use std::iter;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::lines::jsonl::{Input, Output};
use crate::lines::record::Line;

/// What is read without waiting goes to work at this size even when more can be read [bytes].
const BATCH_BYTES: usize = 1 << 18;

/// Batches read ahead, and worked on together; bounds memory when the output is slower than the input.
const BATCHES_AHEAD: usize = 8;

/// Lines that one task of the thread pool takes.
const LINES_PER_TASK: usize = 32;

/// What a stage typically adds to a line [bytes].
const ROOM_FOR_MORE: usize = 192;

/// Lines that could be read without waiting.
#[derive(Default)]
struct Batch {
    lines: Vec<Line>,
    /// Why there is nothing after them, if reading failed.
    error: Option<Error>,
}

/// Writes what `f` appends to a buffer for each line of `input`, as lines in their order.
///
/// # Errors
/// The first error of `f` or of reading, once what came before it is written; those of writing.
pub fn map_lines(input: Input, out: &mut Output, f: impl Fn(&Line, &mut Vec<u8>) -> Result<()> + Sync) -> Result<()> {
    let (sender, batches) = sync_channel(BATCHES_AHEAD);
    // Not joined: it may sit in a read that never returns. It ends with its channel or with the process.
    thread::spawn(move || read_batches(input, &sender));
    while let Some(first) = next_batch(&batches, out)? {
        let ready: Vec<Batch> = iter::once(first).chain(batches.try_iter().take(BATCHES_AHEAD)).collect();
        let tasks: Vec<&[Line]> = ready.iter().flat_map(|batch| batch.lines.chunks(LINES_PER_TASK)).collect();
        let done: Vec<_> = tasks.into_par_iter().map(|lines| map_task(lines, &f)).collect();
        for (text, error) in done {
            out.write_lines(&text)?;
            error.map_or(Ok(()), Err)?;
        }
        ready.into_iter().find_map(|batch| batch.error).map_or(Ok(()), Err)?;
    }
    Ok(())
}

/// The next batch; what was written goes out before it is waited for.
fn next_batch(batches: &Receiver<Batch>, out: &mut Output) -> Result<Option<Batch>> {
    match batches.try_recv() {
        Ok(batch) => Ok(Some(batch)),
        Err(TryRecvError::Disconnected) => Ok(None),
        Err(TryRecvError::Empty) => {
            out.flush()?;
            Ok(batches.recv().ok())
        }
    }
}

/// Reads to the end, to an error, or until nobody takes the batches any more.
fn read_batches(mut input: Input, sender: &SyncSender<Batch>) {
    let mut batch = Batch::default();
    let mut bytes = 0;
    loop {
        let ended = match input.next() {
            Some(Ok(line)) => {
                bytes += line.text.len();
                batch.lines.push(line);
                false
            }
            Some(Err(error)) => {
                batch.error = Some(error);
                true
            }
            None => true,
        };
        if ended || bytes >= BATCH_BYTES || !input.has_line_ready() {
            bytes = 0;
            if sender.send(std::mem::take(&mut batch)).is_err() || ended {
                return;
            }
        }
    }
}

/// The lines' results with their line ends, up to the first error.
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
