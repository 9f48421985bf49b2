//! What each rank found for itself becomes what all of them know.

use serde::{Deserialize, Serialize};

use super::Ranks;
use crate::error::{Error, Result};
use crate::model::TokenStats;

/// An error on its way to another rank.
#[derive(Serialize, Deserialize)]
enum Failure {
    Interrupted(i32),
    Abandoned,
    Other { code: u8, what: String },
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        match error {
            Error::Interrupted { signal } => Self::Interrupted(*signal),
            Error::Abandoned => Self::Abandoned,
            other => Self::Other { code: other.exit_code(), what: other.to_string() },
        }
    }
}

impl Failure {
    fn of_rank(self, rank: usize) -> Error {
        match self {
            Self::Interrupted(signal) => Error::Interrupted { signal },
            Self::Abandoned => Error::Abandoned,
            Self::Other { code, what } => Error::Rank { rank, code, what },
        }
    }
}

/// Ends work that each rank did for itself: the error of one is an error of all, that of the lowest rank.
///
/// # Errors
/// This rank's own, or [`Error::Rank`], [`Error::Interrupted`] and [`Error::Abandoned`] of another.
pub fn agree<T>(ranks: &dyn Ranks, own: Result<T>) -> Result<T> {
    if ranks.count() == 1 {
        return own;
    }
    let failure = own.as_ref().err().map(Failure::from);
    let all = ranks.gather(&serde_json::to_vec(&failure).expect("plain data serialises"));
    let read = |bytes: &Vec<u8>| serde_json::from_slice::<Option<Failure>>(bytes).expect("written by this program");
    match all.iter().map(read).enumerate().find_map(|(rank, failure)| Some((rank, failure?))) {
        Some((rank, failure)) if rank != ranks.rank() => Err(failure.of_rank(rank)),
        _ => own,
    }
}

/// The numbers that another rank sent as bytes.
#[must_use]
pub fn numbers<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// The statistics of every sequence's tokens, of which each rank has those of the sequences that it owns.
///
/// # Errors
/// As [`agree`].
pub fn all_stats(
    ranks: &dyn Ranks,
    owners: &[usize],
    own: Result<Vec<Vec<TokenStats>>>,
) -> Result<Vec<Vec<TokenStats>>> {
    let mut stats = agree(ranks, own)?;
    if ranks.count() == 1 {
        return Ok(stats);
    }
    let lengths: Vec<u32> = stats.iter().map(|one| one.len() as u32).collect();
    let sent: Vec<[f32; 2]> = stats.iter().flatten().map(|token| [token.logprob, token.entropy]).collect();
    let lengths = ranks.gather(bytemuck::cast_slice(&lengths));
    let tokens = ranks.gather(bytemuck::cast_slice(&sent));
    for (rank, (lengths, tokens)) in lengths.iter().zip(&tokens).enumerate() {
        let lengths: Vec<u32> = numbers(lengths);
        let mut tokens =
            numbers(tokens).into_iter().map(|[logprob, entropy]: [f32; 2]| TokenStats { logprob, entropy });
        for ((stats, owner), length) in stats.iter_mut().zip(owners).zip(lengths) {
            let of_sequence = tokens.by_ref().take(length as usize).collect();
            if *owner == rank {
                *stats = of_sequence;
            }
        }
    }
    Ok(stats)
}
