//! Runs packed sequences through the model on a GPU: the forward pass that training and prefill share, and the backward pass.
//!
//! The operations are those of `model::block` and `model::backward`. The residual stream and every sum are in f32; what products read is
//! in the type of the weights.

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
pub use model::PackedModel;
pub use plan::{PlanRequest, TrainingPlan};
