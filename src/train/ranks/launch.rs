//! How a process finds that it is one of several: what their launcher left in the environment, and what MPI says.

use std::sync::Arc;

use super::{One, Ranks};
use crate::error::{Error, Result};

/// What a launcher (`mpirun`, `srun`) said of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launched {
    /// Which of the processes this is.
    pub rank: usize,
    /// How many were started; 1 without a launcher.
    pub count: usize,
}

/// Variables that launchers set: for the rank, and for the number of processes. Those of Slurm alone do not count: a task of a job may
/// train by itself, beside others that sample.
const VARIABLES: [[&str; 2]; 3] =
    [["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"], ["PMI_RANK", "PMI_SIZE"], ["PMIX_RANK", "SLURM_STEP_NUM_TASKS"]];

impl Launched {
    /// Looks variables of the environment up.
    #[must_use]
    pub fn find(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| variable(name)?.parse().ok();
        let by = |[rank, count]: [&str; 2]| Some(Self { rank: number(rank)?, count: number(count)? });
        VARIABLES.into_iter().find_map(by).unwrap_or(Self { rank: 0, count: 1 })
    }
}

/// Joins the other processes that were started with this one.
///
/// # Errors
/// [`Error::Usage`] when there are others that this program cannot reach: each would train the policy for itself, and write the same
/// files.
pub fn join(launched: Launched) -> Result<Arc<dyn Ranks>> {
    let count = launched.count;
    if count == 1 {
        return Ok(Arc::new(One));
    }
    let why = match start() {
        Some(ranks) if ranks.count() > 1 => return Ok(ranks),
        Some(_) => {
            "which cannot reach one another: the launcher is not of the MPI that this program was built with; `srun --mpi=list` names \
             those that Slurm knows"
        }
        None => {
            "but built without MPI: `cargo build --release --features mpi` makes a program that trains in all of them together"
        }
    };
    Err(Error::Usage(format!("started as {count} processes, {why}")))
}

#[cfg(feature = "mpi")]
fn start() -> Option<Arc<dyn Ranks>> {
    super::mpi::Mpi::start().map(|mpi| Arc::new(mpi) as Arc<dyn Ranks>)
}

#[cfg(not(feature = "mpi"))]
fn start() -> Option<Arc<dyn Ranks>> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_launchers_leave_is_found() {
        let find = |set: &[(&str, &str)]| {
            Launched::find(&|name| set.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).into()))
        };
        let some = |rank, count| Launched { rank, count };
        assert_eq!(find(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")]), some(1, 4));
        assert_eq!(find(&[("PMI_RANK", "3"), ("PMI_SIZE", "8")]), some(3, 8));
        assert_eq!(find(&[("PMIX_RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2")]), some(0, 2));
        assert_eq!(find(&[("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_NTASKS", "2")]), some(0, 1), "a task of its own");
        assert_eq!(find(&[("PMI_SIZE", "many"), ("PMI_RANK", "0")]), some(0, 1));
    }

    #[cfg(not(feature = "mpi"))]
    #[test]
    fn one_of_several_is_refused_without_mpi() {
        assert_eq!(join(Launched { rank: 0, count: 1 }).unwrap().count(), 1);
        let refused = join(Launched { rank: 1, count: 4 }).err().unwrap();
        assert_eq!(refused.exit_code(), 2);
        assert!(refused.to_string().contains("4 processes") && refused.to_string().contains("--features mpi"));
    }
}
