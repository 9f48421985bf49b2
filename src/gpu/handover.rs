//! Hands weights from one process to another on the same GPU, without a copy through the host.
//!
//! The trainer offers its weights once. The sampler then copies them on the GPU whenever the trainer says that they are complete.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gpu::DeviceWeights;
use crate::gpu::driver::{Address, Driver, IpcHandle};

/// Describes weights that another process may open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsOffer {
    /// The type of the matrices.
    dtype: String,
    /// How many numbers all matrices have, and all vectors.
    lens: [usize; 2],
    matrices: IpcHandle,
    vectors: IpcHandle,
}

/// Another process's weights.
pub struct OpenedWeights {
    lens: [usize; 2],
    matrices: Address,
    vectors: Address,
}

impl DeviceWeights {
    /// Offers these weights for as long as they live.
    ///
    /// # Errors
    /// [`Error::Device`] when the device cannot share memory.
    pub fn offer(&self) -> Result<WeightsOffer> {
        Ok(WeightsOffer {
            dtype: self.matrices.dtype().name().into(),
            lens: self.lens(),
            matrices: self.matrices.bytes().ipc_handle()?,
            vectors: self.vectors.ipc_handle()?,
        })
    }

    /// Opens offered weights, to copy them into these.
    ///
    /// # Errors
    /// [`Error::Device`] when their type, shape or GPU differs, or the device cannot open them.
    pub fn open(&self, driver: &dyn Driver, offer: &WeightsOffer) -> Result<OpenedWeights> {
        let (dtype, lens) = (self.matrices.dtype().name(), self.lens());
        if (offer.dtype.as_str(), offer.lens) != (dtype, lens) {
            return Err(Error::Device(format!("the trainer's weights are {}, the sampler's {dtype}", offer.dtype)));
        }
        let [matrices, vectors] = [&offer.matrices, &offer.vectors].map(|handle| driver.open_ipc_handle(handle));
        Ok(OpenedWeights { lens, matrices: matrices?, vectors: vectors? })
    }

    /// Queues a copy of opened weights into these.
    ///
    /// # Errors
    /// [`Error::Device`] when the device fails.
    #[allow(unsafe_code)] // reads another process's memory
    pub fn copy_from(&self, opened: &OpenedWeights) -> Result<()> {
        assert_eq!(opened.lens, self.lens(), "weights of this shape were opened");
        // SAFETY: the trainer offered memory of these lengths, and keeps it for as long as it lives.
        unsafe {
            self.matrices.bytes().copy_from_address(opened.matrices)?;
            self.vectors.copy_from_address(opened.vectors)
        }
    }

    fn lens(&self) -> [usize; 2] {
        [self.matrices.len(), self.vectors.len()]
    }
}
