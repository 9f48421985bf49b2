//! Decides which sample runs in which slot, and which group is the next to be handed over: bookkeeping only, no tensor, no token.
//!
//! Groups are numbered from 0 in the order they are added. Their samples wait for a slot, run in it, and finish. Samples start in
//! order as slots become free and finish in any order; finished groups are taken in the order they were added.

use std::collections::VecDeque;

/// A sample that starts to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Where it will run.
    pub slot: usize,
    /// Its group.
    pub group: usize,
    /// Its number in the group, from 0.
    pub sample: usize,
}

/// The state of all slots, and the groups that were added and not yet taken; `G` is what the caller keeps of a group.
#[derive(Debug)]
pub struct Scheduler<G> {
    free: Vec<usize>,
    /// Samples that wait for a slot.
    waiting: usize,
    /// The first group that may have some of them.
    next: usize,
    /// Number of groups taken: that of the first in `groups`.
    taken: usize,
    groups: VecDeque<Entry<G>>,
}

#[derive(Debug)]
struct Entry<G> {
    group: G,
    /// Samples in all.
    size: usize,
    /// Samples that have started.
    started: usize,
    /// Samples that wait or run.
    unfinished: usize,
}

impl<G> Scheduler<G> {
    /// `slots` sequences at once, at least 1.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        assert!(slots > 0, "callers check it");
        Self { free: (0..slots).rev().collect(), waiting: 0, next: 0, taken: 0, groups: VecDeque::new() }
    }

    /// Whether a slot would stay empty for want of samples.
    #[must_use]
    pub fn wants_group(&self) -> bool {
        self.waiting < self.free.len()
    }

    /// Whether no sample runs, and none waits for a slot.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    /// Adds a group of `size` samples, at least 1, which wait.
    pub fn add(&mut self, group: G, size: usize) {
        assert!(size > 0, "callers check it");
        self.waiting += size;
        self.groups.push_back(Entry { group, size, started: 0, unfinished: size });
    }

    /// Starts the next waiting sample in a free slot, if there are both.
    pub fn start(&mut self) -> Option<Start> {
        if self.waiting == 0 {
            return None;
        }
        let slot = self.free.pop()?;
        let group = self.next;
        let entry = &mut self.groups[group - self.taken];
        let sample = entry.started;
        entry.started += 1;
        self.next += usize::from(entry.started == entry.size);
        self.waiting -= 1;
        Some(Start { slot, group, sample })
    }

    /// The group of this number.
    ///
    /// # Panics
    /// When it was not added, or was taken.
    #[must_use]
    pub fn group(&self, group: usize) -> &G {
        &self.groups[group - self.taken].group
    }

    /// Frees the slot of a sample that has finished. Returns its group, and whether all samples of it have finished.
    ///
    /// # Panics
    /// As [`Scheduler::group`].
    pub fn finish(&mut self, slot: usize, group: usize) -> (&mut G, bool) {
        self.free.push(slot);
        let entry = &mut self.groups[group - self.taken];
        entry.unfinished -= 1;
        (&mut entry.group, entry.unfinished == 0)
    }

    /// Takes the next group in order, if all of its samples have finished.
    pub fn take_finished(&mut self) -> Option<G> {
        if self.groups.front()?.unfinished > 0 {
            return None;
        }
        self.taken += 1;
        self.groups.pop_front().map(|entry| entry.group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_refilled_and_groups_are_taken_in_order() {
        let mut scheduler = Scheduler::new(3);
        let mut names = ["a", "b", "c"].into_iter();
        while scheduler.wants_group() {
            scheduler.add(names.next().unwrap(), 2);
        }
        let starts: Vec<Start> = std::iter::from_fn(|| scheduler.start()).collect();
        let as_started: Vec<_> = starts.iter().map(|start| (start.group, start.sample)).collect();
        assert_eq!(as_started, [(0, 0), (0, 1), (1, 0)]);
        assert!(!scheduler.wants_group());

        assert_eq!(scheduler.finish(starts[2].slot, 1), (&mut "b", false));
        assert!(!scheduler.wants_group(), "group 1 has a sample waiting");
        let refill = scheduler.start().unwrap();
        assert_eq!(refill, Start { slot: starts[2].slot, group: 1, sample: 1 });
        assert_eq!(scheduler.finish(refill.slot, 1), (&mut "b", true));
        assert_eq!(scheduler.take_finished(), None, "group 0 goes first");
        scheduler.finish(starts[0].slot, 0);
        assert_eq!(scheduler.finish(starts[1].slot, 0), (&mut "a", true));
        let taken = [scheduler.take_finished(), scheduler.take_finished(), scheduler.take_finished()];
        assert_eq!(taken, [Some("a"), Some("b"), None]);
        assert!(scheduler.is_idle());
        scheduler.add("c", 1);
        assert_eq!(scheduler.start().unwrap().group, 2);
        assert_eq!(scheduler.group(2), &"c");
    }

    #[test]
    fn groups_may_differ_in_size() {
        let mut scheduler = Scheduler::new(5);
        for size in [1, 3, 2] {
            scheduler.add((), size);
        }
        let starts: Vec<_> =
            std::iter::from_fn(|| scheduler.start()).map(|start| (start.group, start.sample)).collect();
        assert_eq!(starts, [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]);
        assert!(scheduler.finish(0, 0).1 && !scheduler.finish(1, 1).1);
        assert_eq!(scheduler.start().map(|start| (start.group, start.sample)), Some((2, 1)));
        assert!(scheduler.wants_group());
    }

    #[test]
    fn a_group_that_waits_for_its_slots_is_work() {
        let mut scheduler = Scheduler::new(3);
        assert!(scheduler.is_idle());
        scheduler.add((), 2);
        assert!(!scheduler.is_idle(), "or the engine would wait for a second group before it samples the first");
    }

    #[test]
    fn no_more_groups_are_asked_for_than_fill_the_slots() {
        let mut scheduler = Scheduler::new(64);
        let mut asked = 0;
        while scheduler.wants_group() {
            scheduler.add((), 16);
            asked += 1;
        }
        assert_eq!(asked, 4);
    }
}
