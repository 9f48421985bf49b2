//! Packed sequences through the model on a device: the forward that training and prefill share, and the backward.
//!
//! The same chain as `model::block` and `model::backward`, with the residual stream and every sum in f32 and what the products
//! read in the type of the weights.

mod backward;
mod batch;
mod forward;
mod gradients;
mod head;
mod model;
mod plan;

pub use batch::{PackedBatch, TileRows};
pub use forward::{ForwardPass, KeptActivations, QkvHook};
pub use gradients::DeviceGradients;
pub use head::LossSlope;
pub use model::PackedModel;
pub use plan::{PlanRequest, TrainingPlan};
