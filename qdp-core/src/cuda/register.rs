//! Page-locked memory of the caller's.

use parking_lot::Mutex;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use cudarc::driver::sys::{
    self, CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_READ_ONLY, CUmemorytype,
    CUpointer_attribute, CUresult,
};

use super::driver::{Kind, Live, verify};
use super::gate::call;
use super::pinned::out_of_memory;
use super::{CaptureGuard, Context};
use crate::error::{Error, Result};

/// Host memory of the caller's, page-locked until drop: copies from it run at the speed of the
/// link, straight from where it lies, and work on every device's streams.
///
/// Calls that copy from it when it is dropped keep the pages locked until they are done.
#[must_use = "dropping it lets the pages go"]
#[derive(Debug)]
pub struct RegisteredMemory {
    registration: Arc<Registration>,
}

/// Pages that are locked until the last holder drops it.
#[derive(Debug)]
struct Registration {
    start: NonNull<u8>,
    bytes: usize,
    context: Arc<Context>,
    _live: Live,
}

/// All that there are, for calls to hold what they copy from.
static REGISTRATIONS: Mutex<Vec<Weak<Registration>>> = Mutex::new(Vec::new());

// SAFETY: pages are locked for the process, not for a thread, and the driver lets them go from any
// thread.
unsafe impl Send for Registration {}
// SAFETY: a shared one gives out its address and length only.
unsafe impl Sync for Registration {}

impl RegisteredMemory {
    /// Locks the pages of `bytes` bytes from `start`. It takes time in proportion (35 to 60 ms per
    /// GiB, H200), so it pays for memory that is copied more than once.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no bytes, and for memory of which some is registered already
    /// or was allocated page-locked; [`Error::OutOfMemory`] where the system does not lock as
    /// much; [`Error::Driver`].
    ///
    /// # Safety
    /// The memory must stay mapped until this is dropped and calls that copy from it have returned.
    pub unsafe fn new(context: &Arc<Context>, start: *mut u8, bytes: usize) -> Result<Self> {
        let Some(start) = NonNull::new(start).filter(|_| bytes > 0) else {
            return Err(Error::invalid("array", "at least one byte", "an empty array"));
        };
        let is_page_locked =
            || Error::invalid("array", "memory that is not page-locked yet", "some that is");
        let _bound = context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let last = start.as_ptr().wrapping_add(bytes - 1);
        if allocation(start.as_ptr()).or_else(|| allocation(last)).is_some() {
            return Err(is_page_locked());
        }
        let register = |flags| {
            // SAFETY: the context is current, and the memory is there: the caller's promise.
            call("cuMemHostRegister", || unsafe {
                sys::cuMemHostRegister_v2(start.as_ptr().cast(), bytes, flags)
            })
        };
        let mut result = register(CU_MEMHOSTREGISTER_PORTABLE);
        if result == CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
            && register(CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_READ_ONLY)
                == CUresult::CUDA_SUCCESS
        {
            // The driver's answer to pages mapped for reading alone, too (a file's, say). To pages
            // that are page-locked, its second answer is another error.
            result = CUresult::CUDA_SUCCESS;
        }
        match result {
            CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED => return Err(is_page_locked()),
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(out_of_memory(bytes)),
            result => verify("cuMemHostRegister", result)?,
        }
        let live = Live::new(Kind::RegisteredMemory);
        let context = Arc::clone(context);
        let registration = Arc::new(Registration { start, bytes, context, _live: live });
        REGISTRATIONS.lock().push(Arc::downgrade(&registration));
        Ok(Self { registration })
    }

    /// Where it begins.
    pub fn as_ptr(&self) -> *const u8 {
        self.registration.start.as_ptr()
    }

    /// Length in bytes, not zero.
    pub fn bytes(&self) -> usize {
        self.registration.bytes
    }
}

impl Registration {
    fn overlaps(&self, start: *const u8, bytes: usize) -> bool {
        let own = self.start.addr().get();
        start.addr() < own + self.bytes && own < start.addr() + bytes
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut registrations = REGISTRATIONS.lock();
        // SAFETY: registered by `new`, let go only here, and still mapped: the caller's promise.
        self.context.in_drop("cuMemHostUnregister", || unsafe {
            sys::cuMemHostUnregister(self.start.as_ptr().cast())
        });
        registrations.retain(|other| other.as_ptr() != std::ptr::from_ref(self));
    }
}

/// Host memory that is page-locked for as long as this is held, if it is ours to say: what others
/// have locked, its owner lets go.
#[must_use = "what it says holds until it is dropped"]
pub struct PageLocked {
    _registration: Option<Arc<Registration>>,
}

impl PageLocked {
    /// `None` unless all of `bytes` bytes from `start` are host memory that is page-locked, by
    /// whomever: registered here, allocated so by torch or by ourselves; and where the driver does
    /// not say so. Takes 0.2 us (H200, driver 580).
    pub fn find(context: &Context, start: *const u8, bytes: usize) -> Option<Self> {
        let last = bytes.checked_sub(1)?;
        // Let go after the lock, which a last holder's drop takes.
        let mut held = Vec::new();
        let registrations = REGISTRATIONS.lock();
        for registration in registrations.iter() {
            // One that waits to let its pages go may be what this is about.
            held.push(registration.upgrade()?);
        }
        let _bound = context.bind().ok()?;
        let first = allocation(start)?;
        (Some(first) == allocation(start.wrapping_add(last))).then(|| {
            let own = held.iter().find(|registration| registration.overlaps(start, bytes));
            Self { _registration: own.cloned() }
        })
    }
}

/// The number of the page-locked allocation or registration that an address lies in. Numbers are
/// not used twice, so two addresses with the same one have nothing else between them.
fn allocation(address: *const u8) -> Option<u64> {
    let mut kind = 0_u32;
    let mut number = 0_u64;
    let mut attributes = [
        CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID,
    ];
    let mut values: [*mut c_void; 2] = [(&raw mut kind).cast(), (&raw mut number).cast()];
    // SAFETY: a context is current; the driver looks the address up and does not read behind it,
    // and writes a 32-bit and a 64-bit integer, the types of these attributes.
    let result = call("cuPointerGetAttributes", || unsafe {
        sys::cuPointerGetAttributes(
            attributes.len() as u32,
            attributes.as_mut_ptr(),
            values.as_mut_ptr(),
            address.addr() as u64,
        )
    });
    // For memory that the driver does not know, this call answers zeros rather than an error.
    let host = kind == CUmemorytype::CU_MEMORYTYPE_HOST as u32;
    (result == CUresult::CUDA_SUCCESS && host && number != 0).then_some(number)
}
