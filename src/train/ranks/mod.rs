//! Several processes that train one policy together. Each is a rank: all hold the weights, each computes the gradients of groups of its
//! own, and each keeps one shard of the optimizer's moments.
//!
//! The first rank runs the command as a single process would, and alone reads records and writes files. It sends the others each step's
//! records ([`follow`]); from there to the end of the step all ranks do the same. Whatever they decide by comes from all of them, so
//! that they decide alike.
//!
//! # Source
//! Rajbhandari et al. 2020, ZeRO, stage 1, <https://arxiv.org/abs/1910.02054>.

mod agree;
mod cores;
mod deal;
mod follow;
mod launch;
#[cfg(feature = "mpi")]
mod mpi;
mod orders;
mod shards;

pub use agree::{agree, all_stats, numbers};
pub use cores::share_cores;
pub use deal::deal;
pub use follow::{FollowJob, follow};
pub use launch::{Launched, join};
pub use orders::{Order, dismiss};
pub use shards::Shards;

pub(super) use orders::{announce_policy, send};

/// The processes that train together, seen from one of them. Calls block until the others make the same one, and a process that cannot
/// reach another ends with all of them.
pub trait Ranks: Send + Sync {
    /// Which one this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are; at least 1.
    fn count(&self) -> usize;

    /// Sends bytes from the first rank to all others.
    fn tell(&self, bytes: &[u8]);

    /// Waits, on any rank but the first, for what [`Ranks::tell`] sends.
    fn hear(&self) -> Vec<u8>;

    /// The bytes of each rank, on every rank.
    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>>;

    /// The numbers of each rank, as many from each, one rank after the other in `all`, on every rank.
    fn gather_numbers(&self, own: &[f32], all: &mut [f32]);

    /// Sends part r of `parts` to rank r; part s of `received` comes from rank s. All parts have one length.
    fn exchange(&self, parts: &[f32], received: &mut [f32]);

    /// Ends all ranks at once.
    fn abort(&self, code: u8) -> !;
}

/// A process on its own.
#[derive(Debug)]
pub struct One;

impl Ranks for One {
    fn rank(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn tell(&self, _: &[u8]) {}

    fn hear(&self) -> Vec<u8> {
        unreachable!("only ranks after the first listen")
    }

    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        vec![own.to_vec()]
    }

    fn gather_numbers(&self, own: &[f32], all: &mut [f32]) {
        all.copy_from_slice(own);
    }

    fn exchange(&self, parts: &[f32], received: &mut [f32]) {
        received.copy_from_slice(parts);
    }

    fn abort(&self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}
