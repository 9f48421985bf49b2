//! Results produced on a thread of their own, ahead of the work that takes them.
//!
//! Reading and tokenizing go on beside the computation, which never waits for a slow writer while it has something to do.

use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::task::Poll;
use std::{mem, thread, vec};

use crate::error::{Error, Result};

/// Items up to the first error, as an iterator that waits for them. The thread that produces them ends when this is dropped, or with
/// the process.
pub struct ReadAhead<T> {
    batches: Receiver<Vec<Result<T>>>,
    batch: vec::IntoIter<Result<T>>,
}

impl<T: Send + 'static> ReadAhead<T> {
    /// Takes items from an iterator, at most `count` before they are wanted.
    pub fn new(items: impl Iterator<Item = Result<T>> + Send + 'static, count: usize) -> Self {
        Self::spawn(count, move |mut producer| {
            for item in items {
                if !producer.push(item) || !producer.send() {
                    return;
                }
            }
        })
    }

    /// Runs `produce` on a thread. It may be `batches` batches ahead, besides the one it is filling.
    pub fn spawn(batches: usize, produce: impl FnOnce(Producer<T>) + Send + 'static) -> Self {
        let (sender, batches) = sync_channel(batches);
        // Not joined: it may sit in a read that never returns. It ends with its channel or with the process.
        thread::spawn(move || produce(Producer { batch: Vec::new(), sender }));
        Self { batches, batch: Vec::new().into_iter() }
    }
}

impl<T> ReadAhead<T> {
    /// Items that are there already.
    #[must_use]
    pub fn ready(items: Vec<T>) -> Self {
        let batch: Vec<Result<T>> = items.into_iter().map(Ok).collect();
        Self { batches: closed(), batch: batch.into_iter() }
    }

    fn next_of_batch(&mut self) -> Option<Result<T>> {
        let item = self.batch.next()?;
        if item.is_err() {
            self.batches = closed(); // the producer may have stopped without closing it
        }
        Some(item)
    }

    /// Returns the next item, or `None` at their end, without waiting.
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

impl<T> Iterator for ReadAhead<T> {
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

/// A channel without a sender.
fn closed<T>() -> Receiver<T> {
    sync_channel(0).1
}

/// The sending side of a [`ReadAhead`]. Items go out in batches, because waking the receiver can take longer than producing one.
pub struct Producer<T> {
    batch: Vec<Result<T>>,
    sender: SyncSender<Vec<Result<T>>>,
}

impl<T> Producer<T> {
    /// Adds an item to the batch. Returns `false` after an error, which is sent at once: it is the last item.
    pub fn push(&mut self, item: Result<T>) -> bool {
        let is_last = item.is_err();
        self.batch.push(item);
        if is_last {
            self.send();
        }
        !is_last
    }

    /// Sends the batch, waiting for room. Returns `false` when the receiver is gone.
    pub fn send(&mut self) -> bool {
        let batch = mem::take(&mut self.batch);
        batch.is_empty() || self.sender.send(batch).is_ok()
    }
}

impl<T> Drop for Producer<T> {
    /// A panic must not look like the end of the items.
    fn drop(&mut self) {
        if thread::panicking() {
            self.push(Err(Error::Panicked("the thread that reads the input")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_end_after_the_first_error() {
        let items = [Ok(1), Err(Error::Abandoned), Ok(2)].into_iter();
        let taken: Vec<Result<i32>> = ReadAhead::new(items, 0).collect();
        assert!(matches!(taken[..], [Ok(1), Err(Error::Abandoned)]), "{taken:?}");
    }

    #[test]
    fn a_producer_that_panics_is_an_error_and_no_end() {
        let items = (0..3).map(|i| if i < 2 { Ok(i) } else { panic!("no") });
        let taken: Vec<Result<i32>> = ReadAhead::new(items, 0).collect();
        assert!(matches!(taken[..], [Ok(0), Ok(1), Err(Error::Panicked(_))]), "{taken:?}");
    }
}
