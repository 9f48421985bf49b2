//! Finds out whether the sampler works on another machine, from which this one's memory cannot be read.

use std::thread::sleep;
use std::time::Duration;

use super::lock::machine;
use super::{Lock, Role, Run};
use crate::error::Result;
use crate::process::cancel::Stop;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// The other machine that the run's sampler works on, if it does. Waits until there is a sampler, or input, which without one comes
/// from somewhere else.
///
/// # Errors
/// [`crate::Error::Io`]; that of the stop.
pub fn sampler_elsewhere(run: &Run, has_input: &dyn Fn() -> bool, stop: &Stop) -> Result<Option<String>> {
    let mut seen = None;
    loop {
        stop.check()?;
        let found = Lock::machine(run, Role::Sample)?;
        if found.is_none() && has_input() {
            return Ok(None);
        }
        // Whoever takes a lock names its machine a moment later, in place of the last one's: two looks must agree.
        if found.is_some() && found == seen {
            return Ok(found.filter(|found| *found != machine()));
        }
        seen = found;
        sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::Error;

    #[test]
    fn it_is_elsewhere_if_its_lock_names_another_machine() {
        let dir = tempfile::tempdir().unwrap();
        let (run, stop, lock) = (Run::new(dir.path()), Stop::default(), dir.path().join("sampler.lock"));
        let elsewhere = |has_input: bool| sampler_elsewhere(&run, &|| has_input, &stop);
        fs::write(&lock, "123 on n2\n").unwrap(); // left by one that was killed
        assert_eq!(elsewhere(true).unwrap(), None);
        let _here = Lock::take(&run, Role::Sample).unwrap();
        assert_eq!(elsewhere(false).unwrap(), None);
        fs::write(&lock, "123 on n2\n").unwrap();
        assert_eq!(elsewhere(true).unwrap(), Some("n2".into()));
    }

    #[test]
    fn one_that_has_only_begun_is_waited_for_until_the_work_is_to_end() {
        let dir = tempfile::tempdir().unwrap();
        let (run, stop) = (Run::new(dir.path()), Stop::default());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sampler_elsewhere(&run, &|| false, &stop));
            sleep(2 * LOOK);
            assert!(!waiting.is_finished());
            let here = Lock::take(&run, Role::Sample).unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), None);
            drop(here);
            let waiting = scope.spawn(|| sampler_elsewhere(&run, &|| false, &stop));
            stop.abandon();
            assert!(matches!(waiting.join().unwrap(), Err(Error::Abandoned)));
        });
    }
}
