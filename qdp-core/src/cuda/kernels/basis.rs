//! Launches of basis.cu.

use super::tile::Tile;
use super::{CommonArgs, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::Precision;
use crate::error::Result;

/// Bytes that a block writes.
///
/// Fractions of the write-only rate on one H200, 1 GiB of output, 128 threads to a block:
///
/// | bytes | n = 4 | 6 | 8 | 10 | 12 | 16 | 24 |
/// |---|---|---|---|---|---|---|---|
/// | complex64: 8 KiB | 0.81 | 0.87 | 0.93 | 0.98 | 0.99 | 0.99 | 1.00 |
/// | 16 KiB | 0.80 | 0.88 | 0.92 | 0.96 | 0.98 | 0.98 | 0.98 |
/// | 64 KiB (256 threads) | 0.78 | 0.87 | 0.93 | 0.94 | 0.95 | 0.96 | 0.96 |
/// | complex128: 8 KiB | 0.83 | 0.90 | 0.97 | 0.99 | 0.99 | 0.99 | 1.00 |
/// | 16 KiB | 0.82 | 0.91 | 0.94 | 0.97 | 0.98 | 0.98 | 0.98 |
const BLOCK_BYTES: u64 = 8 << 10;

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
        let Tile { args, blocks, threads } = Tile::new(common, precision, BLOCK_BYTES);
        let shared = args.rows * size_of::<u64>() as u32;
        let shape = Shape { blocks, threads, shared };
        // SAFETY: the caller's promise; the arguments are the kernel's parameter.
        unsafe { shape.launch(&self.basis[precision as usize], &args, stream) }
    }
}
