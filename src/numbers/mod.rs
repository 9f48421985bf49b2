//! Arrays of numbers in memory and in safetensors files, and random ones.

pub mod aligned;
pub mod mean;
pub mod rng;
pub mod tensors;
