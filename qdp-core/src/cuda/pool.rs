//! The stream-ordered memory pool.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUmemAllocationHandleType, CUmemAllocationType, CUmemLocation,
    CUmemLocation_st__bindgen_ty_1, CUmemLocationType, CUmemPool_attribute, CUmemPoolHandle_st,
    CUmemPoolProps, CUresult,
};
use parking_lot::Mutex;

use super::driver::{Handle, Kind, Live, check, probe, verify};
use super::gate::call;
use super::release::{self, Home, Owner};
use super::{CaptureGuard, Context, DeviceBuffer, Event, RawStream, Stream};
use crate::error::{Error, Result, Unavailable};

/// A pool keeps up to the device's memory divided by this for reuse, unless told otherwise.
///
/// What a pool keeps, torch's allocator cannot have, and torch cannot ask for it back; so it must
/// not be all. Memory above the threshold goes back at the next synchronisation and has to be
/// mapped anew, which only results of many GiB ever pay.
pub const DEFAULT_RELEASE_FRACTION: u64 = 8;

const OUT_OF_MEMORY_HINT: &str = "encode fewer samples at a time, ask for complex64, or free \
                                  what other libraries keep (torch.cuda.empty_cache())";

/// A stream-ordered memory pool of our own on one device. Nobody else allocates from it, so its
/// settings change nothing for the rest of the process.
#[must_use = "dropping a pool gives its memory back"]
pub struct Pool {
    handle: Handle<CUmemPoolHandle_st>,
    // Orders frees behind consumers. One event serves them all: a wait notes what the event
    // stands for at that moment.
    join: Mutex<Event>,
    context: Arc<Context>,
    _live: Live,
}

impl Pool {
    /// Makes a pool that keeps up to `release_threshold` bytes for reuse; by default, the
    /// device's memory divided by [`DEFAULT_RELEASE_FRACTION`].
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] where the device has no memory pools, [`Error::Driver`].
    pub fn new(context: &Arc<Context>, release_threshold: Option<u64>) -> Result<Arc<Self>> {
        let unavailable = |reason| Error::DeviceUnavailable { device: context.label(), reason };
        let pools = probe().map_err(unavailable)?.attribute(
            context.ordinal(),
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
        )?;
        if pools == 0 {
            let text = "the device (or its virtualisation) has no stream-ordered memory pools";
            return Err(unavailable(Unavailable::Driver(text.to_owned())));
        }

        let join = Mutex::new(Event::new(context)?);
        let _bound = context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let props = CUmemPoolProps {
            allocType: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            handleTypes: CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: CUmemLocation {
                type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                __bindgen_anon_1: CUmemLocation_st__bindgen_ty_1 { id: context.ordinal() },
            },
            win32SecurityAttributes: ptr::null_mut(),
            maxSize: 0, // as much as the device has
            usage: 0,
            gpuDirectRDMACapable: 0,
            reserved: [0; 53],
        };
        let mut handle = ptr::null_mut();
        // SAFETY: the properties are complete and outlive the call; the driver writes one
        // pointer.
        check("cuMemPoolCreate", || unsafe {
            sys::cuMemPoolCreate(&raw mut handle, &raw const props)
        })?;
        let pool = Self {
            handle: Handle::new(handle),
            join,
            context: Arc::clone(context),
            _live: Live::new(Kind::Pool),
        };
        let threshold =
            release_threshold.unwrap_or(context.total_memory() / DEFAULT_RELEASE_FRACTION);
        pool.set_release_threshold(threshold)?;
        Ok(Arc::new(pool))
    }

    /// The context the pool belongs to.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Sets how many bytes the pool keeps for reuse when a stream, an event or the context is
    /// synchronised.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn set_release_threshold(&self, mut bytes: u64) -> Result<()> {
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: this attribute's value is 64 bits wide, and the driver only reads it.
        check("cuMemPoolSetAttribute", || unsafe {
            sys::cuMemPoolSetAttribute(
                self.handle.raw(),
                CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut bytes).cast(),
            )
        })
    }

    /// Bytes that the pool holds: in use, and kept for reuse.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn reserved_bytes(&self) -> Result<u64> {
        self.attribute(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
    }

    /// Bytes of the pool that are in use.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn used_bytes(&self) -> Result<u64> {
        self.attribute(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    fn attribute(&self, attribute: CUmemPool_attribute) -> Result<u64> {
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let mut value = 0_u64;
        // SAFETY: the attributes asked for here are 64 bits wide; the driver writes one.
        check("cuMemPoolGetAttribute", || unsafe {
            sys::cuMemPoolGetAttribute(self.handle.raw(), attribute, (&raw mut value).cast())
        })?;
        Ok(value)
    }

    /// Gives memory that is not in use back to the device until the pool holds `bytes`. Memory
    /// whose free is still in a stream's future stays.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn trim_to(&self, bytes: usize) -> Result<()> {
        release::release_parked();
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: the pool is alive; memory in use is not touched.
        check("cuMemPoolTrimTo", || unsafe { sys::cuMemPoolTrimTo(self.handle.raw(), bytes) })
    }

    /// Allocates in the order of `stream`, which becomes the buffer's home: it can be used there
    /// at once, and on other streams after an event recorded there. The contents are not
    /// initialised. Zero bytes are allowed and have the address 0.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`], [`Error::Capturing`] while `stream` is being
    /// captured: the memory would belong to the graph.
    pub fn alloc(self: &Arc<Self>, bytes: usize, stream: &Arc<Stream>) -> Result<DeviceBuffer> {
        self.alloc_at(bytes, stream.raw(), Home::Owned(Arc::clone(stream)))
    }

    /// [`Pool::alloc`] in the order of a borrowed stream.
    ///
    /// # Errors
    /// As [`Pool::alloc`].
    pub fn alloc_on(self: &Arc<Self>, bytes: usize, stream: RawStream) -> Result<DeviceBuffer> {
        self.alloc_at(bytes, stream, Home::Borrowed(stream.for_any_thread()))
    }

    fn alloc_at(
        self: &Arc<Self>,
        bytes: usize,
        stream: RawStream,
        home: Home,
    ) -> Result<DeviceBuffer> {
        let ptr = if bytes == 0 { 0 } else { self.reserve(bytes, stream)? };
        let owner = Owner::Pool(Arc::clone(self));
        Ok(DeviceBuffer::new(Arc::clone(&self.context), ptr, bytes, home, owner))
    }

    /// Allocates; where memory is short, once more after everything that can be given back was.
    fn reserve(&self, bytes: usize, stream: RawStream) -> Result<u64> {
        let out_of_memory = || self.context.out_of_memory(bytes, OUT_OF_MEMORY_HINT);
        // Beyond all memory there is nothing to wait for, and the driver's answer to sizes that
        // overflow when rounded up is not this error.
        if bytes as u64 > self.context.total_memory() {
            return Err(out_of_memory());
        }
        let _bound = self.context.bind()?;
        stream.refuse_capture(&self.context, "allocating device memory")?;
        release::release_parked();
        if let Some(ptr) = self.try_reserve(bytes, stream)? {
            return Ok(ptr);
        }
        // Frees that are still ahead in some stream cannot be trimmed, so they are awaited.
        self.context.synchronize_streams()?;
        stream.synchronize(&self.context)?;
        self.trim_to(0)?;
        self.try_reserve(bytes, stream)?.ok_or_else(out_of_memory)
    }

    /// The address, or `None` where memory is short.
    fn try_reserve(&self, bytes: usize, stream: RawStream) -> Result<Option<u64>> {
        let _capture = CaptureGuard::relaxed();
        let mut ptr = 0;
        // SAFETY: the pool is alive and the context current (`reserve`), whoever made the view
        // keeps the stream alive, and the driver writes one address.
        let result = call("cuMemAllocFromPoolAsync", || unsafe {
            sys::cuMemAllocFromPoolAsync(&raw mut ptr, bytes, self.handle.raw(), stream.raw())
        });
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Ok(None);
        }
        verify("cuMemAllocFromPoolAsync", result)?;
        Ok(Some(ptr))
    }

    /// The event that frees are ordered with.
    pub(super) fn join(&self) -> &Mutex<Event> {
        &self.join
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("context", &self.context).finish_non_exhaustive()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed only here. Every buffer held the pool until its free
        // was enqueued; the driver keeps what those frees need until they ran.
        self.context
            .in_drop("cuMemPoolDestroy", || unsafe { sys::cuMemPoolDestroy(self.handle.raw()) });
    }
}
