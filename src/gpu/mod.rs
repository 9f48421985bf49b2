//! The model on a GPU: the same transformer as [`crate::model`], with kernels of our own (`kernels/`) and the card's library for
//! large matrix products.
//!
//! Knows nothing of text, records or rewards. [`driver`] is what any device must offer; all else is written once on top of it.

pub mod adamw;
mod buffer;
#[cfg(any(feature = "cuda", test))]
mod columns;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decode;
pub mod device;
pub mod driver;
mod handover;
pub mod kernels;
pub mod packed;
mod weights;

pub use buffer::{Buffer, DynBuffer};
pub use handover::{OpenedWeights, WeightsOffer};
pub use weights::{DeviceWeights, LayerAddresses, ParameterLayout};
