//! Hands the weights of the last steps to the sampler through files in memory, which the sampler maps. Where the system has no file
//! system in memory they go through the run's directory, without waiting for the disk.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use super::{Run, remove_if_there, step_name};
use crate::checkpoint::WEIGHTS;
use crate::error::{Error, Result};

/// Linux's file system in memory.
const MEMORY: &str = "/dev/shm";

/// The names of our directories there begin with this.
const PREFIX: &str = "grpo-pipes-";

/// A file in each of them that its owner keeps locked.
const OWNER: &str = "owner";

/// Steps whose weights exist at once, besides those that sampling may be ahead: the sampler may still be opening older ones.
const KEPT: u64 = 2;

/// The place where the weights of steps appear; dropping it removes them.
pub struct LiveWeights {
    link: PathBuf,
    pub(super) dir: PathBuf,
    /// Steps whose weights exist at once.
    kept: u64,
    /// The handle offered to the sampler instead of files.
    pub(super) offered: Option<Vec<u8>>,
    /// Keeps other runs from removing the directory in memory.
    _owner: Option<File>,
}

impl LiveWeights {
    /// Makes an empty place for weights of this size (bytes), with sampling up to `ahead` steps ahead. When memory has no room for them,
    /// tells `say` so and uses the run's directory, which also serves a sampler on another machine, `elsewhere`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(run: &Run, bytes: u64, ahead: u64, elsewhere: Option<&str>, say: &dyn Fn(&str)) -> Result<Self> {
        let kept = KEPT + ahead;
        match elsewhere {
            None => Self::create_in(Path::new(MEMORY), run, bytes, kept, say),
            Some(machine) => Self::create_on_disk(run, kept, &format!("the sampler is on {machine}"), say),
        }
    }

    fn create_in(memory: &Path, run: &Run, bytes: u64, kept: u64, say: &dyn Fn(&str)) -> Result<Self> {
        let link = run.live_link();
        remove(&link)?;
        match in_memory(memory, run, kept.saturating_mul(bytes)) {
            Ok((dir, owner)) => {
                symlink(&dir, &link).map_err(Error::io(&link))?;
                Ok(Self { link, dir, kept, offered: None, _owner: Some(owner) })
            }
            Err(why) => Self::create_on_disk(run, kept, &format!("{}: {why}", memory.display()), say),
        }
    }

    fn create_on_disk(run: &Run, kept: u64, why: &str, say: &dyn Fn(&str)) -> Result<Self> {
        let link = run.live_link();
        remove(&link)?;
        say(&format!("{why}; the weights of each step go through {}", link.display()));
        fs::create_dir(&link).map_err(Error::io(&link))?;
        Ok(Self { dir: link.clone(), link, kept, offered: None, _owner: None })
    }

    /// Publishes the weights of a step. `fill` writes them into the directory it is given, where it may find a file of older weights to
    /// overwrite.
    ///
    /// # Errors
    /// [`Error::Io`], and that of `fill`.
    pub fn publish(&self, step: u64, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (unfinished, target) = (self.dir.join("unfinished"), self.weights(step));
        fs::create_dir(&unfinished).map_err(Error::io(&unfinished))?;
        if let Some(old) = step.checked_sub(self.kept) {
            let file = self.weights(old).join(WEIGHTS);
            if !self.is_taken() {
                // The sampler of this step's records has later weights, so this file can be overwritten: allocating its pages anew
                // would take longer than filling them.
                remove_if_there(fs::rename(&file, unfinished.join(WEIGHTS)), &file)?;
            }
            remove(&self.weights(old))?;
        }
        fill(&unfinished)?;
        fs::rename(&unfinished, &target).map_err(Error::io(&target))
    }

    /// Where the weights of a step are.
    #[must_use]
    pub fn weights(&self, step: u64) -> PathBuf {
        self.dir.join(step_name(step))
    }
}

impl Drop for LiveWeights {
    fn drop(&mut self) {
        // The link goes first, so that a reader loses everything at once. Failures have no one to report to, and the next trainer of
        // the run starts with the same removal.
        let _ = remove(&self.link);
        let _ = remove(&self.dir);
    }
}

/// Makes the run's own directory in memory, closed to other users, or says why it cannot.
fn in_memory(memory: &Path, run: &Run, bytes: u64) -> std::result::Result<(PathBuf, File), String> {
    let whole = run.dir().canonicalize().map_err(|err| err.to_string())?;
    let hash = blake3::hash(whole.as_os_str().as_encoded_bytes()).to_hex();
    let name = format!("{PREFIX}{}", &hash[..16]);
    let (unowned, dir) = (memory.join(format!(".{name}")), memory.join(name));
    sweep(memory);
    for left in [&unowned, &dir] {
        remove(left).map_err(|err| err.to_string())?;
    }
    let room = rustix::fs::statvfs(memory).map_err(|err| err.to_string())?;
    if room.f_bavail.saturating_mul(room.f_frsize) < bytes {
        return Err(format!("no room for {} MiB", bytes.div_ceil(1 << 20)));
    }
    let make = || {
        DirBuilder::new().mode(0o700).create(&unowned)?;
        let owner = File::create(unowned.join(OWNER))?;
        owner.try_lock()?;
        fs::rename(&unowned, &dir)?;
        Ok(owner)
    };
    let owner = make().map_err(|err: io::Error| err.to_string())?;
    Ok((dir, owner))
}

/// Removes the weights of killed runs that have not resumed; those of other users cannot be removed and stay.
fn sweep(memory: &Path) {
    for entry in fs::read_dir(memory).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        let unowned = || File::open(entry.path().join(OWNER)).is_ok_and(|owner| owner.try_lock().is_ok());
        if ours && unowned() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Removes a link, not what it points to, or a directory.
fn remove(path: &Path) -> Result<()> {
    let is_dir = path.symlink_metadata().is_ok_and(|found| found.is_dir());
    remove_if_there(if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) }, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::super::HandoverOffers;
    use super::*;

    fn publish(live: &LiveWeights, step: u64) {
        live.publish(step, |dir| fs::write(dir.join("x"), step.to_string()).map_err(Error::io(dir))).unwrap();
    }

    #[test]
    fn the_last_two_steps_and_those_that_sampling_may_be_ahead_are_there_until_the_end() {
        let (dir, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = Run::new(dir.path());
        let silent = |words: &str| panic!("said {words}");
        let killed = LiveWeights::create_in(memory.path(), &run, 10, KEPT, &silent).unwrap();
        publish(&killed, 9);
        std::mem::forget(killed);

        for (kept, want) in [(KEPT, [false, false, true, true]), (KEPT + 1, [false, true, true, true])] {
            let live = LiveWeights::create_in(memory.path(), &run, 10, kept, &silent).unwrap();
            assert!(!run.live(9).exists() && run.live_link().is_symlink());
            for step in 1..=4 {
                publish(&live, step);
            }
            let there: Vec<bool> = (1..=4).map(|step| run.live(step).exists()).collect();
            assert_eq!(there, want);
            assert_eq!(fs::read_to_string(run.live(4).join("x")).unwrap(), "4");
            drop(live);
        }
        for place in [dir.path(), memory.path()] {
            assert_eq!(fs::read_dir(place).unwrap().count(), 0);
        }
    }

    #[test]
    fn weights_go_over_the_file_of_those_that_nobody_wants_unless_they_go_another_way() {
        let (dir, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = Run::new(dir.path());
        let mut live = LiveWeights::create_in(memory.path(), &run, 10, KEPT, &|words| panic!("said {words}")).unwrap();
        let inode = |step| fs::metadata(run.live(step).join(WEIGHTS)).unwrap().ino();
        let mut first = 0;
        for step in 1..=3 {
            live.publish(step, |dir| fs::write(dir.join(WEIGHTS), [step as u8]).map_err(Error::io(dir))).unwrap();
            first = if step == 1 { inode(1) } else { first };
        }
        assert!(inode(3) == first && inode(2) != first);
        assert_eq!(fs::read(run.live(3).join(WEIGHTS)).unwrap(), [3]);
        live.offer(b"another way".to_vec()).unwrap();
        let mut offers = HandoverOffers::of(&run);
        offers.look().unwrap();
        offers.take().unwrap();
        live.publish(4, |_| Ok(())).unwrap();
        assert!(!run.live(4).join(WEIGHTS).exists() && !run.live(2).exists());
    }

    #[test]
    fn what_a_killed_run_left_goes_with_the_next_run_and_what_is_owned_stays() {
        let (dirs, memory) = ([(); 3].map(|()| tempfile::tempdir().unwrap()), tempfile::tempdir().unwrap());
        let [killed, living, next] = dirs.each_ref().map(|dir| Run::new(dir.path()));
        let create =
            |run| LiveWeights::create_in(memory.path(), run, 10, KEPT, &|words| panic!("said {words}")).unwrap();
        let mut live = create(&killed);
        live._owner = None;
        std::mem::forget(live);
        fs::create_dir(memory.path().join("another_program")).unwrap();
        let _living = create(&living);
        assert!(!killed.live_link().exists(), "its weights are gone");
        let _next = create(&next);
        assert!(living.live_link().exists() && next.live_link().exists());
        assert_eq!(fs::read_dir(memory.path()).unwrap().count(), 3);
    }

    #[test]
    fn without_memory_a_directory_serves_and_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        for (memory, bytes, why) in [("/no/such/place", 1, "No such file"), ("/", u64::MAX / 4, "no room for ")] {
            let said = std::cell::RefCell::new(String::new());
            let say = |words: &str| said.replace(words.into()).clear();
            let live = LiveWeights::create_in(Path::new(memory), &run, bytes, KEPT, &say);
            publish(&live.unwrap(), 1);
            assert!(said.borrow().contains(why), "{}", said.borrow());
        }
        let live = LiveWeights::create_in(Path::new("/no/such/place"), &run, 1, KEPT, &|_| ()).unwrap();
        publish(&live, 1);
        assert!(run.live(1).join("x").exists() && run.live_link().is_dir() && !run.live_link().is_symlink());
    }

    #[test]
    fn a_sampler_on_another_machine_gets_them_through_the_directory_of_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        symlink("/no/such/place", run.live_link()).unwrap(); // in the memory of a machine that went down
        let said = std::cell::RefCell::new(String::new());
        let live = LiveWeights::create(&run, 1, 0, Some("n2"), &|words| *said.borrow_mut() = words.into()).unwrap();
        publish(&live, 1);
        assert!(run.live(1).join("x").exists() && !run.live_link().is_symlink());
        assert!(said.borrow().starts_with("the sampler is on n2; "), "{}", said.borrow());
    }
}
