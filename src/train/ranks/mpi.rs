//! Ranks that MPI connects. Its errors end all of them, which is its default.

use std::time::Duration;

use mpi::Count;
use mpi::Threading;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::point_to_point::MatchedReceiveVec;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, Source};

use super::Ranks;

/// Between two looks for an order: MPI's own waiting would keep a core busy, which the sampler needs.
const PATIENCE: Duration = Duration::from_micros(500);

/// The processes of one `mpirun`.
pub struct Mpi {
    /// MPI ends with it; taken where it must not.
    universe: Option<Universe>,
    rank: usize,
    count: usize,
}

impl Mpi {
    /// Starts MPI, which can be done once a process; `None` the second time.
    pub fn start() -> Option<Self> {
        // One thread of this program calls MPI, but not the one that started it.
        let (universe, _) = mpi::initialize_with_threading(Threading::Serialized)?;
        let world = universe.world();
        Some(Self { rank: world.rank() as usize, count: world.size() as usize, universe: Some(universe) })
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The end of MPI waits for all ranks. One that panics does not: its end without it ends them.
        if std::thread::panicking() {
            std::mem::forget(self.universe.take());
        }
    }
}

fn world() -> SimpleCommunicator {
    SimpleCommunicator::world()
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn tell(&self, bytes: &[u8]) {
        (1..self.count).for_each(|rank| world().process_at_rank(rank as i32).send(bytes));
    }

    fn hear(&self) -> Vec<u8> {
        loop {
            if let Some(message) = world().process_at_rank(0).immediate_matched_probe() {
                return message.matched_receive_vec().0;
            }
            std::thread::sleep(PATIENCE);
        }
    }

    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        let mut counts: Vec<Count> = vec![0; self.count];
        world().all_gather_into(&(own.len() as Count), &mut counts[..]);
        let mut ends = counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end)
        });
        let starts: Vec<Count> = std::iter::once(0).chain(ends.by_ref()).take(self.count).collect();
        let mut all = vec![0; counts.iter().sum::<Count>() as usize];
        world().all_gather_varcount_into(own, &mut PartitionMut::new(&mut all[..], &counts[..], &starts[..]));
        let of_rank = |(start, count): (&Count, &Count)| all[*start as usize..][..*count as usize].to_vec();
        starts.iter().zip(&counts).map(of_rank).collect()
    }

    fn gather_numbers(&self, own: &[f32], all: &mut [f32]) {
        world().all_gather_into(own, all);
    }

    fn exchange(&self, parts: &[f32], received: &mut [f32]) {
        world().all_to_all_into(parts, received);
    }

    fn abort(&self, code: u8) -> ! {
        world().abort(code.into())
    }
}
