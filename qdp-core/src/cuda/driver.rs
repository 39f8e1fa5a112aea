//! The driver as a whole: whether it is there, its errors, and what is process-wide.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute, CUresult, CUstreamCaptureMode};

use super::gate::{call, call_anyway};
use crate::error::{Error, Result, Unavailable};

/// The oldest CUDA version of the driver that the kernels run on, major and minor.
pub const REQUIRED_VERSION: (i32, i32) = (13, 0);

/// A driver that was found, initialised and is new enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Driver {
    /// CUDA version that the driver supports, major and minor.
    pub version: (i32, i32),
    /// How many devices the driver shows to this process.
    pub device_count: i32,
}

/// Finds and initialises the driver. A success is remembered, a failure is looked at anew.
///
/// # Errors
/// [`Unavailable`], with what is missing. Never panics where libcuda is missing.
pub fn probe() -> Result<Driver, Unavailable> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(*driver);
    }
    let driver = initialise()?;
    Ok(*DRIVER.get_or_init(|| driver))
}

fn initialise() -> Result<Driver, Unavailable> {
    // SAFETY: opens and closes libcuda, whose initialisers are sound to run in any process. It
    // must come first: every other function of `sys` panics where there is no libcuda.
    if !unsafe { sys::is_culib_present() } {
        return Err(Unavailable::NoDriver);
    }
    // SAFETY: libcuda is there; initialising it twice, or from two threads, is allowed.
    let initialised = call("cuInit", || unsafe { sys::cuInit(0) });
    if initialised == CUresult::CUDA_ERROR_NO_DEVICE {
        return Err(Unavailable::NoSuchDevice { count: 0 });
    }
    refusal("cuInit", initialised)?;

    let mut version = 0;
    // SAFETY: the driver is initialised and writes one integer.
    refused("cuDriverGetVersion", || unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    let version = split_version(version);
    if version < REQUIRED_VERSION {
        return Err(Unavailable::DriverTooOld {
            found_major: version.0,
            found_minor: version.1,
            needed_major: REQUIRED_VERSION.0,
            needed_minor: REQUIRED_VERSION.1,
        });
    }

    let mut device_count = 0;
    // SAFETY: the driver is initialised and writes one integer.
    refused("cuDeviceGetCount", || unsafe { sys::cuDeviceGetCount(&raw mut device_count) })?;
    Ok(Driver { version, device_count })
}

/// The driver encodes 13.2 as 13020.
const fn split_version(version: c_int) -> (i32, i32) {
    (version / 1000, version % 1000 / 10)
}

impl Driver {
    /// The device's name, as `NVIDIA H100 80GB HBM3`.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] where there is no such device, [`Error::Driver`].
    pub fn device_name(&self, ordinal: i32) -> Result<String> {
        let device = self.device(ordinal)?;
        let mut name = [0 as c_char; 256];
        // SAFETY: `name` has room for the length given.
        check("cuDeviceGetName", || unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr(), 256, device)
        })?;
        // SAFETY: the driver ended what it wrote with a NUL within that length.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        Ok(name.to_string_lossy().into_owned())
    }

    /// The device's compute capability, major and minor.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] where there is no such device, [`Error::Driver`].
    pub fn compute_capability(&self, ordinal: i32) -> Result<(i32, i32)> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok((self.attribute(ordinal, MAJOR)?, self.attribute(ordinal, MINOR)?))
    }

    /// The device's memory, in bytes.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] where there is no such device, [`Error::Driver`].
    pub fn total_memory(&self, ordinal: i32) -> Result<u64> {
        let device = self.device(ordinal)?;
        let mut bytes = 0;
        // SAFETY: the device handle is the driver's own, and it writes one integer.
        check("cuDeviceTotalMem", || unsafe { sys::cuDeviceTotalMem_v2(&raw mut bytes, device) })?;
        Ok(bytes as u64)
    }

    pub(super) fn attribute(&self, ordinal: i32, attribute: CUdevice_attribute) -> Result<i32> {
        let device = self.device(ordinal)?;
        let mut value = 0;
        // SAFETY: the device handle is the driver's own, and it writes one integer.
        check("cuDeviceGetAttribute", || unsafe {
            sys::cuDeviceGetAttribute(&raw mut value, attribute, device)
        })?;
        Ok(value)
    }

    pub(super) fn device(&self, ordinal: i32) -> Result<CUdevice> {
        if !(0..self.device_count).contains(&ordinal) {
            let reason = Unavailable::NoSuchDevice { count: self.device_count };
            return Err(Error::DeviceUnavailable { device: device_label(ordinal), reason });
        }
        let mut device = 0;
        // SAFETY: a `Driver` exists only once the driver is initialised; it writes one integer.
        check("cuDeviceGet", || unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
        Ok(device)
    }
}

/// The device as the public API names it.
pub(super) fn device_label(ordinal: i32) -> String {
    format!("cuda:{ordinal}")
}

/// Makes a driver call and turns its answer into a [`Result`].
///
/// # Errors
/// As [`verify`].
#[inline]
pub(super) fn check(name: &'static str, ask: impl FnOnce() -> CUresult) -> Result<()> {
    verify(name, call(name, ask))
}

/// [`check`] for waits: after one, memory that the device used is let go.
///
/// # Errors
/// As [`verify`].
#[inline]
pub(super) fn check_wait(name: &'static str, wait: impl FnOnce() -> CUresult) -> Result<()> {
    verify(name, call_anyway(name, wait))
}

/// Turns the driver's answer into a [`Result`].
///
/// # Errors
/// [`Error::Capturing`] where the driver refused because of a stream capture, else
/// [`Error::Driver`]. Out of memory is for the allocating caller to recognise first.
#[inline]
pub(super) fn verify(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failure(call, result)) }
}

#[cold]
fn failure(call: &'static str, result: CUresult) -> Error {
    if let Some(hint) = capture_hint(result) {
        return Error::Capturing { call, hint };
    }
    let (name, description) = describe(result);
    Error::Driver { call, name, description }
}

/// What to do about an error that comes of a capture. Errors of the capture's own calls (ending
/// it on the wrong thread, say) are not among them: those are ordinary driver errors.
fn capture_hint(result: CUresult) -> Option<&'static str> {
    Some(match result {
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED => "make this call before the capture",
        CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED => {
            "an earlier call invalidated this capture; end it and begin a new one"
        }
        CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE
        | CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        | CUresult::CUDA_ERROR_CAPTURED_EVENT => {
            "captured work can depend only on work of the same capture; make inputs ready \
             before it begins"
        }
        CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => {
            "the legacy default stream waits for the captured one; use another stream"
        }
        _ => return None,
    })
}

/// The driver's name and description of an error.
fn describe(result: CUresult) -> (String, String) {
    let error = DriverError(result);
    let text = |text: Result<&CStr, DriverError>| text.ok().map(|s| s.to_string_lossy().into());
    let name = text(error.error_name());
    let description = text(error.error_string());
    (
        name.unwrap_or_else(|| format!("error {}", result as u32)),
        description.unwrap_or_else(|| "the driver has no description of it".to_owned()),
    )
}

/// [`check`] for the calls that decide whether a device can be used at all.
pub(super) fn refused(
    name: &'static str,
    ask: impl FnOnce() -> CUresult,
) -> Result<(), Unavailable> {
    refusal(name, call(name, ask))
}

fn refusal(call: &'static str, result: CUresult) -> Result<(), Unavailable> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (name, description) = describe(result);
    let mut text = format!("{call} failed with {name}: {description}");
    if result == CUresult::CUDA_ERROR_NOT_INITIALIZED {
        text.push_str(
            " (CUDA cannot be used in a process forked after it was initialised; start workers \
             with the \"spawn\" method)",
        );
    }
    Err(Unavailable::Driver(text))
}

static SHUTTING_DOWN: AtomicBool = AtomicBool::new(false);

/// Says that the process is about to exit: from now on destructors leave the driver alone, as it
/// may be gone before them, and the operating system frees everything anyway.
pub fn begin_shutdown() {
    SHUTTING_DOWN.store(true, Ordering::Release);
}

/// Whether [`begin_shutdown`] was called.
pub(super) fn shutting_down() -> bool {
    SHUTTING_DOWN.load(Ordering::Acquire)
}

/// The driver is being unloaded, or the process was forked: what a destructor would free is not
/// there any more.
pub(super) fn driver_is_gone(result: CUresult) -> bool {
    matches!(result, CUresult::CUDA_ERROR_DEINITIALIZED | CUresult::CUDA_ERROR_NOT_INITIALIZED)
}

/// A driver object's handle: opaque here, never dereferenced.
pub(super) struct Handle<T>(*mut T);

// SAFETY: the driver API is thread-safe, none of its objects belongs to the thread that made it,
// and only the driver looks behind the pointer.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as for `Send`; sharing a handle shares only the pointer's value.
unsafe impl<T> Sync for Handle<T> {}

impl<T> Handle<T> {
    pub(super) const fn new(raw: *mut T) -> Self {
        Self(raw)
    }

    pub(super) const fn raw(self) -> *mut T {
        self.0
    }
}

// Not derived, which would ask the same of `T`.
impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Handle<T> {}

impl<T> PartialEq for Handle<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T> Eq for Handle<T> {}

impl<T> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Lets this thread make calls that the driver forbids while another stream of the process is
/// being captured in global mode, as torch captures. The calls under it touch no captured stream,
/// so the capture stays what it was. Dropping it puts the thread's own mode back.
#[must_use = "the thread's capture mode goes back as soon as this is dropped"]
#[derive(Debug)]
pub struct CaptureGuard {
    previous: Option<CUstreamCaptureMode>,
    // The mode is the thread's, so the guard has to stay on it.
    thread_bound: PhantomData<*const ()>,
}

impl CaptureGuard {
    /// Switches this thread to the relaxed mode. Where the driver refuses, the guard does
    /// nothing, and the call that needed it says why it failed.
    pub fn relaxed() -> Self {
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let result = call(EXCHANGE, || exchange_capture_mode(&mut mode));
        let previous = (result == CUresult::CUDA_SUCCESS).then_some(mode);
        Self { previous, thread_bound: PhantomData }
    }
}

impl Drop for CaptureGuard {
    fn drop(&mut self) {
        if let Some(mut previous) = self.previous {
            let _ = call_anyway(EXCHANGE, || exchange_capture_mode(&mut previous));
        }
    }
}

const EXCHANGE: &str = "cuThreadExchangeStreamCaptureMode";

/// Swaps this thread's capture mode with `mode`.
fn exchange_capture_mode(mode: &mut CUstreamCaptureMode) -> CUresult {
    // SAFETY: the driver swaps the thread's mode with the one at the pointer. Only objects that
    // exist after a successful `probe` come here, and `probe` found libcuda.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(mode) }
}

/// How many driver objects of each type are alive in this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field is the count of the type it names")]
pub struct LiveObjects {
    pub contexts: usize,
    pub streams: usize,
    pub events: usize,
    pub pools: usize,
    pub device_buffers: usize,
    pub pinned_buffers: usize,
    pub mapped_buffers: usize,
    pub modules: usize,
    pub registered: usize,
    pub graphs: usize,
    pub executables: usize,
}

/// Counts the driver objects that are alive, for leak tests.
pub fn live_objects() -> LiveObjects {
    let count = |kind: Kind| COUNTS[kind as usize].load(Ordering::Relaxed);
    LiveObjects {
        contexts: count(Kind::Context),
        streams: count(Kind::Stream),
        events: count(Kind::Event),
        pools: count(Kind::Pool),
        device_buffers: count(Kind::DeviceBuffer),
        pinned_buffers: count(Kind::PinnedBuffer),
        mapped_buffers: count(Kind::MappedBuffer),
        modules: count(Kind::Module),
        registered: count(Kind::RegisteredMemory),
        graphs: count(Kind::Graph),
        executables: count(Kind::Executable),
    }
}

/// The types that are counted.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Context,
    Stream,
    Event,
    Pool,
    DeviceBuffer,
    PinnedBuffer,
    MappedBuffer,
    Module,
    RegisteredMemory,
    Graph,
    Executable,
}

static COUNTS: [AtomicUsize; 11] = [const { AtomicUsize::new(0) }; 11];

/// One live object in [`live_objects`]'s count: each driver object holds one.
#[derive(Debug)]
pub(super) struct Live(Kind);

impl Live {
    pub(super) fn new(kind: Kind) -> Self {
        COUNTS[kind as usize].fetch_add(1, Ordering::Relaxed);
        Self(kind)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        COUNTS[self.0 as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_split_as_the_driver_encodes_them() {
        assert_eq!(split_version(13020), (13, 2));
        assert_eq!(split_version(12090), (12, 9));
        assert!(split_version(12090) < REQUIRED_VERSION);
        assert!(split_version(13000) >= REQUIRED_VERSION);
        assert!(split_version(14010) >= REQUIRED_VERSION);
    }

    #[test]
    fn probe_answers_for_the_machine_it_runs_on() {
        // SAFETY: as in `initialise`.
        let present = unsafe { sys::is_culib_present() };
        match probe() {
            Err(Unavailable::NoDriver) => assert!(!present),
            Err(_) => assert!(present),
            Ok(driver) => {
                assert!(present);
                assert!(driver.version >= REQUIRED_VERSION);
                let beyond = driver.device_name(driver.device_count);
                assert!(matches!(beyond, Err(Error::DeviceUnavailable { .. })));
            }
        }
    }

    #[test]
    fn live_objects_follow_their_tokens() {
        // No other test of this crate makes mapped buffers, so the count is this test's own.
        let before = live_objects().mapped_buffers;
        let one = Live::new(Kind::MappedBuffer);
        let two = Live::new(Kind::MappedBuffer);
        assert_eq!(live_objects().mapped_buffers, before + 2);
        drop(one);
        assert_eq!(live_objects().mapped_buffers, before + 1);
        drop(two);
        assert_eq!(live_objects().mapped_buffers, before);
    }

    #[test]
    fn errors_of_a_capture_carry_a_hint_and_others_do_not() {
        assert!(capture_hint(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED).is_some());
        assert!(capture_hint(CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT).is_some());
        assert!(capture_hint(CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD).is_none());
        assert!(capture_hint(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS).is_none());
    }
}
