//! Page-locked memory of the caller's.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

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
#[must_use = "dropping it lets the pages go"]
#[derive(Debug)]
pub struct RegisteredMemory {
    start: NonNull<u8>,
    bytes: usize,
    context: Arc<Context>,
    _live: Live,
}

// SAFETY: pages are locked for the process, not for a thread, and the driver lets them go from any
// thread.
unsafe impl Send for RegisteredMemory {}
// SAFETY: a shared one gives out its address and length only.
unsafe impl Sync for RegisteredMemory {}

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
    /// The memory must stay mapped until this is dropped, and calls that copy from it must have
    /// returned by then: the drop waits for nothing.
    pub unsafe fn new(context: &Arc<Context>, start: *mut u8, bytes: usize) -> Result<Self> {
        let Some(start) = NonNull::new(start).filter(|_| bytes > 0) else {
            return Err(Error::invalid("array", "at least one byte", "an empty array"));
        };
        let _bound = context.bind()?;
        let _capture = CaptureGuard::relaxed();
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
            CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED => {
                let expected = "memory that is not page-locked yet";
                return Err(Error::invalid("array", expected, "some that is"));
            }
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(out_of_memory(bytes)),
            result => verify("cuMemHostRegister", result)?,
        }
        let live = Live::new(Kind::RegisteredMemory);
        Ok(Self { start, bytes, context: Arc::clone(context), _live: live })
    }

    /// Where it begins.
    pub fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    /// Length in bytes, not zero.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for RegisteredMemory {
    fn drop(&mut self) {
        // SAFETY: registered by `new`, let go only here, and still mapped: the caller's promise.
        self.context.in_drop("cuMemHostUnregister", || unsafe {
            sys::cuMemHostUnregister(self.start.as_ptr().cast())
        });
    }
}

/// Whether all of `bytes` bytes from `start` are host memory that is page-locked, by whomever:
/// registered here, allocated so by torch or by ourselves. False where the driver does not say so.
/// Takes 0.2 us (H200, driver 580).
pub fn is_page_locked(context: &Context, start: *const u8, bytes: usize) -> bool {
    let Some(last) = bytes.checked_sub(1) else { return false };
    let Ok(_bound) = context.bind() else { return false };
    let first = allocation(start);
    first.is_some() && first == allocation(start.wrapping_add(last))
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
