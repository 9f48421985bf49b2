//! Reads an input in batches of lines, and makes items of them on a thread ahead of the work.

use std::cell::RefCell;
use std::iter;
use std::rc::Rc;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::lines::jsonl::Input;
use crate::lines::record::Line;
use crate::process::memory_limit::limit_memory;
use crate::process::read_ahead::{Producer, ReadAhead};

/// Lines whose items are handed over together (bytes), some dozens: waking the thread that waits for them takes longer than making a
/// small one.
const BATCH_BYTES: usize = 1 << 14;
/// Batches of items that wait to be taken, besides the one that is being made.
const BATCHES_AHEAD: usize = 2;
/// Limit of the memory that making one item may take (bytes): some million tokens, or many times the longest line.
const LINE_MEMORY: usize = 512 << 20;

/// Returns the lines of an input in batches: all that could be read without waiting, up to about `max_bytes`. An error is the last
/// item, after the lines before it.
pub fn batches(mut input: Input, max_bytes: usize) -> impl Iterator<Item = Result<Vec<Line>>> + Send {
    let mut failed = None;
    iter::from_fn(move || {
        if let Some(error) = failed.take() {
            return Some(Err(error));
        }
        let (mut lines, mut bytes) = (Vec::new(), 0);
        while let Some(line) = input.next() {
            match line {
                Ok(line) => {
                    bytes += line.text.len();
                    lines.push(line);
                }
                Err(error) if lines.is_empty() => return Some(Err(error)),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
            if bytes >= max_bytes || !input.has_line_ready() {
                break;
            }
        }
        (!lines.is_empty()).then_some(Ok(lines))
    })
}

/// Makes an item of each line with `make`, on a thread of its own. Lines for which `make` returns `None` are left out. Items of lines
/// that are there already never wait for those that a writer has yet to write.
///
/// A line for which `make` wants more than 512 MiB of memory becomes an [`Error::Record`] in a binary with
/// a [`crate::process::memory_limit::CountingAllocator`].
pub fn read_ahead<T: Send + 'static>(
    input: Input,
    mut make: impl FnMut(Line) -> Result<Option<T>> + Send + 'static,
) -> ReadAhead<T> {
    ReadAhead::spawn(BATCHES_AHEAD, move |producer| {
        let producer = Rc::new(RefCell::new(producer));
        for batch in batches(input, BATCH_BYTES) {
            let lines = match batch {
                Ok(lines) => lines,
                Err(error) => {
                    producer.borrow_mut().push(Err(error));
                    return;
                }
            };
            for line in lines {
                if let Some(item) = limited(&producer, line, &mut make).transpose()
                    && !producer.borrow_mut().push(item)
                {
                    return;
                }
            }
            if !producer.borrow_mut().send() {
                return;
            }
        }
    })
}

/// Runs `make` within [`LINE_MEMORY`]. When it wants more it does not return, so the error is sent from within.
fn limited<T: 'static>(
    producer: &Rc<RefCell<Producer<T>>>,
    line: Line,
    make: &mut impl FnMut(Line) -> Result<Option<T>>,
) -> Result<Option<T>> {
    let (producer, path, number) = (Rc::clone(producer), Arc::clone(&line.path), line.number);
    let on_exceeded = move || {
        let memory = LINE_MEMORY >> 20;
        let what = format!("the model's chat template or tokenizer wants more than {memory} MiB of memory for it");
        producer.borrow_mut().push(Err(Error::Record { path: path.to_string(), line: number, what }));
    };
    limit_memory(LINE_MEMORY, Box::new(on_exceeded), || make(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_wants_too_much_memory_is_an_error_after_those_before_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "a\nb\nc\n").unwrap();
        let make = |line: Line| Ok(Some(vec![0u8; if line.number == 2 { 2 * LINE_MEMORY } else { 1 }].len()));
        let taken: Vec<Result<usize>> = read_ahead(Input::open(file.path()).unwrap(), make).collect();
        assert!(matches!(taken[..], [Ok(1), Err(Error::Record { line: 2, .. })]), "{taken:?}");
    }

    #[test]
    fn items_of_lines_come_while_the_writer_waits_and_in_order() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        let input = Input::open(std::path::Path::new(&path)).unwrap();
        let numbers = |line: Line| Ok(Some(line.number).filter(|number| number % 2 == 1));
        let mut ahead = read_ahead(input, numbers);
        assert!(ahead.poll().is_pending());
        std::io::Write::write_all(&mut writer, b"a\nb\nc\n").unwrap();
        let taken: Vec<usize> = ahead.by_ref().take(2).map(Result::unwrap).collect();
        assert_eq!(taken, [1, 3]);
        std::io::Write::write_all(&mut writer, &b"x\n".repeat(1000)).unwrap();
        drop((reader, writer));
        assert_eq!(ahead.map(Result::unwrap).collect::<Vec<_>>(), (5..1004).step_by(2).collect::<Vec<_>>());
    }

    #[test]
    fn a_batch_is_what_can_be_read_without_waiting_up_to_its_size_and_an_error_comes_after_its_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"aaa\nbbb\nccc\nddd\n\xff\n").unwrap();
        let read: Vec<_> = batches(Input::open(file.path()).unwrap(), 6).take(4).collect();
        let sizes: Vec<Option<usize>> = read.iter().map(|batch| batch.as_ref().ok().map(Vec::len)).collect();
        assert_eq!(sizes, [Some(2), Some(2), None]);
    }
}
