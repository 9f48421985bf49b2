//! Recorded work, and marks in the stream.

use std::sync::Arc;

use cudarc::driver::result::{event, graph};
use cudarc::driver::sys;
use libloading::Library;

use super::context::{Context, failed};
use crate::error::Result;

/// Work that was recorded once and can be run many times.
pub struct Graph {
    context: Arc<Context>,
    work: sys::CUgraphExec,
}

// SAFETY: see Context.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` queues in the context's stream.
    pub fn record(context: &Arc<Context>, work: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        // A kernel that is first used while recording is also loaded then, which the other modes do not allow.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        context.bind()?;
        // SAFETY: the stream lives as long as its context, here and below.
        unsafe { cudarc::driver::result::stream::begin_capture(context.stream, mode) }.map_err(failed("recording"))?;
        let outcome = work();
        // SAFETY: as above. This must run after an error, too: the stream does nothing else until its recording ends.
        let drawn = unsafe { cudarc::driver::result::stream::end_capture(context.stream) };
        if outcome.is_err() {
            // SAFETY: it was just made, and nothing depends on it.
            let _ = drawn.map(|drawn| unsafe { graph::destroy(drawn) });
            outcome?;
            unreachable!("the line above returns the error");
        }
        let drawn = drawn.map_err(failed("recording"))?;
        // SAFETY: it was just made, and the executable graph does not need it.
        let made = unsafe {
            let made = graph::instantiate(drawn, sys::CUgraphInstantiate_flags(0));
            let _ = graph::destroy(drawn);
            made
        };
        let recorded = Self { context: Arc::clone(context), work: made.map_err(failed("recording"))? };
        // SAFETY: as above. Without this the first replay would wait for the upload.
        unsafe { graph::upload(recorded.work, context.stream) }.map_err(failed("recording"))?;
        Ok(recorded)
    }

    /// Queues the recorded work.
    pub fn replay(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: made by `record`.
        unsafe { graph::launch(self.work, self.context.stream) }.map_err(failed("replaying recorded work"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `record`; the driver waits for replays under way.
            let _ = unsafe { graph::exec_destroy(self.work) };
        }
    }
}

/// A point in the stream's work.
pub struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: see Context.
unsafe impl Send for Event {}

impl Event {
    /// The end of the work queued so far.
    pub fn now(context: &Arc<Context>) -> Result<Self> {
        context.bind()?;
        let event = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("recording an event"))?;
        let made = Self { context: Arc::clone(context), event };
        // SAFETY: both live.
        unsafe { event::record(event, context.stream) }.map_err(failed("recording an event"))?;
        Ok(made)
    }

    /// Waits until the work before it is done.
    pub fn wait(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: made by `now`.
        unsafe { event::synchronize(self.event) }.map_err(failed("waiting for the GPU"))
    }

    /// Device time to a later event (seconds), once the work before both is done.
    pub fn seconds_to(&self, later: &Self) -> Result<f64> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let mut milliseconds = 0.0;
        self.context.bind()?;
        // cudarc's bindings for CUDA 13 know only the second version of this call, which drivers have since 12.8.
        // SAFETY: the driver is open already; cuda.h, cuEventElapsedTime; both events were made by `now`.
        let said = unsafe {
            Library::new("libcuda.so.1").and_then(|driver| {
                let elapsed = driver.get::<Elapsed>(b"cuEventElapsedTime")?;
                Ok(elapsed(&raw mut milliseconds, self.event, later.event))
            })
        };
        let said = said.unwrap_or(sys::CUresult::CUDA_ERROR_NOT_FOUND);
        said.result().map_err(failed("reading the time between two events"))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made by `now`.
            let _ = unsafe { event::destroy(self.event) };
        }
    }
}
