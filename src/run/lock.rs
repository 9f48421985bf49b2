//! Allows one trainer and one sampler per run, by file locks, which the system releases however their holder ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use super::{Run, look_again};
use crate::error::{Error, Result};

/// Testing whether a lock is held takes it briefly, so taking it retries.
const TRIES: usize = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(2);

/// A role in a run that one process has at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The trainer.
    Train,
    /// The sampler. A second one would wait for a trainer that reads from the first.
    Sample,
}

/// Holds a role in a run until it is dropped.
pub struct Lock {
    file: File,
}

/// Whether a process has a role, or how the last one that had it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// No process has had the role.
    Absent,
    /// A process has the role.
    Working,
    /// The last one finished its work.
    Done,
    /// The last one ended because the weights it was given make numbers that are not finite.
    FoundNumerics,
    /// The last one was killed, or ended with another error.
    Gone,
}

/// Words that a process writes over its id in the lock file when it ends, see [`PeerState`].
const DONE: &str = "done";
const NUMERICS: &str = "numerics";

impl Lock {
    /// Takes the lock, and writes into its file the id of this process and the name of its machine.
    ///
    /// # Errors
    /// [`Error::Usage`] with what the process that has it wrote, [`Error::Io`] when there is no such directory.
    pub fn take(run: &Run, role: Role) -> Result<Self> {
        let path = path(run, role);
        // Opening must not truncate the file: it holds the id of the process that has the lock.
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(Error::io(&path))?;
        for _ in 0..TRIES {
            match file.try_lock() {
                Ok(()) => {
                    let written =
                        file.set_len(0).and_then(|()| writeln!(file, "{}{ON}{}", std::process::id(), machine()));
                    // Other machines see what is on the disk.
                    written.and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
                    return Ok(Self { file });
                }
                Err(TryLockError::WouldBlock) => sleep(BETWEEN_TRIES),
                Err(TryLockError::Error(err)) => return Err(Error::io(&path)(err)),
            }
        }
        let owner = std::fs::read_to_string(&path).unwrap_or_default();
        let (dir, owner) = (run.dir().display(), owner.trim());
        let does = match role {
            Role::Train => "trains",
            Role::Sample => "samples for",
        };
        Err(Error::Usage(format!("{dir}: process {owner} {does} this run already; wait for it, or end it")))
    }

    /// Releases the lock, and records how the work ended.
    pub fn leave<T>(mut self, ended: &Result<T>) {
        let word = match ended {
            Ok(_) => DONE,
            Err(Error::Numerics(_)) => NUMERICS,
            Err(_) => return,
        };
        // Without the word this end counts as `Gone`.
        let _ = self.file.set_len(0).and_then(|()| self.file.rewind()).and_then(|()| writeln!(self.file, "{word}"));
    }

    /// Whether a process has the role, or how the last one ended.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn state(run: &Run, role: Role) -> Result<PeerState> {
        Ok(Self::look(run, role)?.0)
    }

    /// The machine of the process that has the role, if one has it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn machine(run: &Run, role: Role) -> Result<Option<String>> {
        let (state, written) = Self::look(run, role)?;
        let holder = written.trim().split_once(ON).filter(|_| state == PeerState::Working);
        Ok(holder.map(|(_, machine)| machine.to_owned()))
    }

    /// The state, and what is written in the file.
    fn look(run: &Run, role: Role) -> Result<(PeerState, String)> {
        let path = path(run, role);
        look_again(run.dir());
        let mut file = match File::open(&path) {
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok((PeerState::Absent, String::new())),
            opened => opened.map_err(Error::io(&path))?,
        };
        let locked = match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Error(err)) => return Err(Error::io(&path)(err)),
            Ok(()) => false,
        };
        let mut written = String::new();
        file.read_to_string(&mut written).map_err(Error::io(&path))?;
        let state = match written.trim() {
            _ if locked => PeerState::Working,
            DONE => PeerState::Done,
            NUMERICS => PeerState::FoundNumerics,
            _ => PeerState::Gone,
        };
        Ok((state, written))
    }

    /// Whether a process has the role.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_held(run: &Run, role: Role) -> Result<bool> {
        Ok(Self::state(run, role)? == PeerState::Working)
    }
}

/// Stands between the two in a lock file.
const ON: &str = " on ";

/// What this machine, or container, is called.
pub(super) fn machine() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn path(run: &Run, role: Role) -> PathBuf {
    run.dir().join(match role {
        Role::Train => "lock",
        Role::Sample => "sampler.lock",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_one_trainer_and_everybody_can_ask_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        assert!(!Lock::is_held(&run, Role::Train).unwrap());
        let lock = Lock::take(&run, Role::Train).unwrap();
        assert!(Lock::is_held(&run, Role::Train).unwrap());
        let error = Lock::take(&run, Role::Train).err().unwrap();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error.to_string().contains(&format!("process {} on {} trains", std::process::id(), machine())),
            "{error}"
        );
        assert_eq!(Lock::machine(&run, Role::Train).unwrap(), Some(machine()));
        let _sampler = Lock::take(&run, Role::Sample).unwrap();
        drop(lock);
        assert!(!Lock::is_held(&run, Role::Train).unwrap());
        assert_eq!(Lock::machine(&run, Role::Train).unwrap(), None);
        let _lock = Lock::take(&run, Role::Train).unwrap();
    }

    #[test]
    fn a_holder_that_ends_says_how() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let holder = || Lock::state(&run, Role::Sample).unwrap();
        assert_eq!(holder(), PeerState::Absent);
        let endings: [(Result<()>, PeerState); 3] = [
            (Err(Error::Data("x".into())), PeerState::Gone),
            (Ok(()), PeerState::Done),
            (Err(Error::Numerics("x".into())), PeerState::FoundNumerics),
        ];
        for (ended, want) in endings {
            let lock = Lock::take(&run, Role::Sample).unwrap();
            assert_eq!(holder(), PeerState::Working);
            lock.leave(&ended);
            assert_eq!(holder(), want);
        }
        drop(Lock::take(&run, Role::Sample).unwrap()); // as when it is killed
        assert_eq!(holder(), PeerState::Gone);
    }
}
