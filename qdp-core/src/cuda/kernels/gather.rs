//! Launches of gather.cu: samples that lie side by side, to rows without gaps.

use super::{CommonArgs, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::DType;
use crate::error::Result;

/// `GATHER_THREADS` of gather.cu.
const THREADS: u32 = 256;
/// Samples of a tile, where there are as many: that many lanes read neighbouring values. More where
/// samples are so short that tiles would be wider than they are.
const TILE_BITS: u32 = 6;

/// Mirrors `qdp::GatherArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GatherArgs {
    common: CommonArgs,
    rows: u64,
    tile_bits: u32,
    unused: u32,
}

pub(super) struct Kernels {
    /// By the logarithm of the element's size.
    by_size: [Function; 5],
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let of_size = |size: u32| loader.function(&format!("qdp_gather_{size}"));
        Ok(Self { by_size: [of_size(1)?, of_size(2)?, of_size(4)?, of_size(8)?, of_size(16)?] })
    }

    /// Bytes of the rows; 0 where the input is as good to read as it lies.
    ///
    /// A row whose neighbours in memory belong to other rows costs a whole memory sector for each
    /// value, unless the caches hold it until the other rows are encoded, which above some size
    /// they do not: read as they lie, batches took up to 3.5 times as long as dense ones (H200).
    pub(super) fn bytes(args: &CommonArgs, dtype: DType) -> usize {
        let side_by_side = args.batch > 1
            && args.features > 1
            && args.row_stride != 0
            && args.row_stride.unsigned_abs() < args.col_stride.unsigned_abs();
        if side_by_side { args.batch as usize * args.features as usize * dtype.size() } else { 0 }
    }

    /// Enqueues the copy to `rows`; answers the arguments to read it with.
    ///
    /// # Safety
    ///
    /// As for [`super::Kernels::enqueue`], and `rows` has [`Kernels::bytes`] bytes.
    pub(super) unsafe fn enqueue(
        &self,
        common: CommonArgs,
        dtype: DType,
        rows: u64,
        stream: LaunchStream,
    ) -> Result<CommonArgs> {
        // `GATHER_TILE_BITS` of gather.cu.
        let (all_bits, usual) =
            if dtype.size() <= 8 { (12, TILE_BITS) } else { (10, TILE_BITS - 1) };
        let short = all_bits - common.features.next_power_of_two().ilog2().min(all_bits);
        let most = usual.max(short).min(THREADS.ilog2());
        let tile_bits = common.batch.next_power_of_two().ilog2().min(most);
        let width = 1 << (all_bits - tile_bits);
        let blocks = common.batch.div_ceil(1 << tile_bits) * common.features.div_ceil(width);
        let shape = Shape { blocks, threads: THREADS, ..Shape::default() };
        let args = GatherArgs { common, rows, tile_bits, unused: 0 };
        let kernel = &self.by_size[dtype.size().ilog2() as usize];
        // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
        unsafe { shape.launch(kernel, &args, stream)? };
        let row_stride = common.features as i64;
        Ok(CommonArgs { input: rows, row_stride, col_stride: 1, ..common })
    }
}
