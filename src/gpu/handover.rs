//! Weights from one process to another on the same card, without a copy through the host: the trainer offers its own, the sampler
//! copies them within the card whenever the trainer says that they are whole.

use serde::{Deserialize, Serialize};

use super::driver::{Address, Driver, Ticket};
use super::weights::Weights;
use crate::error::{Error, Result};

/// What a process says of weights that another one may open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Type of the matrices, as kernels are called.
    dtype: String,
    /// Numbers of all matrices, and of all vectors.
    lens: [usize; 2],
    matrices: Ticket,
    vectors: Ticket,
}

/// Weights of another process, opened.
pub struct Opened {
    matrices: Address,
    vectors: Address,
}

impl Weights {
    /// Offers them; good as long as they live.
    ///
    /// # Errors
    /// [`Error::Device`] when the device cannot share memory.
    pub fn offer(&self) -> Result<Offer> {
        Ok(Offer {
            dtype: self.matrices.dtype().name().into(),
            lens: [self.matrices.len(), self.vectors.len()],
            matrices: self.matrices.bytes().ticket()?,
            vectors: self.vectors.ticket()?,
        })
    }

    /// Opens weights that are to be copied to these.
    ///
    /// # Errors
    /// [`Error::Device`] when they are of another type, shape or card, or the device cannot open them.
    pub fn open(&self, driver: &dyn Driver, offer: &Offer) -> Result<Opened> {
        let (dtype, lens) = (self.matrices.dtype().name(), [self.matrices.len(), self.vectors.len()]);
        if (offer.dtype.as_str(), offer.lens) != (dtype, lens) {
            return Err(Error::Device(format!("the trainer's weights are {}, the sampler's {dtype}", offer.dtype)));
        }
        Ok(Opened { matrices: driver.open_ticket(&offer.matrices)?, vectors: driver.open_ticket(&offer.vectors)? })
    }

    /// Copies what was opened to these, in the order of the device's work.
    ///
    /// # Errors
    /// [`Error::Device`] when the device fails.
    pub fn copy_from(&self, opened: &Opened) -> Result<()> {
        self.matrices.bytes().copy_from(opened.matrices)?;
        self.vectors.copy_from(opened.vectors)
    }
}
