//! Events: points in a stream's work.

use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{
    self, CUevent, CUevent_flags, CUevent_record_flags, CUevent_st, CUresult,
};

use super::driver::{Handle, Kind, Live, check, check_wait, verify};
use super::gate::call;
use super::{CaptureGuard, Context, RawStream};
use crate::error::{Error, Result};

/// A point in a stream's work that a stream or the host can wait for. One that was never
/// recorded counts as reached.
#[must_use = "dropping an event destroys it"]
#[derive(Debug)]
pub struct Event {
    handle: Handle<CUevent_st>,
    timed: bool,
    context: Arc<Context>,
    _live: Live,
}

impl Event {
    /// Makes an event for ordering, without a time stamp.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        Self::with_flags(context, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// Makes an event that notes when it was reached, for benchmarks.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn timed(context: &Arc<Context>) -> Result<Self> {
        Self::with_flags(context, CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with_flags(context: &Arc<Context>, flags: CUevent_flags) -> Result<Self> {
        let _bound = context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let mut handle = ptr::null_mut();
        // SAFETY: the context is current, and the driver writes one pointer.
        check("cuEventCreate", || unsafe { sys::cuEventCreate(&raw mut handle, flags as u32) })?;
        Ok(Self {
            handle: Handle::new(handle),
            timed: flags == CUevent_flags::CU_EVENT_DEFAULT,
            context: Arc::clone(context),
            _live: Live::new(Kind::Event),
        })
    }

    /// The context the event belongs to.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> CUevent {
        self.handle.raw()
    }

    /// Moves the event to the end of what the stream holds now. Where the stream is being
    /// captured, the event stands for a point in the graph and only the same capture can wait
    /// for it.
    ///
    /// # Errors
    /// [`Error::Driver`], [`Error::Capturing`].
    pub fn record(&self, stream: RawStream) -> Result<()> {
        let _bound = self.context.bind()?;
        // SAFETY: the event is alive, and whoever made the view keeps the stream alive.
        check("cuEventRecord", || unsafe { sys::cuEventRecord(self.raw(), stream.raw()) })
    }

    /// Makes the graph that the stream is being captured into record the event here at every
    /// launch. Outside the capture the event is as it was.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub(super) fn record_in_graph(&self, stream: RawStream) -> Result<()> {
        let _bound = self.context.bind()?;
        let flags = CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: the event is alive, and whoever made the view keeps the stream alive.
        check("cuEventRecordWithFlags", || unsafe {
            sys::cuEventRecordWithFlags(self.raw(), stream.raw(), flags)
        })
    }

    /// Whether the event was reached.
    ///
    /// # Errors
    /// [`Error::Driver`], also for the failure of work enqueued before; [`Error::Capturing`]
    /// where it was recorded in a capture.
    pub fn query(&self) -> Result<bool> {
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: the event is alive.
        let result = call("cuEventQuery", || unsafe { sys::cuEventQuery(self.raw()) });
        if result == CUresult::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        verify("cuEventQuery", result)?;
        Ok(true)
    }

    /// Waits until the event is reached.
    ///
    /// # Errors
    /// [`Error::Driver`], also for the failure of work enqueued before; [`Error::Capturing`]
    /// where it was recorded in a capture.
    pub fn synchronize(&self) -> Result<()> {
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: the event is alive.
        check_wait("cuEventSynchronize", || unsafe { sys::cuEventSynchronize(self.raw()) })
    }

    /// The time from `earlier` to this event, both made with [`Event::timed`] and reached.
    /// Zero where they were recorded the other way round.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an event without a time stamp, [`Error::Driver`] for one
    /// that was not reached yet.
    pub fn elapsed(&self, earlier: &Event) -> Result<Duration> {
        if !(self.timed && earlier.timed) {
            return Err(Error::invalid("event", "a timed event", "one without a time stamp"));
        }
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let mut milliseconds = 0.0_f32;
        // SAFETY: both events are alive, and the driver writes one float.
        check("cuEventElapsedTime", || unsafe {
            sys::cuEventElapsedTime_v2(&raw mut milliseconds, earlier.raw(), self.raw())
        })?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `with_flags`, destroyed only here. What waits for it already waits for
        // the recorded point, not for the object.
        self.context.in_drop("cuEventDestroy", || unsafe { sys::cuEventDestroy_v2(self.raw()) });
    }
}
