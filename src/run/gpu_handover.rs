//! Weights that need not go through files: the trainer offers another way, and goes it once the sampler has taken the offer.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Live, Run};
use crate::error::{Error, Result};

const OFFER: &str = "offer";
const TAKEN: &str = "taken";

impl Live {
    /// Tells a sampler of another way than files; what `words` say is between the two.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn offer(&mut self, words: Vec<u8>) -> Result<()> {
        appear(&self.dir, OFFER, &words)?;
        self.offered = Some(words);
        Ok(())
    }

    /// Whether the sampler goes that way.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.offered.is_some() && fs::read(self.dir.join(TAKEN)).ok() == self.offered
    }
}

/// What the trainer of a run offers, as its sampler sees it.
pub struct Offers {
    place: PathBuf,
    seen: Option<Vec<u8>>,
}

impl Offers {
    /// Of this run.
    #[must_use]
    pub fn of(run: &Run) -> Self {
        Self { place: run.live_link(), seen: None }
    }

    /// An offer that was not seen yet.
    pub fn look(&mut self) -> Option<&[u8]> {
        let found = fs::read(self.place.join(OFFER)).ok().filter(|found| self.seen.as_ref() != Some(found))?;
        Some(self.seen.insert(found))
    }

    /// Takes the one seen last: the next weights come that way.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn take(&self) -> Result<()> {
        self.seen.as_ref().map_or(Ok(()), |words| appear(&self.place, TAKEN, words))
    }
}

/// Writes a file that is whole as soon as it is there.
fn appear(dir: &Path, name: &str, words: &[u8]) -> Result<()> {
    let (unfinished, whole) = (dir.join(format!("{name}.unfinished")), dir.join(name));
    fs::write(&unfinished, words).and_then(|()| fs::rename(&unfinished, &whole)).map_err(Error::io(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_taken_once_and_that_of_an_earlier_trainer_by_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::new(dir.path());
        let mut offers = Offers::of(&run);
        assert_eq!(offers.look(), None);
        let mut live = Live::create(&run, 0, 0, &|_| ()).unwrap();
        live.offer(b"first".to_vec()).unwrap();
        assert_eq!((offers.look(), live.is_taken()), (Some(&b"first"[..]), false));
        offers.take().unwrap();
        assert_eq!((offers.look(), live.is_taken()), (None, true));
        drop(live);
        let mut live = Live::create(&run, 0, 0, &|_| ()).unwrap();
        assert!(!live.is_taken());
        live.offer(b"second".to_vec()).unwrap();
        offers.take().unwrap(); // of the first
        assert!(!live.is_taken());
        assert_eq!(offers.look(), Some(&b"second"[..]));
    }
}
