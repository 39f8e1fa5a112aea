//! Streams: those we own, and views of those that others own.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUevent_wait_flags, CUresult, CUstream, CUstream_flags, CUstream_st,
    CUstreamCaptureStatus,
};

use super::driver::{Handle, Kind, Live, check, check_wait, verify};
use super::gate::call;
use super::{CaptureGuard, Context, Event};
use crate::error::{Error, Result};

/// A stream of our own. It does not synchronise with the legacy default stream.
#[must_use = "dropping a stream destroys it"]
#[derive(Debug)]
pub struct Stream {
    raw: RawStream,
    context: Arc<Context>,
    _live: Live,
}

/// Which stream's work is begun first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// As every stream's.
    Normal,
    /// Before others'.
    High,
}

impl Stream {
    /// Makes a stream.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(context: &Arc<Context>) -> Result<Arc<Self>> {
        Self::with_priority(context, Priority::Normal)
    }

    /// Makes a stream whose work is begun before that of streams of lower priority, where both wait.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn with_priority(context: &Arc<Context>, priority: Priority) -> Result<Arc<Self>> {
        let _bound = context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let mut handle = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // Lower numbers go first; the driver makes of it what the device has.
        let number = match priority {
            Priority::Normal => 0,
            Priority::High => i32::MIN,
        };
        // SAFETY: the context is current, and the driver writes one pointer.
        check("cuStreamCreateWithPriority", || unsafe {
            sys::cuStreamCreateWithPriority(&raw mut handle, flags, number)
        })?;
        let stream = Arc::new(Self {
            raw: RawStream(Handle::new(handle)),
            context: Arc::clone(context),
            _live: Live::new(Kind::Stream),
        });
        context.register_stream(&stream);
        Ok(stream)
    }

    /// The stream as a view. Keep the `Arc` for as long as the view is used.
    pub fn raw(&self) -> RawStream {
        self.raw
    }

    /// The context the stream belongs to.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Makes later work on this stream wait for the event.
    ///
    /// # Errors
    /// [`Error::Driver`], [`Error::Capturing`].
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.raw.wait(event)
    }

    /// Whether the stream is being captured into a graph.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn is_capturing(&self) -> Result<bool> {
        self.raw.is_capturing(&self.context)
    }

    /// Waits until all work on the stream is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for the failure of work enqueued before; [`Error::Capturing`].
    pub fn synchronize(&self) -> Result<()> {
        self.raw.synchronize(&self.context)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed only here. Work still on it runs to its end: the
        // driver destroys the stream behind it.
        self.context
            .in_drop("cuStreamDestroy", || unsafe { sys::cuStreamDestroy_v2(self.raw.raw()) });
    }
}

/// A view of a stream that somebody else owns: torch's current stream, one that a consumer
/// named, or a [`Stream`]. Two views are equal where they are of one stream.
///
/// The default streams are per context (the legacy one) and per thread; calls that need to know
/// which context take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawStream(Handle<CUstream_st>);

impl RawStream {
    /// The legacy default stream. Torch's current stream is this one unless a program says
    /// otherwise.
    pub const LEGACY: Self = Self(Handle::new(ptr::without_provenance_mut(1)));
    /// The calling thread's default stream, which is another one on each thread.
    pub const PER_THREAD: Self = Self(Handle::new(ptr::without_provenance_mut(2)));

    /// A view of the stream with this handle: 0 and 1 are the legacy default stream, 2 is the
    /// calling thread's, and every other number is a `CUstream` (`cudaStream_t`).
    ///
    /// # Safety
    /// The stream must exist, and must not be destroyed while this view or a copy of it is in
    /// use. [`DeviceBuffer::used_on`](super::DeviceBuffer::used_on) keeps a copy until the buffer
    /// is gone. The stream must belong to the context that the view is used with.
    pub unsafe fn from_handle(handle: usize) -> Self {
        // The driver knows the legacy stream by two numbers, equality only by one.
        if handle == 0 {
            return Self::LEGACY;
        }
        Self(Handle::new(ptr::with_exposed_provenance_mut(handle)))
    }

    /// The stream's handle, as a number.
    pub fn handle(self) -> usize {
        self.raw().expose_provenance()
    }

    /// A stream that waits for everything this one does and that means the same on every thread.
    /// A thread's default stream has no name on other threads, but the legacy stream waits for
    /// it, and it for the legacy stream.
    #[must_use]
    pub fn for_any_thread(self) -> Self {
        if self == Self::PER_THREAD { Self::LEGACY } else { self }
    }

    pub(super) fn raw(self) -> CUstream {
        self.0.raw()
    }

    /// Makes later work on this stream wait for the event.
    ///
    /// # Errors
    /// [`Error::Driver`]; [`Error::Capturing`] where one is being captured and the other not.
    pub fn wait(self, event: &Event) -> Result<()> {
        let _bound = event.context().bind()?;
        // SAFETY: the event is alive, and whoever made the view keeps the stream alive. The
        // driver notes what the event stands for now, so the event may go or be recorded anew.
        check("cuStreamWaitEvent", || unsafe {
            sys::cuStreamWaitEvent(
                self.raw(),
                event.raw(),
                CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT as u32,
            )
        })
    }

    /// Whether the stream is being captured into a graph, so that nothing may wait for it.
    /// Also true of the legacy default stream while a stream that synchronises with it is being
    /// captured: the driver refuses all use of it then.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn is_capturing(self, context: &Context) -> Result<bool> {
        let _bound = context.bind()?;
        let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: whoever made the view keeps the stream alive; the driver writes one enumerator.
        let result = call("cuStreamIsCapturing", || unsafe {
            sys::cuStreamIsCapturing(self.raw(), &raw mut status)
        });
        if result == CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT {
            return Ok(true);
        }
        verify("cuStreamIsCapturing", result)?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Waits until all work on the stream is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for the failure of work enqueued before. [`Error::Capturing`]
    /// where the stream is being captured; the capture stays valid.
    pub fn synchronize(self, context: &Context) -> Result<()> {
        let _bound = context.bind()?;
        self.refuse_capture(context, "waiting for the stream")?;
        let _capture = CaptureGuard::relaxed();
        self.wait_for()
    }

    /// [`RawStream::synchronize`] where the context is current, the stream not being captured and
    /// the thread in the relaxed mode: where this fails, the device has stopped.
    pub(super) fn wait_for(self) -> Result<()> {
        // SAFETY: whoever made the view keeps the stream alive.
        check_wait("cuStreamSynchronize", || unsafe { sys::cuStreamSynchronize(self.raw()) })
    }

    /// Fails where the stream is being captured. To be asked before a call that would not only
    /// fail then, but also invalidate the capture.
    pub(super) fn refuse_capture(self, context: &Context, call: &'static str) -> Result<()> {
        if self.is_capturing(context)? {
            return Err(Error::Capturing { call, hint: "do it before the capture, or after it" });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legacy_stream_is_one_stream_under_both_numbers() {
        // SAFETY: these numbers name streams that every context and thread has.
        let (zero, one, two) = unsafe {
            (RawStream::from_handle(0), RawStream::from_handle(1), RawStream::from_handle(2))
        };
        assert_eq!(zero, RawStream::LEGACY);
        assert_eq!(one, RawStream::LEGACY);
        assert_eq!(two, RawStream::PER_THREAD);
        assert_ne!(one, two);
        assert_eq!(two.for_any_thread(), RawStream::LEGACY);
    }

    #[test]
    fn a_handle_comes_back_as_it_went_in() {
        // SAFETY: the view is not used with the driver.
        let stream = unsafe { RawStream::from_handle(0x7f00_0000_1000) };
        assert_eq!(stream.handle(), 0x7f00_0000_1000);
        assert_eq!(stream.for_any_thread(), stream);
    }
}
