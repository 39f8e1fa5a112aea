//! Kernels: the loaded image, and the functions in it.

use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunc_st, CUfunction, CUfunction_attribute, CUmod_st, CUresult};

use super::driver::{Handle, Kind, Live, check, verify};
use super::gate::call;
use super::{CaptureGuard, Context};
use crate::error::{Error, Result, Unavailable};

/// Magic number and length of a fatbin's header: magic (32 bits), version and header length (16
/// each), bytes that follow the header (64); little-endian.
const FATBIN_MAGIC: u32 = 0xBA55_ED50;
const FATBIN_HEADER_BYTES: usize = 16;

/// A loaded fatbin.
#[must_use = "dropping a module unloads it"]
#[derive(Debug)]
pub struct Module {
    handle: Handle<CUmod_st>,
    context: Arc<Context>,
    _live: Live,
}

impl Module {
    /// Loads the code for this device from a fatbin as nvcc writes it. `built` names the
    /// architectures in it, for the error's sake.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`], with [`Unavailable::KernelsNotBuilt`] for an empty image and
    /// [`Unavailable::NoKernelImage`] for one that holds no code for this device;
    /// [`Error::InvalidArgument`] for what is not a whole fatbin; [`Error::Driver`].
    pub fn load(context: &Arc<Context>, image: &[u8], built: &str) -> Result<Arc<Self>> {
        let unavailable = |reason| Error::DeviceUnavailable { device: context.label(), reason };
        if image.is_empty() {
            return Err(unavailable(Unavailable::KernelsNotBuilt));
        }
        let length = fatbin_length(image).filter(|&length| length <= image.len());
        let length = length.ok_or_else(|| {
            Error::invalid("image", "a whole fatbin", format_args!("{} bytes", image.len()))
        })?;
        let image = Aligned::new(&image[..length]);

        let _bound = context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let mut handle = ptr::null_mut();
        // SAFETY: the context is current. The driver takes the image's length from its header,
        // which was compared with the slice's, and copies what it keeps.
        let result = call("cuModuleLoadData", || unsafe {
            sys::cuModuleLoadData(&raw mut handle, image.as_ptr().cast())
        });
        if result == CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
            let (major, minor) = context.compute_capability();
            let built = built.to_owned();
            return Err(unavailable(Unavailable::NoKernelImage { major, minor, built }));
        }
        verify("cuModuleLoadData", result)?;
        Ok(Arc::new(Self {
            handle: Handle::new(handle),
            context: Arc::clone(context),
            _live: Live::new(Kind::Module),
        }))
    }

    /// The context the module is loaded in.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Finds a kernel and loads it to the device. (The driver would else do so at the first
    /// launch, which may lie in a capture.)
    ///
    /// # Errors
    /// [`Error::Driver`], `CUDA_ERROR_NOT_FOUND` with the name where there is no such kernel.
    pub fn function(self: &Arc<Self>, name: &CStr) -> Result<Function> {
        let _bound = self.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        let mut handle = ptr::null_mut();
        // SAFETY: the module is alive, the name ends with a NUL, the driver writes one pointer.
        let result = call("cuModuleGetFunction", || unsafe {
            sys::cuModuleGetFunction(&raw mut handle, self.handle.raw(), name.as_ptr())
        });
        if result == CUresult::CUDA_ERROR_NOT_FOUND {
            return Err(Error::Driver {
                call: "cuModuleGetFunction",
                name: "CUDA_ERROR_NOT_FOUND".to_owned(),
                description: format!("this build holds no kernel named {}", name.to_string_lossy()),
            });
        }
        verify("cuModuleGetFunction", result)?;
        // SAFETY: the function is of a module that is alive.
        check("cuFuncLoad", || unsafe { sys::cuFuncLoad(handle) })?;
        let (mut offset, mut parameter_bytes) = (0, 0);
        // SAFETY: the function is of a module that is alive; the driver writes two integers. (That
        // there is no second parameter is not asked: for the driver the question is an error.)
        check("cuFuncGetParamInfo", || unsafe {
            sys::cuFuncGetParamInfo(handle, 0, &raw mut offset, &raw mut parameter_bytes)
        })?;
        Ok(Function { handle: Handle::new(handle), parameter_bytes, module: Arc::clone(self) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded by `load`, unloaded only here, when no function of it is left. Kernels
        // in flight hold their code: the driver waits for them.
        self.context
            .in_drop("cuModuleUnload", || unsafe { sys::cuModuleUnload(self.handle.raw()) });
    }
}

/// The whole length that a fatbin's header states; `None` for what is no fatbin.
fn fatbin_length(image: &[u8]) -> Option<usize> {
    let header = image.first_chunk::<FATBIN_HEADER_BYTES>()?;
    let (magic, rest) = header.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*magic) != FATBIN_MAGIC {
        return None;
    }
    let header_bytes = u16::from_le_bytes(*rest[2..].first_chunk()?);
    let body_bytes = u64::from_le_bytes(*rest[4..].first_chunk()?);
    usize::try_from(body_bytes).ok()?.checked_add(usize::from(header_bytes))
}

/// An image at an address that is a multiple of 8, as the header is a C struct with a 64-bit
/// member. Embedded data may lie anywhere; it is copied only where it has to be.
enum Aligned<'a> {
    There(&'a [u8]),
    Copy(Vec<u64>),
}

impl<'a> Aligned<'a> {
    fn new(image: &'a [u8]) -> Self {
        if image.as_ptr().addr().is_multiple_of(size_of::<u64>()) {
            return Self::There(image);
        }
        let word = |bytes: &[u8]| {
            let mut word = [0; size_of::<u64>()];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_ne_bytes(word)
        };
        Self::Copy(image.chunks(size_of::<u64>()).map(word).collect())
    }

    fn as_ptr(&self) -> *const u8 {
        match self {
            Self::There(image) => image.as_ptr(),
            Self::Copy(words) => words.as_ptr().cast(),
        }
    }
}

/// A kernel that takes one parameter, by value.
#[derive(Debug, Clone)]
pub struct Function {
    handle: Handle<CUfunc_st>,
    parameter_bytes: usize,
    module: Arc<Module>,
}

impl Function {
    /// The module the kernel is of.
    pub fn module(&self) -> &Arc<Module> {
        &self.module
    }

    pub(super) fn raw(&self) -> CUfunction {
        self.handle.raw()
    }

    /// The size in bytes of the kernel's parameter.
    pub fn parameter_bytes(&self) -> usize {
        self.parameter_bytes
    }

    /// Registers that each thread has.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn registers(&self) -> Result<u32> {
        self.attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)
    }

    /// The architecture whose PTX the code was made from, as in 90.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn ptx_version(&self) -> Result<u32> {
        self.attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)
    }

    /// Bytes of local memory that each thread has: spilled registers and indexed arrays.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn local_bytes(&self) -> Result<u32> {
        self.attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
    }

    /// Bytes of shared memory that a block has before any dynamic ones.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn static_shared_bytes(&self) -> Result<u32> {
        self.attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
    }

    /// The most threads that a block can have.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn max_threads_per_block(&self) -> Result<u32> {
        self.attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)
    }

    /// Allows launches with up to this many bytes of dynamic shared memory; needed above 48 KiB.
    ///
    /// # Errors
    /// [`Error::Driver`], where the device has not so much.
    pub fn set_max_dynamic_shared(&self, bytes: u32) -> Result<()> {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.set_attribute(attribute, bytes as c_int)
    }

    fn attribute(&self, attribute: CUfunction_attribute) -> Result<u32> {
        let _bound = self.module.context.bind()?;
        let mut value = 0;
        // SAFETY: the function's module is alive; the driver writes one integer.
        check("cuFuncGetAttribute", || unsafe {
            sys::cuFuncGetAttribute(&raw mut value, attribute, self.raw())
        })?;
        Ok(value as u32)
    }

    fn set_attribute(&self, attribute: CUfunction_attribute, value: c_int) -> Result<()> {
        let _bound = self.module.context.bind()?;
        let _capture = CaptureGuard::relaxed();
        // SAFETY: the function's module is alive.
        check("cuFuncSetAttribute", || unsafe {
            sys::cuFuncSetAttribute(self.raw(), attribute, value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(body_bytes: u64) -> Vec<u8> {
        let mut image = FATBIN_MAGIC.to_le_bytes().to_vec();
        image.extend(1_u16.to_le_bytes());
        image.extend(16_u16.to_le_bytes());
        image.extend(body_bytes.to_le_bytes());
        image
    }

    #[test]
    fn a_fatbin_states_its_length() {
        assert_eq!(fatbin_length(&header(3984)), Some(4000));
        assert_eq!(fatbin_length(&header(u64::MAX)), None);
        assert_eq!(fatbin_length(&header(0)[..15]), None);
        assert_eq!(fatbin_length(b"\x7fELF, which is no fatbin"), None);
    }

    #[test]
    fn images_are_aligned_without_changing_a_byte() {
        let words = [0_u64; 5].map(|_| 0x0807_0605_0403_0201_u64);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        for start in 0..8 {
            let image = &bytes[start..start + 29];
            let aligned = Aligned::new(image);
            assert_eq!(aligned.as_ptr().addr() % 8, 0);
            // SAFETY: both variants hold at least as many bytes as the image.
            let copy = unsafe { std::slice::from_raw_parts(aligned.as_ptr(), image.len()) };
            assert_eq!(copy, image);
        }
    }
}
