//! The CUDA side: every driver call and every `unsafe` of it.
//!
//! Who owns what. [`Context`] retains the device's primary context, the one that torch and every
//! CUDA runtime library use, so pointers, streams and events pass between them as they are. Each
//! object below it ([`Stream`], [`Event`], [`Pool`], [`PinnedBuffer`], [`MappedBuffer`],
//! [`Module`]) owns one driver object, is valid from construction to drop, and holds its parent
//! by `Arc`, so parents outlive children whatever the drop order ([`Executable`] owns its [`Graph`],
//! and goes first). A [`RawStream`] owns nothing:
//! it names a stream of somebody else's, and making one is `unsafe`.
//!
//! What may be in flight. Device work is enqueued and not awaited. A [`DeviceBuffer`] may be
//! dropped while streams still use it: the drop enqueues the free behind its home stream and
//! behind every stream named with [`DeviceBuffer::used_on`]. Where one of these is being
//! captured, no ordering with it can be expressed, and the buffer is parked until the capture is
//! over. Host memory has no such protection, so the calls that leave the device reading or
//! writing host memory after they return are `unsafe`. Safe calls can at worst let kernels see
//! stale device memory, never corrupt the host.
//!
//! Threads and captures. Every call makes its context current and puts the caller's context
//! back afterwards: torch's current device is the thread's current context, and it must not
//! change under the caller. Calls that the driver forbids while any stream of the process is
//! being captured run under [`CaptureGuard`], as they touch no captured stream. Nothing here
//! computes on the legacy default stream.
//!
//! Failures. `Drop` never panics: it records the failure in the context, where
//! [`Context::take_drop_failure`] finds it at the next call. Once [`begin_shutdown`] was called
//! (at process exit) destructors leave the driver alone. Every driver call passes one gate, where
//! a test build (the feature `fault-injection`) can make any one of them fail.

mod backend;
mod backward;
mod board;
mod context;
mod driver;
mod event;
#[cfg(feature = "fault-injection")]
pub mod faults;
mod gate;
mod graph;
mod host;
mod kernels;
mod lanes;
mod launch;
mod memory;
mod module;
mod pinned;
mod pool;
mod register;
mod release;
mod replay;
mod states;
mod stream;
mod timeline;

pub(crate) use backend::CudaBackend;
pub use backend::{Encoded, PreparedPlan, devices};
pub use board::Ticket;
pub use context::{BoundContext, Context};
pub use driver::{
    CaptureGuard, Driver, LiveObjects, REQUIRED_VERSION, begin_shutdown, live_objects, probe,
};
pub use event::Event;
pub use graph::{Executable, Graph, Updated};
pub(crate) use host::Reading;
pub use launch::{Dim3, LaunchOptions, launch, launch_with};
pub use memory::DeviceBuffer;
pub use module::{Function, Module};
pub use pinned::{MappedBuffer, PinnedBuffer};
pub use pool::{DEFAULT_RELEASE_FRACTION, Pool};
pub use register::{PageLocked, RegisteredMemory};
pub(crate) use replay::{Replayed, Replayer};
pub(crate) use states::DeviceStates;
pub use stream::{Priority, RawStream, Stream};

/// A CUDA device, as the driver describes it without opening it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSummary {
    /// Its number.
    pub ordinal: u32,
    /// Its product name.
    pub name: String,
    /// Its compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// Its memory in bytes.
    pub total_memory: u64,
}
