//! Runs the model on a GPU: the same transformer as [`crate::model`], on kernels of our own ([`kernels`]) and on cuBLASLt for large
//! matrix products.
//!
//! It handles tensors only, no text, records or rewards. [`driver`] is the interface of a device; everything else is built on it.
//! [`packed`] runs packed sequences forward and backward, which prefill and training use; [`decode`] draws the next token of many
//! sequences; [`adamw`] updates the weights.

pub mod adamw;
pub mod adapter;
mod buffer;
#[cfg(any(feature = "cuda", test))]
mod columns;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decode;
pub mod device;
pub mod driver;
mod dyn_buffer;
mod handover;
pub mod kernels;
pub mod packed;
mod weights;

pub use buffer::Buffer;
pub use dyn_buffer::DynBuffer;
pub use handover::{OpenedWeights, WeightsOffer};
pub use weights::{DeviceWeights, LayerAddresses, ParameterLayout};
