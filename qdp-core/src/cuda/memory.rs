//! Device memory: a buffer of a pool's, or of somebody else's.

use std::ffi::{c_uchar, c_void};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::driver::{Kind, Live, check};
use super::release::{self, Home, Owner, Retired};
use super::{CaptureGuard, Context, Event, PinnedBuffer, RawStream};
use crate::error::{Error, Result};

/// A range of device memory, freed in stream order when dropped: on its home stream, behind
/// every stream it was [used on](DeviceBuffer::used_on).
#[must_use = "dropping a buffer frees its memory"]
pub struct DeviceBuffer {
    ptr: u64,
    bytes: usize,
    home: Home,
    // Taken by `drop`, and only there.
    owner: Option<Owner>,
    consumers: Mutex<Vec<RawStream>>,
    context: Arc<Context>,
    _live: Live,
}

impl DeviceBuffer {
    /// A buffer over memory that somebody else allocated, as torch. `owner` keeps it alive and is
    /// dropped once `home` waits for every stream that the buffer was used on. It may be dropped
    /// on any thread.
    ///
    /// # Safety
    /// `ptr` must be valid for `bytes` bytes in this context, ready in the order of `home`, and
    /// stay so until `owner` is dropped; and dropping `owner` must free it in the order of
    /// `home` or later.
    pub unsafe fn external(
        context: &Arc<Context>,
        ptr: u64,
        bytes: usize,
        owner: Box<dyn Send + Sync>,
        home: RawStream,
    ) -> Self {
        let home = Home::Borrowed(home.for_any_thread());
        Self::new(Arc::clone(context), ptr, bytes, home, Owner::External { owner, join: None })
    }

    /// A buffer over a part of memory of our own, which `owner` keeps, and `home`. `join` is for
    /// ordering `home` behind the streams that the buffer is used on.
    ///
    /// # Safety
    /// As for [`DeviceBuffer::external`].
    pub(super) unsafe fn part(
        context: &Arc<Context>,
        (ptr, bytes): (u64, usize),
        owner: Box<dyn Send + Sync>,
        join: Arc<Mutex<Event>>,
        home: RawStream,
    ) -> Self {
        let owner = Owner::External { owner, join: Some(join) };
        Self::new(Arc::clone(context), ptr, bytes, Home::Borrowed(home), owner)
    }

    /// `owner` frees the memory at `ptr` in the order of `home`.
    pub(super) fn new(
        context: Arc<Context>,
        ptr: u64,
        bytes: usize,
        home: Home,
        owner: Owner,
    ) -> Self {
        Self {
            ptr,
            bytes,
            home,
            owner: Some(owner),
            consumers: Mutex::new(Vec::new()),
            context,
            _live: Live::new(Kind::DeviceBuffer),
        }
    }

    /// The device address; 0 for zero bytes of a pool.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The context the memory belongs to.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The stream in whose order the memory is allocated and freed. A thread's default stream
    /// comes back as the legacy one.
    pub fn home(&self) -> RawStream {
        self.home.raw()
    }

    /// Notes that work on `stream` uses the buffer, now or later, so that it is not freed before
    /// that work is done. Making the stream wait until the contents are ready is the caller's.
    pub fn used_on(&self, stream: RawStream) {
        let stream = stream.for_any_thread();
        if stream == self.home() {
            return;
        }
        let mut consumers = self.consumers.lock();
        if !consumers.contains(&stream) {
            consumers.push(stream);
        }
    }

    /// Enqueues a copy of `source[range]` to the buffer at `offset`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond either end, [`Error::Driver`].
    ///
    /// # Safety
    /// `source` must stay alive, and that range of it unwritten, until the stream has done the
    /// copy; where the stream is being captured, until the graph is gone.
    pub unsafe fn copy_from_host_async(
        &self,
        offset: usize,
        source: &PinnedBuffer,
        range: Range<usize>,
        stream: RawStream,
    ) -> Result<()> {
        let source = source.as_ptr_range(&range)?;
        // SAFETY: `as_ptr_range` has checked the source; its lifetime is the caller's promise.
        unsafe { self.host_to_device(offset, source.cast(), range.len(), stream) }
    }

    /// Enqueues a copy of the buffer at `offset` to `target[range]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond either end, [`Error::Driver`].
    ///
    /// # Safety
    /// `target` must stay alive, and nobody may read or write that range of it, until the stream
    /// has done the copy; where the stream is being captured, until the graph is gone.
    pub unsafe fn copy_to_host_async(
        &self,
        offset: usize,
        target: &PinnedBuffer,
        range: Range<usize>,
        stream: RawStream,
    ) -> Result<()> {
        let target = target.as_ptr_range(&range)?;
        // SAFETY: `as_ptr_range` has checked the target; its lifetime is the caller's promise.
        unsafe { self.device_to_host(offset, target.cast(), range.len(), stream) }
    }

    /// Copies `source` to the buffer at `offset`, in the order of `stream`, and waits for it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the end, [`Error::Driver`],
    /// [`Error::Capturing`] while the stream is being captured.
    pub fn copy_from_host(&self, offset: usize, source: &[u8], stream: RawStream) -> Result<()> {
        let _bound = self.context.bind()?;
        stream.refuse_capture(&self.context, "copying from the host")?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: `source` is borrowed until the copy is done: `wait_for` waits for it, and where
        // that fails the device has stopped.
        unsafe { self.host_to_device(offset, source.as_ptr().cast(), source.len(), stream)? };
        stream.wait_for()
    }

    /// Copies the buffer at `offset` to `target`, in the order of `stream`, and waits for it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the end, [`Error::Driver`],
    /// [`Error::Capturing`] while the stream is being captured.
    pub fn copy_to_host(&self, offset: usize, target: &mut [u8], stream: RawStream) -> Result<()> {
        let _bound = self.context.bind()?;
        stream.refuse_capture(&self.context, "copying to the host")?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: `target` is borrowed until the copy is done: `wait_for` waits for it, and where
        // that fails the device has stopped.
        unsafe { self.device_to_host(offset, target.as_mut_ptr().cast(), target.len(), stream)? };
        stream.wait_for()
    }

    /// Enqueues a copy of `source[range]` to this buffer at `offset`, within one device. Both
    /// buffers have to be ready on the stream, and [used on](Self::used_on) it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond either end, [`Error::Driver`].
    pub fn copy_from_device(
        &self,
        offset: usize,
        source: &DeviceBuffer,
        range: Range<usize>,
        stream: RawStream,
    ) -> Result<()> {
        let target = self.address(offset, range.len())?;
        let source = source.address(range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        let _bound = self.context.bind()?;
        // SAFETY: both ranges lie in their buffers, and whoever made the view keeps the stream
        // alive. The host's memory is not touched.
        check("cuMemcpyDtoDAsync", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(target, source, range.len(), stream.raw())
        })
    }

    /// Enqueues a copy of `bytes` bytes at a device address to this buffer at `offset`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the end, [`Error::Driver`].
    ///
    /// # Safety
    /// `source` must be valid for reads of `bytes` bytes in the order of `stream`.
    pub(super) unsafe fn copy_from_address(
        &self,
        offset: usize,
        source: u64,
        bytes: usize,
        stream: RawStream,
    ) -> Result<()> {
        let target = self.address(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _bound = self.context.bind()?;
        // SAFETY: the target range lies in the buffer; the rest is the caller's promise.
        check("cuMemcpyDtoDAsync", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(target, source, bytes, stream.raw())
        })
    }

    /// Enqueues setting `range` of the buffer to `value`, byte by byte.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the end, [`Error::Driver`].
    pub fn memset(&self, range: Range<usize>, value: u8, stream: RawStream) -> Result<()> {
        let target = self.address(range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        let _bound = self.context.bind()?;
        // SAFETY: the range lies in the buffer, and whoever made the view keeps the stream
        // alive. The host's memory is not touched.
        check("cuMemsetD8Async", || unsafe {
            sys::cuMemsetD8Async(target, c_uchar::from(value), range.len(), stream.raw())
        })
    }

    /// Enqueues a copy of host memory to the buffer at `offset`.
    ///
    /// # Safety
    /// `source` must be valid for reads of `bytes` bytes until the stream has done the copy.
    pub(super) unsafe fn host_to_device(
        &self,
        offset: usize,
        source: *const c_void,
        bytes: usize,
        stream: RawStream,
    ) -> Result<()> {
        let target = self.address(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: the target range lies in the buffer; the rest is the caller's promise.
        check("cuMemcpyHtoDAsync", || unsafe {
            sys::cuMemcpyHtoDAsync_v2(target, source, bytes, stream.raw())
        })
    }

    /// # Safety
    /// `target` must be valid for writes of `bytes` bytes, and used by nobody else, until the
    /// stream has done the copy.
    unsafe fn device_to_host(
        &self,
        offset: usize,
        target: *mut c_void,
        bytes: usize,
        stream: RawStream,
    ) -> Result<()> {
        let source = self.address(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: the source range lies in the buffer; the rest is the caller's promise.
        check("cuMemcpyDtoHAsync", || unsafe {
            sys::cuMemcpyDtoHAsync_v2(target, source, bytes, stream.raw())
        })
    }

    /// The address of a range of the buffer, once it is known to lie in it.
    fn address(&self, offset: usize, bytes: usize) -> Result<u64> {
        check_range(offset, bytes, self.bytes)?;
        Ok(self.ptr + offset as u64)
    }
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBuffer")
            .field("ptr", &format_args!("{:#x}", self.ptr))
            .field("bytes", &self.bytes)
            .field("home", &self.home())
            .finish_non_exhaustive()
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Some(owner) = self.owner.take() {
            release::retire(Retired {
                ptr: self.ptr,
                home: self.home.clone(),
                owner,
                consumers: std::mem::take(self.consumers.get_mut()),
                context: Arc::clone(&self.context),
                live: Live::new(Kind::DeviceBuffer),
            });
        }
    }
}

/// Fails where `offset..offset + bytes` does not lie in `0..length`.
pub(super) fn check_range(offset: usize, bytes: usize, length: usize) -> Result<()> {
    match offset.checked_add(bytes) {
        Some(end) if end <= length => Ok(()),
        _ => Err(Error::invalid(
            "range",
            format!("a range of the buffer's {length} bytes"),
            format_args!("{bytes} bytes at {offset}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_where_the_buffer_does() {
        assert!(check_range(0, 0, 0).is_ok());
        assert!(check_range(3, 5, 8).is_ok());
        assert!(check_range(8, 0, 8).is_ok());
        assert!(check_range(3, 6, 8).is_err());
        assert!(check_range(9, 0, 8).is_err());
        assert!(check_range(usize::MAX, 2, 8).is_err());
    }
}
