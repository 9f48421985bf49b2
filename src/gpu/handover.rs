//! Weights from one process to another on the same card, without a copy through the host: the trainer offers its own, the sampler
//! copies them within the card whenever the trainer says that they are whole.

use serde::{Deserialize, Serialize};

use super::driver::{Address, Driver, IpcHandle};
use super::weights::DeviceWeights;
use crate::error::{Error, Result};

/// What a process says of weights that another one may open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsOffer {
    /// Type of the matrices, as kernels are called.
    dtype: String,
    /// Numbers of all matrices, and of all vectors.
    lens: [usize; 2],
    matrices: IpcHandle,
    vectors: IpcHandle,
}

/// Weights of another process, opened.
pub struct OpenedWeights {
    matrices: Address,
    vectors: Address,
}

impl DeviceWeights {
    /// Offers them; good as long as they live.
    ///
    /// # Errors
    /// [`Error::Device`] when the device cannot share memory.
    pub fn offer(&self) -> Result<WeightsOffer> {
        Ok(WeightsOffer {
            dtype: self.matrices.dtype().name().into(),
            lens: [self.matrices.len(), self.vectors.len()],
            matrices: self.matrices.bytes().ipc_handle()?,
            vectors: self.vectors.ipc_handle()?,
        })
    }

    /// Opens weights that are to be copied to these.
    ///
    /// # Errors
    /// [`Error::Device`] when they are of another type, shape or card, or the device cannot open them.
    pub fn open(&self, driver: &dyn Driver, offer: &WeightsOffer) -> Result<OpenedWeights> {
        let (dtype, lens) = (self.matrices.dtype().name(), [self.matrices.len(), self.vectors.len()]);
        if (offer.dtype.as_str(), offer.lens) != (dtype, lens) {
            return Err(Error::Device(format!("the trainer's weights are {}, the sampler's {dtype}", offer.dtype)));
        }
        Ok(OpenedWeights {
            matrices: driver.open_ipc_handle(&offer.matrices)?,
            vectors: driver.open_ipc_handle(&offer.vectors)?,
        })
    }

    /// Copies what was opened to these, in the order of the device's work.
    ///
    /// # Errors
    /// [`Error::Device`] when the device fails.
    pub fn copy_from(&self, opened: &OpenedWeights) -> Result<()> {
        self.matrices.bytes().copy_from(opened.matrices)?;
        self.vectors.copy_from(opened.vectors)
    }
}
