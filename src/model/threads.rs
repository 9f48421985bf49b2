//! Keeps idle threads spinning between parallel loops that follow each other closely, to save the time of waking them.

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// How long a thread spins before it sleeps after all: longer than a decode step works on one thread between two loops. The bound also
/// keeps a thread that starts to spin inside a task of a loop from holding up that loop.
const PATIENCE: Duration = Duration::from_millis(1);

/// Runs `work` while the other threads of the pool spin. A sleeping thread takes some 50 microseconds to wake, and a decode step of a
/// model that streams from memory is 170 loops of some hundred microseconds. Nothing waits for the threads: one that is busy elsewhere
/// joins later, or not at all.
pub fn keep_threads_spinning(work: impl FnOnce()) {
    let ended = Arc::new(AtomicBool::new(false));
    let (here, seen) = (rayon::current_thread_index(), Arc::clone(&ended));
    rayon::spawn_broadcast(move |thread| {
        if Some(thread.index()) != here {
            look_for_work_until(&seen);
        }
    });
    work();
    ended.store(true, Ordering::Relaxed);
}

fn look_for_work_until(ended: &AtomicBool) {
    let mut busy = Instant::now();
    while !ended.load(Ordering::Relaxed) && busy.elapsed() < PATIENCE {
        match rayon::yield_now() {
            Some(Yield::Executed) => busy = Instant::now(),
            _ => spin_loop(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use rayon::ThreadPoolBuilder;
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn loops_are_shared_out_as_ever_and_end_though_others_use_the_pool() {
        let sum = || (0..1000u32).into_par_iter().with_max_len(10).sum::<u32>();
        for threads in [1, 2, 4] {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            std::thread::scope(|scope| {
                let others = scope.spawn(|| (0..2000).for_each(|_| assert_eq!(pool.install(sum), 499_500)));
                let mut sums = 0;
                for _ in 0..200 {
                    pool.install(|| keep_threads_spinning(|| sums += (0..10).map(|_| sum()).sum::<u32>()));
                }
                assert_eq!(sums, 200 * 10 * 499_500);
                others.join().unwrap();
            });
        }
    }

    #[test]
    fn a_thread_that_is_busy_with_something_else_is_not_waited_for() {
        let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let ((there, is_there), (go, may_go)) = (channel(), channel());
        pool.in_place_scope(|scope| {
            scope.spawn(move |_| {
                there.send(()).unwrap();
                may_go.recv().unwrap();
            });
            scope.spawn(move |_| {
                is_there.recv().unwrap();
                keep_threads_spinning(|| ());
                go.send(()).unwrap();
            });
        });
    }

    #[test]
    fn without_work_a_thread_sleeps_before_the_end() {
        let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let began = Instant::now();
        pool.install(|| look_for_work_until(&AtomicBool::new(false)));
        assert!(began.elapsed() >= PATIENCE);
    }
}
