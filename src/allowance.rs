//! Computations that may hold so much memory and no more: those of programs that came with somebody's model.

#![allow(unsafe_code)] // the allocator that counts for them

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::resume_unwind;
use std::ptr::null;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Bytes that a thread may take yet, and whether it wanted more.
struct Allowance {
    left: AtomicIsize,
    is_exceeded: AtomicBool,
}

thread_local! {
    /// That of the thread; null for as much as there is.
    static OWN: Cell<*const Allowance> = const { Cell::new(null()) };
}

/// The thread's allowance, for as long as this is there.
struct Own(#[expect(dead_code, reason = "what the thread points at")] Arc<Allowance>);

impl Own {
    fn of_this_thread(allowance: Arc<Allowance>) -> Self {
        OWN.set(Arc::as_ptr(&allowance));
        Self(allowance)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        OWN.set(null());
    }
}

/// How often it is looked whether more was wanted.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Computes on a thread of its own, which may hold `bytes`; `None` if it wants more. An allocator can neither fail in a way that an
/// interpreter survives nor unwind, so that thread then sleeps on what it has, to the end of the process.
pub fn within<T: Send + 'static>(bytes: usize, compute: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let left = AtomicIsize::new(bytes.cast_signed());
    let allowance = Arc::new(Allowance { left, is_exceeded: AtomicBool::new(false) });
    let (sender, receiver) = sync_channel(1);
    let its = Arc::clone(&allowance);
    let thread = std::thread::spawn(move || {
        let own = Own::of_this_thread(its);
        let computed = compute();
        drop(own);
        let _ = sender.send(computed); // who asked waits for it
    });
    loop {
        match receiver.recv_timeout(LOOK_EVERY) {
            Ok(computed) => return Some(computed),
            Err(RecvTimeoutError::Timeout) if allowance.is_exceeded.load(Ordering::Relaxed) => return None,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                resume_unwind(thread.join().expect_err("without a panic there is a result"))
            }
        }
    }
}

/// Takes bytes of the thread's allowance, or gives some back.
fn take(bytes: isize) {
    let own = OWN.get();
    // A panic is told of under a lock that others will want.
    if own.is_null() || std::thread::panicking() {
        return;
    }
    // SAFETY: `Own` holds it.
    let own = unsafe { &*own };
    if own.left.fetch_sub(bytes, Ordering::Relaxed) < bytes {
        OWN.set(null());
        own.is_exceeded.store(true, Ordering::Relaxed);
        loop {
            std::thread::sleep(Duration::MAX);
        }
    }
}

/// The system's allocator, which counts where there is an allowance.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size().cast_signed());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size().cast_signed());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        take(-layout.size().cast_signed());
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size.cast_signed() - layout.size().cast_signed());
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubled(times: u32) -> usize {
        (0..times).fold(String::from("a"), |text, _| format!("{text}{text}")).len()
    }

    #[test]
    fn what_wants_more_than_it_may_hold_ends_and_what_it_gave_back_counts_for_it() {
        assert_eq!(within(1 << 20, || doubled(16)), Some(1 << 16));
        assert_eq!(within(1 << 20, || doubled(40)), None);
        assert_eq!(within(1 << 20, || (0..1000).map(|_| doubled(14)).sum()), Some(1000 << 14));
        assert_eq!(within(1 << 20, || vec![0u8; 1 << 21].len()), None);
        assert_eq!(doubled(21), 1 << 21, "elsewhere there is no such end");
    }

    #[test]
    fn a_panic_goes_on_where_it_was_asked_for() {
        let panic = std::panic::catch_unwind(|| within(1 << 20, || panic!("no"))).expect_err("it panics");
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"no"));
    }
}
