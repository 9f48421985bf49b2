//! Agrees that weights are copied within the GPU instead of through files: the trainer offers a handle, the sampler accepts it.

use std::fs;
use std::path::{Path, PathBuf};

use super::{LiveWeights, Run};
use crate::error::{Error, Result};

const OFFER: &str = "offer";
const TAKEN: &str = "taken";

impl LiveWeights {
    /// Offers the sampler a handle to the weights on the GPU.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn offer(&mut self, handle: Vec<u8>) -> Result<()> {
        write_whole(&self.dir, OFFER, &handle)?;
        self.offered = Some(handle);
        Ok(())
    }

    /// Whether the sampler accepted the offer.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.offered.is_some() && fs::read(self.dir.join(TAKEN)).ok() == self.offered
    }
}

/// The offers of a run's trainer, for its sampler.
pub struct HandoverOffers {
    place: PathBuf,
    seen: Option<Vec<u8>>,
}

impl HandoverOffers {
    /// Looks for offers of this run's trainer.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        Self { place: run.live_link(), seen: None }
    }

    /// A handle that was not seen yet.
    pub fn look(&mut self) -> Option<&[u8]> {
        let found = fs::read(self.place.join(OFFER)).ok().filter(|found| self.seen.as_ref() != Some(found))?;
        Some(self.seen.insert(found))
    }

    /// Accepts the handle seen last: the next weights come that way.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn take(&self) -> Result<()> {
        self.seen.as_ref().map_or(Ok(()), |handle| write_whole(&self.place, TAKEN, handle))
    }
}

/// Writes a file that is complete as soon as it exists.
pub(super) fn write_whole(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let (unfinished, whole) = (dir.join(format!("{name}.unfinished")), dir.join(name));
    fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, &whole)).map_err(Error::io(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_taken_once_and_that_of_an_earlier_trainer_by_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let mut offers = HandoverOffers::of(&run);
        assert_eq!(offers.look(), None);
        let mut live = LiveWeights::create(&run, 0, 0, None, &|_| ()).unwrap();
        live.offer(b"first".to_vec()).unwrap();
        assert_eq!((offers.look(), live.is_taken()), (Some(&b"first"[..]), false));
        offers.take().unwrap();
        assert_eq!((offers.look(), live.is_taken()), (None, true));
        drop(live);
        let mut live = LiveWeights::create(&run, 0, 0, None, &|_| ()).unwrap();
        assert!(!live.is_taken());
        live.offer(b"second".to_vec()).unwrap();
        offers.take().unwrap(); // of the first
        assert!(!live.is_taken());
        assert_eq!(offers.look(), Some(&b"second"[..]));
    }
}
