//! Decodes on a GPU: each step goes from the last token of every slot to its next, without the host.

mod log;
mod plan;
mod slots;
mod step;

pub use log::{DrawLog, LogEntry};
pub use plan::SamplingPlan;
pub use slots::{SampleStart, SlotCapacity, Slots};
pub use step::DecodeStep;
