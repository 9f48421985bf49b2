//! A decode step on a GPU: from the last token of every slot to its next, without the host.

mod draw;
pub mod kernels;
mod log;
mod plan;
mod slots;
mod step;

pub use draw::{Drawers, Ends, Logits, Summed, draw};
pub use log::{Entry, Log};
pub use plan::Plan;
pub use slots::{Begin, Shape, Slots};
pub use step::Stepper;
