//! Launches of `amplitude_split.cu`: one long sample that arrives in chunks.

use super::{CommonArgs, LaunchStream, Loader, Shape, amplitude};
use crate::cuda::Function;
use crate::element::Precision;
use crate::error::{Error, Result};

/// `SPLIT_PART` of `amplitude_split.cu`: features whose squares are summed together, by one block.
/// Chunks of a sample are made of whole parts, so that its norm does not depend on how it was cut.
pub(in crate::cuda) const SPLIT_PART: usize = 4096;
/// `SPLIT_THREADS` of `amplitude_split.cu`.
const THREADS: u32 = 256;
/// `SPLIT_NORM_THREADS` of `amplitude_split.cu`.
const NORM_THREADS: u32 = 1024;
/// A double: the inverse of the norm, and each part's sum.
const SUM_BYTES: usize = size_of::<f64>();

/// Where a chunk belongs.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Chunk {
    /// Index of the sample in the batch: what a report names.
    pub(in crate::cuda) sample: usize,
    /// Features of the whole sample.
    pub(in crate::cuda) features: usize,
    /// The chunk's first feature: a multiple of [`SPLIT_PART`].
    pub(in crate::cuda) first: usize,
}

impl Chunk {
    /// Whether `count` features from `first` are whole parts, up to the end of the sample.
    fn is_whole(self, count: u64) -> bool {
        let (first, features, part) = (self.first as u64, self.features as u64, SPLIT_PART as u64);
        first.is_multiple_of(part)
            && first
                .checked_add(count)
                .is_some_and(|end| end == features || end < features && end.is_multiple_of(part))
    }
}

/// Mirrors `qdp::SplitArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct SplitArgs {
    common: CommonArgs,
    sample: u64,
    first: u64,
    count: u64,
    inverse: u64,
    sums: u64,
}

impl SplitArgs {
    fn new(common: CommonArgs, chunk: Chunk, workspace: u64) -> Self {
        Self {
            common: CommonArgs { features: chunk.features as u64, ..common },
            sample: chunk.sample as u64,
            first: chunk.first as u64,
            count: common.features,
            inverse: workspace,
            sums: workspace + SUM_BYTES as u64,
        }
    }
}

pub(super) struct Kernels {
    /// By element type.
    spread: Vec<[Function; 2]>,
    norm: Function,
    scale: [Function; 2],
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let spread = |(_, name)| loader.by_precision(&format!("qdp_amplitude_spread_{name}"));
        Ok(Self {
            spread: amplitude::DTYPES.into_iter().map(spread).collect::<Result<_>>()?,
            norm: loader.function("qdp_amplitude_norm")?,
            scale: loader.by_precision("qdp_amplitude_scale")?,
        })
    }
}

impl super::Kernels {
    /// Bytes of device memory that a sample of so many features needs beside its chunks, from its
    /// first chunk until it is scaled.
    pub(in crate::cuda) fn split_workspace_bytes(features: usize) -> usize {
        (1 + features.div_ceil(SPLIT_PART)) * SUM_BYTES
    }

    /// Enqueues what is done as soon as a chunk is there: it is written to its place in the result,
    /// not scaled yet, and its sums of squares to the workspace. A value that is not finite is
    /// reported at its position in the sample.
    ///
    /// `args` describe the chunk as a batch of one sample, and the result's row. A result narrower
    /// than the chunk's element type must have room for its values.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where the chunk is not made of whole parts, [`Error::Driver`].
    ///
    /// # Safety
    ///
    /// In the order of `stream`, the chunk must be readable, and writable the row of the result
    /// (all of its 2^n amplitudes), record and flags, and at `workspace`
    /// [`Kernels::split_workspace_bytes`](super::Kernels::split_workspace_bytes).
    pub(in crate::cuda) unsafe fn enqueue_spread(
        &self,
        precision: Precision,
        args: CommonArgs,
        chunk: Chunk,
        workspace: u64,
        stream: LaunchStream,
    ) -> Result<()> {
        if !chunk.is_whole(args.features) {
            let expected = format!("whole parts of {SPLIT_PART} features");
            let got = format_args!("{} features in {chunk:?}", args.features);
            return Err(Error::invalid("chunk", expected, got));
        }
        let blocks = args.features.div_ceil(SPLIT_PART as u64);
        let kernel = &self.split.spread[args.dtype as usize][precision as usize];
        let args = SplitArgs::new(args, chunk, workspace);
        // SAFETY: the caller's promise; the arguments mirror the kernel's parameter. As checked,
        // the chunk's parts lie in the row and have sums of their own in the workspace.
        unsafe { Shape { blocks, threads: THREADS, shared: 0 }.launch(kernel, &args, stream) }
    }

    /// Enqueues what is done once every chunk was spread: the sums are added up, and the row is
    /// scaled in place, with zeros behind the sample. A sum that is no norm is reported for the
    /// sample as a whole, unless one of its values was, and the row becomes NaN.
    ///
    /// `args` and `chunk` are those of any chunk: the input is not looked at.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Safety
    ///
    /// As for [`Kernels::enqueue_spread`](super::Kernels::enqueue_spread), less the chunk; every
    /// chunk of the sample was spread before, with this row and workspace, in the order of `stream`.
    pub(in crate::cuda) unsafe fn enqueue_scale(
        &self,
        precision: Precision,
        args: CommonArgs,
        chunk: Chunk,
        workspace: u64,
        stream: LaunchStream,
    ) -> Result<()> {
        let blocks = args.dim().div_ceil(SPLIT_PART as u64);
        let kernel = &self.split.scale[precision as usize];
        let args = SplitArgs::new(args, chunk, workspace);
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter.
        unsafe {
            let norm = Shape { blocks: 1, threads: NORM_THREADS, shared: 0 };
            norm.launch(&self.split.norm, &args, stream)?;
            Shape { blocks, threads: THREADS, shared: 0 }.launch(kernel, &args, stream)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_parts_up_to_the_end_of_the_sample() {
        let chunk = |first| Chunk { sample: 0, features: 10_000, first };
        assert!(chunk(0).is_whole(10_000) && chunk(0).is_whole(4096) && chunk(4096).is_whole(5904));
        assert!(!chunk(0).is_whole(4095), "another chunk would write to its last part");
        assert!(!chunk(1).is_whole(9999), "and to its first");
        assert!(!chunk(8192).is_whole(4096) && !chunk(8192).is_whole(u64::MAX), "beyond the end");
    }

    #[test]
    fn every_part_has_a_sum() {
        let bytes = super::super::Kernels::split_workspace_bytes;
        assert_eq!([bytes(1), bytes(4096), bytes(4097)], [16, 16, 24]);
    }
}
