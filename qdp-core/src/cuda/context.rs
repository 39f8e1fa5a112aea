//! A device's primary context.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use cudarc::driver::sys::{self, CUctx_st, CUdevice, CUdevice_attribute, CUresult};
use parking_lot::Mutex;

use super::driver::{
    Handle, Kind, Live, check, device_label, driver_is_gone, probe, refused, shutting_down, verify,
};
use super::gate::call;
use super::{CaptureGuard, Stream};
use crate::error::{Error, Result};

/// A device's primary context, retained until drop. It is the context of torch and of every
/// other CUDA runtime library in the process.
#[must_use = "dropping a context lets the device go"]
pub struct Context {
    handle: Handle<CUctx_st>,
    device: CUdevice,
    ordinal: i32,
    name: String,
    compute_capability: (i32, i32),
    sm_count: u32,
    max_shared_memory_per_block: u32,
    total_memory: u64,
    drop_failure: Mutex<Option<Error>>,
    /// Whether there is one: asked at every call.
    drop_failed: AtomicBool,
    streams: Mutex<Vec<Weak<Stream>>>,
    _live: Live,
}

impl Context {
    /// Opens the device with this ordinal, counted as `CUDA_VISIBLE_DEVICES` leaves them.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] where there is no usable driver or no such device.
    pub fn open(ordinal: i32) -> Result<Arc<Self>> {
        use CUdevice_attribute as Attribute;

        let unavailable =
            |reason| Error::DeviceUnavailable { device: device_label(ordinal), reason };
        let driver = probe().map_err(unavailable)?;
        let device = driver.device(ordinal)?;
        let attribute = |attribute| Ok::<_, Error>(driver.attribute(ordinal, attribute)? as u32);
        let name = driver.device_name(ordinal)?;
        let compute_capability = driver.compute_capability(ordinal)?;
        let sm_count = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let max_shared_memory_per_block =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let total_memory = driver.total_memory(ordinal)?;

        let _capture = CaptureGuard::relaxed();
        let mut handle = ptr::null_mut();
        // SAFETY: the device handle is the driver's own, and it writes one pointer. Everything
        // that can fail comes before, so that the reference taken here always finds its owner.
        refused("cuDevicePrimaryCtxRetain", || unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut handle, device)
        })
        .map_err(unavailable)?;
        Ok(Arc::new(Self {
            handle: Handle::new(handle),
            device,
            ordinal,
            name,
            compute_capability,
            sm_count,
            max_shared_memory_per_block,
            total_memory,
            drop_failure: Mutex::new(None),
            drop_failed: AtomicBool::new(false),
            streams: Mutex::new(Vec::new()),
            _live: Live::new(Kind::Context),
        }))
    }

    /// The device's ordinal.
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// The driver's name of the device.
    pub(super) fn device(&self) -> CUdevice {
        self.device
    }

    /// The device as the public API names it, `cuda:0`.
    pub fn label(&self) -> String {
        device_label(self.ordinal)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's compute capability, major and minor.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.compute_capability
    }

    /// How many streaming multiprocessors the device has.
    pub fn sm_count(&self) -> u32 {
        self.sm_count
    }

    /// Bytes of shared memory that one block can have once its kernel asks for more than the
    /// default 48 KiB ([`Function::set_max_dynamic_shared`](super::Function)).
    pub fn max_shared_memory_per_block(&self) -> u32 {
        self.max_shared_memory_per_block
    }

    /// The device's memory in bytes, as the driver counts it without asking the device.
    pub fn total_memory(&self) -> u64 {
        self.total_memory
    }

    /// Bytes of device memory free, and in all. Memory that a pool (ours or torch's) keeps for
    /// reuse counts as used.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn memory_info(&self) -> Result<(u64, u64)> {
        let _bound = self.bind()?;
        let _capture = CaptureGuard::relaxed();
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, and the driver writes two integers.
        check("cuMemGetInfo", || unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Makes the context current on this thread until the guard is dropped. The one that was
    /// current before comes back then: it is what torch calls the current device. Costs one read
    /// of a thread-local where the context is current already.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn bind(&self) -> Result<BoundContext<'_>> {
        let mut current = ptr::null_mut();
        // SAFETY: the driver is initialised and writes one pointer.
        check("cuCtxGetCurrent", || unsafe { sys::cuCtxGetCurrent(&raw mut current) })?;
        let previous = if current == self.handle.raw() {
            None
        } else {
            // SAFETY: the context is retained for as long as `self` is there.
            check("cuCtxSetCurrent", || unsafe { sys::cuCtxSetCurrent(self.handle.raw()) })?;
            Some(Handle::new(current))
        };
        Ok(BoundContext { context: self, previous, thread_bound: PhantomData })
    }

    /// Waits for all work on the streams of our own, less those being captured. (A
    /// synchronisation of the whole device would invalidate any capture in the process.)
    pub(super) fn synchronize_streams(&self) -> Result<()> {
        // The list is let go first: dropping the last handle of a stream takes its lock.
        let streams: Vec<_> = self.streams.lock().iter().filter_map(Weak::upgrade).collect();
        for stream in &streams {
            if !stream.is_capturing()? {
                stream.synchronize()?;
            }
        }
        Ok(())
    }

    pub(super) fn register_stream(&self, stream: &Arc<Stream>) {
        let mut streams = self.streams.lock();
        streams.retain(|stream| stream.strong_count() > 0);
        streams.push(Arc::downgrade(stream));
    }

    /// An [`Error::OutOfMemory`] of this device.
    pub(super) fn out_of_memory(&self, needed: usize, hint: &'static str) -> Error {
        let (free, total) = self.memory_info().unwrap_or((0, self.total_memory));
        Error::OutOfMemory { device: self.label(), needed: needed as u64, free, total, hint }
    }

    /// Keeps a failure of a destructor for the next call to raise. The first one is kept: it is
    /// the cause of those behind it.
    pub fn record_drop_failure(&self, error: Error) {
        tracing::warn!(device = self.ordinal, %error, "a CUDA object was not released cleanly");
        self.drop_failure.lock().get_or_insert(error);
        self.drop_failed.store(true, Ordering::Release);
    }

    /// The failure that destructors have recorded since the last call, if any.
    pub fn take_drop_failure(&self) -> Option<Error> {
        if !self.drop_failed.load(Ordering::Acquire) {
            return None;
        }
        self.drop_failed.store(false, Ordering::Release);
        self.drop_failure.lock().take()
    }

    /// Makes a destructor's call, and records its failure.
    pub(super) fn check_drop(&self, name: &'static str, destroy: impl FnOnce() -> CUresult) {
        let result = self.undeterred(|| call(name, destroy));
        if driver_is_gone(result) {
            return;
        }
        if let Err(error) = verify(name, result) {
            self.record_drop_failure(error);
        }
    }

    /// [`Context::bind`] for destructors: `None` where it failed, which is recorded.
    pub(super) fn bind_in_drop(&self) -> Option<BoundContext<'_>> {
        self.undeterred(|| self.bind()).map_err(|error| self.record_drop_failure(error)).ok()
    }

    /// Runs what a destructor asks of the driver: with the context current, in the relaxed
    /// capture mode, and not at all once the process is about to exit.
    pub(super) fn in_drop(&self, name: &'static str, destroy: impl FnOnce() -> CUresult) {
        if shutting_down() {
            return;
        }
        if let Some(_bound) = self.bind_in_drop() {
            let _capture = CaptureGuard::relaxed();
            self.check_drop(name, destroy);
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("ordinal", &self.ordinal)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if shutting_down() {
            return;
        }
        let _capture = CaptureGuard::relaxed();
        // SAFETY: gives back the one reference taken in `open`; every object of this context
        // held `self` by `Arc`, so none is left. (Nor is anybody to raise a failure, but it is
        // logged.)
        self.check_drop("cuDevicePrimaryCtxRelease", || unsafe {
            sys::cuDevicePrimaryCtxRelease_v2(self.device)
        });
    }
}

/// A context that is current on this thread.
#[must_use = "the previous context comes back as soon as this is dropped"]
#[derive(Debug)]
pub struct BoundContext<'a> {
    context: &'a Context,
    previous: Option<Handle<CUctx_st>>,
    // What is current belongs to the thread, so the guard has to stay on it.
    thread_bound: PhantomData<*const ()>,
}

impl Drop for BoundContext<'_> {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // SAFETY: it was current when the guard was made (null where none was), and whoever
            // made it current keeps it for at least this call.
            self.context
                .check_drop("cuCtxSetCurrent", || unsafe { sys::cuCtxSetCurrent(previous.raw()) });
        }
    }
}
