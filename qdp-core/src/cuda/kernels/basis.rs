//! Launches of basis.cu.

use super::{CommonArgs, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::Precision;
use crate::error::Result;

/// Amplitudes of a block.
const CHUNK: u64 = 1 << 12;

/// Mirrors `qdp::BasisArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct BasisArgs {
    common: CommonArgs,
    chunk: u64,
}

pub(super) struct Kernels {
    basis: [Function; 2],
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        Ok(Self { basis: loader.by_precision("qdp_basis")? })
    }

    /// # Safety
    ///
    /// As for [`super::Kernels::enqueue`].
    pub(super) unsafe fn enqueue(
        &self,
        precision: Precision,
        common: CommonArgs,
        stream: LaunchStream,
    ) -> Result<()> {
        let chunk = common.dim().min(CHUNK);
        let args = BasisArgs { common, chunk };
        let blocks = common.batch * (common.dim() / chunk);
        let threads = (chunk / 4).clamp(32, 256) as u32;
        let shape = Shape { blocks, threads, ..Shape::default() };
        // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
        unsafe { shape.launch(&self.basis[precision as usize], &args, stream) }
    }
}
