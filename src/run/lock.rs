//! One trainer and one sampler a run: locks on files, which the system lets go when their holder ends in any way.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
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
    file: File,
}

/// What became of who had a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Nobody ever had it.
    Nobody,
    /// Somebody has it.
    Working,
    /// Ended with all of its work done.
    Done,
    /// Ended because the weights it was given make numbers that are not finite.
    FoundNumerics,
    /// Ended in another way: killed, or with an error.
    Gone,
}

/// What a holder that ends leaves in the place of its number, see [`Holder`].
const DONE: &str = "done";
const NUMERICS: &str = "numerics";

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

    /// Lets the role go, and says how the work ended.
    pub fn leave<T>(mut self, ended: &Result<T>) {
        let word = match ended {
            Ok(_) => DONE,
            Err(Error::Numerics(_)) => NUMERICS,
            Err(_) => return,
        };
        // A word that cannot be left makes it an end like any other.
        let _ = self.file.set_len(0).and_then(|()| self.file.rewind()).and_then(|()| writeln!(self.file, "{word}"));
    }

    /// Whether somebody has the role now, or what became of them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn holder(run: &Run, role: Role) -> Result<Holder> {
        let path = path(run, role);
        let mut file = match File::open(&path) {
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(Holder::Nobody),
            opened => opened.map_err(Error::io(&path))?,
        };
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => return Ok(Holder::Working),
            Err(TryLockError::Error(err)) => return Err(Error::io(&path)(err)),
            Ok(()) => {}
        }
        let mut left = String::new();
        file.read_to_string(&mut left).map_err(Error::io(&path))?;
        Ok(match left.trim() {
            DONE => Holder::Done,
            NUMERICS => Holder::FoundNumerics,
            _ => Holder::Gone,
        })
    }

    /// Whether somebody has the role now.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_held(run: &Run, role: Role) -> Result<bool> {
        Ok(Self::holder(run, role)? == Holder::Working)
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

    #[test]
    fn a_holder_that_ends_says_how() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let holder = || Lock::holder(&run, Role::Sample).unwrap();
        assert_eq!(holder(), Holder::Nobody);
        let endings: [(Result<()>, Holder); 3] = [
            (Err(Error::Data("x".into())), Holder::Gone),
            (Ok(()), Holder::Done),
            (Err(Error::Numerics("x".into())), Holder::FoundNumerics),
        ];
        for (ended, want) in endings {
            let lock = Lock::take(&run, Role::Sample).unwrap();
            assert_eq!(holder(), Holder::Working);
            lock.leave(&ended);
            assert_eq!(holder(), want);
        }
        drop(Lock::take(&run, Role::Sample).unwrap()); // as when it is killed
        assert_eq!(holder(), Holder::Gone);
    }
}
