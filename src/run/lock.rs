//! One trainer and one sampler a run: locks on files, which the system lets go when their holder ends in any way.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use super::Run;
use crate::error::{Error, Result};

/// Who asks whether a lock is held takes it for a moment; who meets such a moment tries again.
const TRIES: usize = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(2);

/// What one process at a time may do for a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Train it.
    Train,
    /// Sample for it. A second sampler would wait for a trainer that reads from the first.
    Sample,
}

/// The right to a role in a run, until it is dropped.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, and writes this process' number into its file.
    ///
    /// # Errors
    /// [`Error::Usage`] with the number of the process that has it, [`Error::Io`] when there is no such directory.
    pub fn take(run: &Run, role: Role) -> Result<Self> {
        let path = path(run, role);
        // The file says who holds the lock, so a holder's number is not cut off by merely opening it.
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(Error::io(&path))?;
        for _ in 0..TRIES {
            match file.try_lock() {
                Ok(()) => {
                    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                    written.map_err(Error::io(&path))?;
                    return Ok(Self { _file: file });
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

    /// Whether somebody has the role now.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_held(run: &Run, role: Role) -> Result<bool> {
        let path = path(run, role);
        let file = match File::open(&path) {
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(false),
            opened => opened.map_err(Error::io(&path))?,
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(err)) => Err(Error::io(&path)(err)),
        }
    }
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
        assert!(error.to_string().contains(&format!("process {} trains", std::process::id())), "{error}");
        let _sampler = Lock::take(&run, Role::Sample).unwrap();
        drop(lock);
        assert!(!Lock::is_held(&run, Role::Train).unwrap());
        let _lock = Lock::take(&run, Role::Train).unwrap();
    }
}
