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
    group_size: usize,
    free: Vec<usize>,
    /// Samples started so far, over all groups: sample `i` is number `i % group_size` of group `i / group_size`.
    started: usize,
    /// Number of groups taken: that of the first in `groups`.
    taken: usize,
    groups: VecDeque<Entry<G>>,
}

#[derive(Debug)]
struct Entry<G> {
    group: G,
    /// Samples that wait or run.
    unfinished: usize,
}

impl<G> Scheduler<G> {
    /// `slots` sequences at once, groups of `group_size` samples; both at least 1.
    #[must_use]
    pub fn new(slots: usize, group_size: usize) -> Self {
        assert!(slots > 0 && group_size > 0, "callers check both");
        Self { group_size, free: (0..slots).rev().collect(), started: 0, taken: 0, groups: VecDeque::new() }
    }

    /// Whether a slot would stay empty for want of samples.
    #[must_use]
    pub fn wants_group(&self) -> bool {
        self.waiting() < self.free.len()
    }

    /// Whether no sample runs, and none waits for a slot.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    /// Adds a group, whose samples wait.
    pub fn add(&mut self, group: G) {
        self.groups.push_back(Entry { group, unfinished: self.group_size });
    }

    /// Starts the next waiting sample in a free slot, if there are both.
    pub fn start(&mut self) -> Option<Start> {
        if self.waiting() == 0 {
            return None;
        }
        let slot = self.free.pop()?;
        let (group, sample) = (self.started / self.group_size, self.started % self.group_size);
        self.started += 1;
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

    /// Samples that wait for a slot.
    fn waiting(&self) -> usize {
        (self.taken + self.groups.len()) * self.group_size - self.started
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_refilled_and_groups_are_taken_in_order() {
        let mut scheduler = Scheduler::new(3, 2);
        let mut names = ["a", "b", "c"].into_iter();
        while scheduler.wants_group() {
            scheduler.add(names.next().unwrap());
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
        scheduler.add("c");
        assert_eq!(scheduler.start().unwrap().group, 2);
        assert_eq!(scheduler.group(2), &"c");
    }

    #[test]
    fn a_group_that_waits_for_its_slots_is_work() {
        let mut scheduler = Scheduler::new(3, 2);
        assert!(scheduler.is_idle());
        scheduler.add(());
        assert!(!scheduler.is_idle(), "or the engine would wait for a second group before it samples the first");
    }

    #[test]
    fn no_more_groups_are_asked_for_than_fill_the_slots() {
        let mut scheduler = Scheduler::new(64, 16);
        let mut asked = 0;
        while scheduler.wants_group() {
            scheduler.add(());
            asked += 1;
        }
        assert_eq!(asked, 4);
    }
}
