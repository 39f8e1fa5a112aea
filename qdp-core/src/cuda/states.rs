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

    /// A copy, without gaps, of rows that start at device address `from`.
    pub(crate) fn copy(&self, from: u64, (rows, row_bytes, row_stride): RowLayout) -> Result<Self> {
        let stream = self.backend.stream();
        self.make_ready_on(stream)?;
        let copy = self.backend.allocate(rows * row_bytes)?;
        let start = (from - self.buffer.ptr()) as usize;
        if row_stride == row_bytes {
            let range = start..start + rows * row_bytes;
            copy.copy_from_device(0, &self.buffer, range, stream)?;
        } else {
            for row in 0..rows {
                let start = start + row * row_stride;
                copy.copy_from_device(
                    row * row_bytes,
                    &self.buffer,
                    start..start + row_bytes,
                    stream,
                )?;
            }
        }
        let ready = Ready::At(self.backend.event_on(stream)?);
        Ok(Self::new(Arc::clone(&self.backend), copy, ready, self.ticket))
    }
}
