//! A decode step on a GPU: from the last token of every slot to its next, without the host.

pub mod kernels;
mod slots;

pub use slots::{Begin, Shape, Slots};
