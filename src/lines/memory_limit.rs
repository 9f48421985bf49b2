//! How much memory a computation may hold: that of programs which came with somebody's model.

#![allow(unsafe_code)] // the allocator that counts for them

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::{from_ref, null};

struct Allowance<'a> {
    /// Bytes that may be taken yet.
    left: Cell<isize>,
    refuse: &'a dyn Fn(),
}

thread_local! {
    /// That of the thread; null for as much as there is.
    static OWN: Cell<*const Allowance<'static>> = const { Cell::new(null()) };
}

/// While this is there, the thread has no more than its allowance.
struct Bounded;

impl Drop for Bounded {
    fn drop(&mut self) {
        OWN.set(null());
    }
}

/// Computes with at most `bytes` of memory more than the thread has; not within another such computation. Who wants more never
/// returns: `refuse`, which must not panic, tells of it, without a bound, and then the thread sleeps on what it has, to the end of the process, since an
/// allocator can neither fail in a way that an interpreter survives nor unwind.
pub fn within<T>(bytes: usize, refuse: &dyn Fn(), compute: impl FnOnce() -> T) -> T {
    let allowance = Allowance { left: Cell::new(bytes.cast_signed()), refuse };
    OWN.set(from_ref(&allowance).cast());
    let _bounded = Bounded; // dropped before what it points at
    compute()
}

/// Takes bytes of the thread's allowance, or gives some back.
#[inline]
fn take(bytes: isize) {
    let own = OWN.get();
    if !own.is_null() {
        // SAFETY: `within` holds it.
        take_of(unsafe { &*own }, bytes);
    }
}

fn take_of(own: &Allowance<'_>, bytes: isize) {
    let left = own.left.get() - bytes;
    own.left.set(left);
    // A panic is told of under a lock that others will want.
    if left < 0 && !std::thread::panicking() {
        OWN.set(null());
        (own.refuse)();
        loop {
            std::thread::park();
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
    use std::sync::mpsc::sync_channel;
    use std::time::Duration;

    fn doubled(times: u32) -> usize {
        (0..times).fold(String::from("a"), |text, _| format!("{text}{text}")).len()
    }

    /// What is computed on a thread that may hold 1 MiB; `None` if it was refused.
    fn within_a_mebibyte(compute: impl FnOnce() -> usize + Send + 'static) -> Option<usize> {
        let (sender, receiver) = sync_channel(1);
        std::thread::spawn(move || {
            let refuse = || sender.send(None).unwrap();
            let computed = within(1 << 20, &refuse, compute);
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
    fn the_bound_ends_with_the_computation_also_by_a_panic() {
        let refuse = || unreachable!("it may");
        assert_eq!(within(1 << 20, &refuse, || doubled(4)), 1 << 4);
        assert_eq!(doubled(21), 1 << 21);
        std::panic::catch_unwind(|| within(1 << 20, &|| unreachable!("it may"), || panic!("no"))).unwrap_err();
        assert_eq!(doubled(21), 1 << 21);
    }
}
