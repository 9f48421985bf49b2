//! Numbers in bulk: aligned arrays, safetensors files, and reproducible random numbers.

pub mod aligned;
pub mod dtype;
pub mod mean;
pub mod quantization;
pub mod rng;
pub mod tensors;
