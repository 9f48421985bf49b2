//! Limits the memory that a computation on this thread may allocate.
//!
//! A model's chat template and tokenizer are programs of whoever made the model, and ten instructions are enough to double a text sixty
//! times. The template interpreter bounds instructions but not the strings they make, and the tokenizer bounds neither, so only the
//! allocator sees the memory before it is gone. A binary that wants the limit declares the allocator that counts:
//!
//! ```
//! use grpo_pipes::process::memory_limit::CountingAllocator;
//!
//! #[global_allocator]
//! static ALLOCATOR: CountingAllocator = CountingAllocator;
//! ```
//!
//! Without it [`limit_memory`] only computes.

#![allow(unsafe_code)] // an allocator is unsafe to implement

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};

thread_local! {
    /// Bytes that this thread may still allocate; `None` is no limit.
    static REMAINING: Cell<Option<isize>> = const { Cell::new(None) };
    /// Called when they are used up. Apart from the counter, because the allocator may not touch what itself allocates.
    static ON_EXCEEDED: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// Runs `compute` with at most `bytes` more memory than the thread has; calls do not nest.
///
/// If it wants more, `on_exceeded` runs without a limit, and then the thread sleeps until the process ends: an allocator may not
/// unwind, and when it returns an error, Rust aborts the process. So call this on a thread that nothing joins, and let `on_exceeded`
/// report the failure to another one. It must not panic.
pub fn limit_memory<T>(bytes: usize, on_exceeded: Box<dyn FnOnce()>, compute: impl FnOnce() -> T) -> T {
    /// Lifts the limit, also when `compute` panics.
    struct Limited;

    impl Drop for Limited {
        fn drop(&mut self) {
            REMAINING.set(None);
            ON_EXCEEDED.take();
        }
    }

    ON_EXCEEDED.set(Some(on_exceeded));
    let _limited = Limited;
    REMAINING.set(Some(bytes.cast_signed()));
    compute()
}

/// The system's allocator, which counts the bytes of threads that have a limit.
pub struct CountingAllocator;

/// Counts allocated bytes, or freed ones if negative.
#[inline]
fn count(bytes: isize) {
    if let Some(remaining) = REMAINING.get() {
        let remaining = remaining - bytes;
        REMAINING.set(Some(remaining));
        // A panic prints its message under a lock that other threads will want.
        if remaining < 0 && !std::thread::panicking() {
            exceed();
        }
    }
}

#[cold]
fn exceed() -> ! {
    REMAINING.set(None);
    if let Some(on_exceeded) = ON_EXCEEDED.take() {
        on_exceeded();
    }
    loop {
        std::thread::park();
    }
}

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.cast_signed() - layout.size().cast_signed());
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;
    use std::time::Duration;

    #[global_allocator]
    static ALLOCATOR: CountingAllocator = CountingAllocator;

    fn doubled(times: u32) -> usize {
        (0..times).fold(String::from("a"), |text, _| format!("{text}{text}")).len()
    }

    /// What is computed on a thread that may hold 1 MiB; `None` if it was refused.
    fn within_a_mebibyte(compute: impl FnOnce() -> usize + Send + 'static) -> Option<usize> {
        let (sender, receiver) = sync_channel(1);
        std::thread::spawn(move || {
            let refused = sender.clone();
            let computed = limit_memory(1 << 20, Box::new(move || refused.send(None).unwrap()), compute);
            sender.send(Some(computed)).unwrap();
        });
        receiver.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn what_wants_more_than_it_may_hold_is_refused_and_what_it_gave_back_counts_for_it() {
        assert_eq!(within_a_mebibyte(|| doubled(16)), Some(1 << 16));
        assert_eq!(within_a_mebibyte(|| doubled(40)), None);
        assert_eq!(within_a_mebibyte(|| (0..1000).map(|_| doubled(14)).sum()), Some(1000 << 14));
        assert_eq!(within_a_mebibyte(|| vec![0u8; 1 << 21].len()), None);
    }

    #[test]
    fn the_limit_ends_with_the_computation_also_by_a_panic() {
        let refuse = || Box::new(|| unreachable!("it may"));
        assert_eq!(limit_memory(1 << 20, refuse(), || doubled(4)), 1 << 4);
        assert_eq!(doubled(21), 1 << 21);
        std::panic::catch_unwind(|| limit_memory(1 << 20, refuse(), || panic!("no"))).unwrap_err();
        assert_eq!(doubled(21), 1 << 21);
    }
}
