//! Items made on a thread of their own, ahead of who takes them: reading and tokenizing go on beside the computing, and what is at
//! work never waits for a slow writer while it has something to do.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::task::Poll;
use std::{mem, thread, vec};

use crate::error::{Error, Result};
use crate::lines::jsonl::Input;
use crate::lines::memory_limit;
use crate::lines::record::Line;

/// Lines whose items are handed over together [bytes], some dozens: to wake who waits for them, or for room, takes longer than to make
/// a small one.
const BATCH_BYTES: usize = 1 << 14;
/// Batches that nobody has taken yet, besides the one that is made.
const BATCHES: usize = 2;
/// What work on one line may hold [bytes]: some million tokens, or many times the longest line. A chat template and a tokenizer are
/// programs of whoever made the model, and it takes ten instructions to double a text.
const LINE_MEMORY: usize = 512 << 20;

/// Items up to the first error, as an iterator that waits for them. The thread that makes them ends when nobody takes any more, or
/// with the process.
pub struct Ahead<T> {
    batches: Receiver<Vec<Result<T>>>,
    batch: vec::IntoIter<Result<T>>,
}

impl<T: Send + 'static> Ahead<T> {
    /// Items of an iterator, at most `count` before they are wanted.
    pub fn of(items: impl Iterator<Item = Result<T>> + Send + 'static, count: usize) -> Self {
        Self::spawn(count, move |maker| {
            for item in items {
                let last = maker.add(item);
                if !maker.give() || last {
                    return;
                }
            }
        })
    }

    /// What `make` makes of each line of an input; lines of which it makes nothing are left out. One for which it wants too much
    /// memory is an error. What can be made without waiting for a writer waits for nobody.
    pub fn of_lines(mut input: Input, mut make: impl FnMut(Line) -> Result<Option<T>> + Send + 'static) -> Self {
        Self::spawn(BATCHES, move |maker| {
            let mut bytes = 0;
            while let Some(line) = input.next() {
                bytes += line.as_ref().map_or(0, |line| line.text.len());
                let item = line.and_then(|line| maker.bounded(line, &mut make)).transpose();
                let last = item.is_some_and(|item| maker.add(item));
                if last || bytes >= BATCH_BYTES || !input.has_line_ready() {
                    bytes = 0;
                    if !maker.give() || last {
                        return;
                    }
                }
            }
        })
    }

    fn spawn(batches: usize, work: impl FnOnce(&Maker<T>) + Send + 'static) -> Self {
        let (sender, batches) = sync_channel(batches);
        let maker = Maker { made: RefCell::default(), sender };
        thread::spawn(move || work(&maker));
        Self { batches, batch: Vec::new().into_iter() }
    }
}

impl<T> Ahead<T> {
    /// Items that are there already.
    #[must_use]
    pub fn ready(items: Vec<T>) -> Self {
        let batch: Vec<Result<T>> = items.into_iter().map(Ok).collect();
        Self { batches: no_more(), batch: batch.into_iter() }
    }

    fn next_of_batch(&mut self) -> Option<Result<T>> {
        let item = self.batch.next()?;
        if item.is_err() {
            self.batches = no_more(); // its maker may have gone to sleep instead of ending
        }
        Some(item)
    }

    /// The next item or the end of them, without waiting.
    pub fn poll(&mut self) -> Poll<Option<Result<T>>> {
        loop {
            if let Some(item) = self.next_of_batch() {
                return Poll::Ready(Some(item));
            }
            match self.batches.try_recv() {
                Ok(batch) => self.batch = batch.into_iter(),
                Err(TryRecvError::Empty) => return Poll::Pending,
                Err(TryRecvError::Disconnected) => return Poll::Ready(None),
            }
        }
    }
}

impl<T> Iterator for Ahead<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        loop {
            if let Some(item) = self.next_of_batch() {
                return Some(item);
            }
            self.batch = self.batches.recv().ok()?.into_iter();
        }
    }
}

/// A channel whose sender is gone.
fn no_more<T>() -> Receiver<T> {
    sync_channel(0).1
}

/// Who makes items. One that panics must not look like the end of them.
struct Maker<T> {
    made: RefCell<Vec<Result<T>>>,
    sender: SyncSender<Vec<Result<T>>>,
}

impl<T> Maker<T> {
    /// Whether it is the last one.
    fn add(&self, item: Result<T>) -> bool {
        let last = item.is_err();
        self.made.borrow_mut().push(item);
        last
    }

    /// Whether there is somebody to take them.
    fn give(&self) -> bool {
        let made = mem::take(&mut *self.made.borrow_mut());
        made.is_empty() || self.sender.send(made).is_ok()
    }

    fn bounded(&self, line: Line, make: &mut impl FnMut(Line) -> Result<Option<T>>) -> Result<Option<T>> {
        let (path, number) = (Arc::clone(&line.path), line.number);
        let refuse = || {
            let memory = LINE_MEMORY >> 20;
            let what = format!("the model's chat template or tokenizer wants more than {memory} MiB of memory for it");
            self.add(Err(Error::Record { path: path.to_string(), line: number, what }));
            self.give();
        };
        memory_limit::within(LINE_MEMORY, &refuse, || make(line))
    }
}

impl<T> Drop for Maker<T> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.add(Err(Error::Panicked("the thread that reads the input")));
            self.give();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_end_after_the_first_error() {
        let items = [Ok(1), Err(Error::Abandoned), Ok(2)].into_iter();
        let taken: Vec<Result<i32>> = Ahead::of(items, 0).collect();
        assert!(matches!(taken[..], [Ok(1), Err(Error::Abandoned)]), "{taken:?}");
    }

    #[test]
    fn a_maker_that_breaks_down_is_an_error_and_no_end() {
        let items = (0..3).map(|i| if i < 2 { Ok(i) } else { panic!("no") });
        let taken: Vec<Result<i32>> = Ahead::of(items, 0).collect();
        assert!(matches!(taken[..], [Ok(0), Ok(1), Err(Error::Panicked(_))]), "{taken:?}");
    }

    #[test]
    fn a_line_that_wants_too_much_memory_is_an_error_after_those_before_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "a\nb\nc\n").unwrap();
        let make = |line: Line| Ok(Some(vec![0u8; if line.number == 2 { 2 * LINE_MEMORY } else { 1 }].len()));
        let taken: Vec<Result<usize>> = Ahead::of_lines(Input::open(file.path()).unwrap(), make).collect();
        assert!(matches!(taken[..], [Ok(1), Err(Error::Record { line: 2, .. })]), "{taken:?}");
    }

    #[test]
    fn items_of_lines_come_while_the_writer_waits_and_in_order() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        let input = Input::open(std::path::Path::new(&path)).unwrap();
        let numbers = |line: Line| Ok(Some(line.number).filter(|number| number % 2 == 1));
        let mut ahead = Ahead::of_lines(input, numbers);
        assert!(ahead.poll().is_pending());
        std::io::Write::write_all(&mut writer, b"a\nb\nc\n").unwrap();
        let taken: Vec<usize> = ahead.by_ref().take(2).map(Result::unwrap).collect();
        assert_eq!(taken, [1, 3]);
        std::io::Write::write_all(&mut writer, &b"x\n".repeat(1000)).unwrap();
        drop((reader, writer));
        assert_eq!(ahead.map(Result::unwrap).collect::<Vec<_>>(), (5..1004).step_by(2).collect::<Vec<_>>());
    }
}
