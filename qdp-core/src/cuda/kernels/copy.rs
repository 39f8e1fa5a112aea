//! Launches of copy.cu.

use super::{LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::error::Result;

const THREADS: u32 = 256;
/// Size of what a thread copies.
const UNIT: u64 = 16;

/// Mirrors `qdp::CopyArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct CopyArgs {
    from: u64,
    to: u64,
    bytes: u64,
}

pub(super) struct Kernels {
    copy: Function,
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        Ok(Self { copy: loader.function("qdp_copy")? })
    }

    /// # Safety
    ///
    /// Both addresses, multiples of 16, must be valid on the device for so many bytes, in the order
    /// of `stream`.
    pub(super) unsafe fn enqueue(
        &self,
        from: u64,
        to: u64,
        bytes: u64,
        stream: LaunchStream,
    ) -> Result<()> {
        debug_assert!((from | to).is_multiple_of(UNIT));
        let blocks = bytes.div_ceil(UNIT).div_ceil(u64::from(THREADS)).max(1);
        let shape = Shape { blocks, threads: THREADS, ..Shape::default() };
        // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
        unsafe { shape.launch(&self.copy, &CopyArgs { from, to, bytes }, stream) }
    }
}
