//! Which sample runs in which slot, and which group is the next to leave: bookkeeping only, no tensor, no token.
//!
//! Groups are numbered from 0 as they come. Their samples start in order as slots become free, end in any order, and groups leave
//! in the order they came.

use std::collections::VecDeque;

/// A sample to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Where it will run.
    pub slot: usize,
    /// Its group.
    pub group: usize,
    /// Its number in the group, from 0.
    pub sample: usize,
}

/// The state of all slots and groups.
#[derive(Debug)]
pub struct Scheduler {
    group_size: usize,
    free: Vec<usize>,
    /// Samples started so far, over all groups: sample `i` is number `i % group_size` of group `i / group_size`.
    started: usize,
    arrived: usize,
    left: usize,
    /// Samples still to end of each group from `left` on.
    unfinished: VecDeque<usize>,
}

impl Scheduler {
    /// `slots` sequences at once, groups of `group_size` samples; both at least 1.
    #[must_use]
    pub fn new(slots: usize, group_size: usize) -> Self {
        assert!(slots > 0 && group_size > 0, "callers check both");
        let free = (0..slots).rev().collect();
        Self { group_size, free, started: 0, arrived: 0, left: 0, unfinished: VecDeque::new() }
    }

    /// Whether a slot would stay empty for want of samples.
    #[must_use]
    pub fn wants_group(&self) -> bool {
        self.arrived * self.group_size - self.started < self.free.len()
    }

    /// Whether there is nothing to do: no sample runs, and none waits for a slot.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.unfinished.is_empty()
    }

    /// A new group; returns its number.
    pub fn arrive(&mut self) -> usize {
        self.unfinished.push_back(self.group_size);
        self.arrived += 1;
        self.arrived - 1
    }

    /// The next sample for a free slot, if there are both.
    pub fn start(&mut self) -> Option<Start> {
        if self.started == self.arrived * self.group_size {
            return None;
        }
        let slot = self.free.pop()?;
        let (group, sample) = (self.started / self.group_size, self.started % self.group_size);
        self.started += 1;
        Some(Start { slot, group, sample })
    }

    /// A sample of `group` that ran in `slot` has ended.
    pub fn end(&mut self, slot: usize, group: usize) {
        self.free.push(slot);
        self.unfinished[group - self.left] -= 1;
    }

    /// The next group in order, if all of its samples have ended; it counts as gone.
    pub fn leave(&mut self) -> Option<usize> {
        if self.unfinished.front() != Some(&0) {
            return None;
        }
        self.unfinished.pop_front();
        self.left += 1;
        Some(self.left - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_refilled_and_groups_leave_in_order() {
        let mut scheduler = Scheduler::new(3, 2);
        while scheduler.wants_group() {
            scheduler.arrive();
        }
        let starts: Vec<Start> = std::iter::from_fn(|| scheduler.start()).collect();
        let as_started: Vec<_> = starts.iter().map(|start| (start.group, start.sample)).collect();
        assert_eq!(as_started, [(0, 0), (0, 1), (1, 0)]);
        assert!(!scheduler.wants_group());

        scheduler.end(starts[2].slot, 1);
        assert!(!scheduler.wants_group(), "group 1 has a sample waiting");
        let refill = scheduler.start().unwrap();
        assert_eq!(refill, Start { slot: starts[2].slot, group: 1, sample: 1 });
        scheduler.end(refill.slot, 1);
        assert_eq!(scheduler.leave(), None, "group 0 goes first");
        scheduler.end(starts[0].slot, 0);
        scheduler.end(starts[1].slot, 0);
        assert_eq!([scheduler.leave(), scheduler.leave(), scheduler.leave()], [Some(0), Some(1), None]);
        assert!(scheduler.is_idle());
    }

    #[test]
    fn a_group_that_waits_for_its_slots_is_work() {
        let mut scheduler = Scheduler::new(3, 2);
        assert!(scheduler.is_idle());
        scheduler.arrive();
        assert!(!scheduler.is_idle(), "or the engine would wait for a second group before it samples the first");
    }

    #[test]
    fn no_more_groups_are_asked_for_than_fill_the_slots() {
        let mut scheduler = Scheduler::new(64, 16);
        let mut asked = 0;
        while scheduler.wants_group() {
            scheduler.arrive();
            asked += 1;
        }
        assert_eq!(asked, 4);
    }
}
