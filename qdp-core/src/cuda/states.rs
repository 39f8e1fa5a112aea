//! States in device memory: whose, and from when on.

use super::{CudaBackend, DeviceBuffer, Event, RawStream, Ticket};
use crate::engine::Device;
use crate::error::Result;
use std::fmt;
use std::sync::Arc;

/// When states in device memory are written.
pub(super) enum Ready {
    /// Already, or, where the encode is part of a graph, when that runs.
    Now,
    /// When the encode that holds the ticket is done.
    Encoded(Ticket),
    /// When the event is reached.
    At(Event),
}

/// A batch of states in device memory.
pub(crate) struct DeviceStates {
    buffer: DeviceBuffer,
    ready: Ready,
    /// `None` where the input was validated on the host.
    ticket: Option<Ticket>,
    /// Last: the buffer is let go first.
    backend: Arc<CudaBackend>,
}

impl fmt::Debug for DeviceStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceStates")
            .field("device", &self.device())
            .field("bytes", &self.buffer.bytes())
            .finish_non_exhaustive()
    }
}

/// Rows in device memory: number, bytes of each, and bytes from one to the next.
pub(crate) type RowLayout = (usize, usize, usize);

impl DeviceStates {
    pub(super) fn new(
        backend: Arc<CudaBackend>,
        buffer: DeviceBuffer,
        ready: Ready,
        ticket: Option<Ticket>,
    ) -> Self {
        Self { buffer, ready, ticket, backend }
    }

    pub(crate) fn device(&self) -> Device {
        self.backend.device()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.buffer.ptr() as usize)
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        self.event().map_or(Ok(()), Event::synchronize)
    }

    /// The event that the states are written at, unless that was long ago.
    fn event(&self) -> Option<&Event> {
        match &self.ready {
            Ready::Now => None,
            Ready::Encoded(ticket) => self.backend.event(*ticket),
            Ready::At(event) => Some(event),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.synchronize()?;
        self.ticket.map_or(Ok(()), |ticket| self.backend.check_ticket(ticket))
    }

    pub(crate) fn make_ready_on(&self, stream: RawStream) -> Result<()> {
        if let Some(ready) = self.event().filter(|ready| !ready.query().unwrap_or(false)) {
            // A captured stream cannot wait for work outside its graph; the host can.
            if stream.is_capturing(self.buffer.context())? {
                ready.synchronize()?;
            } else {
                stream.wait(ready)?;
            }
        }
        self.buffer.used_on(stream);
        Ok(())
    }

    /// Copies rows that start at device address `from` to `target`, without gaps, and waits.
    ///
    /// The caller has made `target` large enough for them.
    pub(crate) fn copy_to_host(
        &self,
        from: u64,
        target: *mut u8,
        (rows, row_bytes, row_stride): RowLayout,
    ) -> Result<()> {
        self.check()?;
        let stream = self.backend.stream();
        self.make_ready_on(stream)?;
        let start = (from - self.buffer.ptr()) as usize;
        // SAFETY: the caller's buffer has `rows * row_bytes` initialised bytes and is not shared.
        let target = unsafe { std::slice::from_raw_parts_mut(target, rows * row_bytes) };
        if row_stride == row_bytes || rows <= 1 {
            return self.buffer.copy_to_host(start, target, stream);
        }
        for (row, target) in target.chunks_exact_mut(row_bytes).enumerate() {
            self.buffer.copy_to_host(start + row * row_stride, target, stream)?;
        }
        Ok(())
    }

    /// A copy, without gaps, of rows that start at a device address; of several batches, one
    /// behind the other, which have been checked then.
    pub(crate) fn copy(parts: &[(&Self, u64, RowLayout)]) -> Result<Option<Self>> {
        let Some(&(first, ..)) = parts.first() else { return Ok(None) };
        if parts.len() > 1 {
            parts.iter().try_for_each(|(states, ..)| states.check())?;
        }
        let backend = &first.backend;
        let stream = backend.stream();
        let bytes = parts.iter().map(|(.., (rows, row_bytes, _))| rows * row_bytes).sum();
        let copy = backend.allocate(bytes)?;
        let mut end = 0;
        for &(states, from, (rows, row_bytes, row_stride)) in parts {
            states.make_ready_on(stream)?;
            let start = (from - states.buffer.ptr()) as usize;
            let (pieces, bytes) =
                if row_stride == row_bytes { (1, rows * row_bytes) } else { (rows, row_bytes) };
            for piece in 0..pieces {
                let start = start + piece * row_stride;
                copy.copy_from_device(end, &states.buffer, start..start + bytes, stream)?;
                end += bytes;
            }
        }
        let ready = Ready::At(backend.event_on(stream)?);
        let ticket = if parts.len() == 1 { first.ticket } else { None };
        Ok(Some(Self::new(Arc::clone(backend), copy, ready, ticket)))
    }
}
