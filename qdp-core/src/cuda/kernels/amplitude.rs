//! Launches of amplitude.cu.

use super::{CommonArgs, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::{DType, Precision};
use crate::error::Result;

// How rows are cut. Measured on one H200 on 2026-11-21 for float16, float32 and float64 to
// complex64 and float64 to complex128: fractions of the best kernel that only moves as many bytes,
// output 256 MiB.

/// `MAX_UNITS` of amplitude.cuh: stores of 16 bytes that a thread makes for a row. Short rows reach
/// 0.96 to 0.99 with 8, and 0.80 to 0.99 with 4, the less the longer the row.
const UNITS: u64 = 8;
/// `MAX_GROUP` of amplitude.cu: the most threads that share a short row. The longest short row
/// (n = 13 in complex64, 12 in complex128) reaches 0.96, as a long one 0.88 to 0.98.
const MAX_GROUP: u64 = 512;
/// Threads that share a short row at least, where it has so many units: lines stay whole.
const MIN_GROUP: u64 = 8;
/// Threads of a block of short rows, at least. Batch 64 at n = 10 takes 2.0 us with 64, 2.2 with
/// 128 and 2.6 with 256; large batches differ by 0.01.
const SHORT_THREADS: u64 = 64;
/// `LONG_THREADS` of amplitude.cu: threads of a chunk of a long row. 256 is the best of 128, 256
/// and 512 for float32 to complex64 by 0.04; 512 is the better for rows beyond the L2 cache.
const LONG_THREADS: u64 = 256;
/// How far behind the end of its row a long row is scaled, in bytes of the input and in chunks:
/// where it is too near blocks wait for sums, where it is too far the L2 cache has lost the row.
/// For n = 14 to 18, 4 MiB give 0.87 to 0.89 (float64 to complex64), 0.93 (to complex128), 0.95
/// (float32) and 0.98 (float16), 6 MiB differ by 0.01, 1 MiB cost 0.08. Rows of 8 MiB and more
/// outgrow the cache whatever the lag: 0.88 at that size, 0.7 where all is read twice.
const SLACK_BYTES: u64 = 4 << 20;
const MAX_SLACK: u64 = 384;
/// Size of `qdp::Slot`.
const SLOT_BYTES: u64 = 8;

/// In the order of [`DType`], by which they are indexed.
pub(super) const DTYPES: [(DType, &str); 14] = [
    (DType::U8, "u8"),
    (DType::U16, "u16"),
    (DType::U32, "u32"),
    (DType::U64, "u64"),
    (DType::I8, "i8"),
    (DType::I16, "i16"),
    (DType::I32, "i32"),
    (DType::I64, "i64"),
    (DType::F16, "f16"),
    (DType::BF16, "bf16"),
    (DType::F32, "f32"),
    (DType::F64, "f64"),
    (DType::C64, "c64"),
    (DType::C128, "c128"),
];

/// Mirrors `qdp::AmplitudeArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AmplitudeArgs {
    common: CommonArgs,
    group: u32,
    total_lag: u32,
    scale_lag: u64,
    sums: u64,
    totals: u64,
}

struct OfDType {
    short: [Function; 2],
    long: [Function; 2],
}

pub(super) struct Kernels {
    by_dtype: Vec<OfDType>,
    clear: Function,
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let by_dtype = DTYPES
            .iter()
            .map(|(_, dtype)| {
                Ok(OfDType {
                    short: loader.by_precision(&format!("qdp_amplitude_short_{dtype}"))?,
                    long: loader.by_precision(&format!("qdp_amplitude_long_{dtype}"))?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { by_dtype, clear: loader.function("qdp_amplitude_clear")? })
    }

    /// For the sums of long rows.
    pub(super) fn workspace_bytes(precision: Precision, args: &CommonArgs) -> usize {
        match Path::of(precision, args) {
            Path::Short { .. } => 0,
            Path::Long { chunks } => {
                let slots = args.batch * (chunks + 1);
                (slots * SLOT_BYTES) as usize
            }
        }
    }

    /// # Safety
    ///
    /// As for [`super::Kernels::enqueue`].
    pub(super) unsafe fn enqueue(
        &self,
        precision: Precision,
        common: CommonArgs,
        workspace: u64,
        stream: LaunchStream,
    ) -> Result<()> {
        let kernels = &self.by_dtype[common.dtype as usize];
        let args =
            AmplitudeArgs { common, group: 0, total_lag: 0, scale_lag: 0, sums: 0, totals: 0 };
        let shape =
            |blocks, threads: u64| Shape { blocks, threads: threads as u32, ..Shape::default() };
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter. The workspace
        // holds a slot for each chunk and row, and is cleared in the order of the stream.
        unsafe {
            match Path::of(precision, &common) {
                Path::Short { group } => {
                    let args = AmplitudeArgs { group: group as u32, ..args };
                    let threads = group.max(SHORT_THREADS);
                    let blocks = (common.batch * group).div_ceil(threads);
                    let kernel = &kernels.short[precision as usize];
                    shape(blocks, threads).launch(kernel, &args, stream)
                }
                Path::Long { chunks } => {
                    let (all, slack) = (common.batch * chunks, slack(precision, &common));
                    let args = AmplitudeArgs {
                        total_lag: (slack / 2) as u32,
                        scale_lag: chunks + slack,
                        sums: workspace,
                        totals: workspace + all * SLOT_BYTES,
                        ..args
                    };
                    let slots = all + common.batch;
                    shape(slots.div_ceil(LONG_THREADS), LONG_THREADS).launch(
                        &self.clear,
                        &args,
                        stream,
                    )?;
                    let kernel = &kernels.long[precision as usize];
                    shape(all + args.scale_lag, LONG_THREADS).launch(kernel, &args, stream)
                }
            }
        }
    }
}

/// Amplitudes of a chunk of a long row.
fn chunk(precision: Precision) -> u64 {
    LONG_THREADS * UNITS * 16 / precision.size() as u64
}

/// How many chunks behind the end of its row a long row is scaled.
fn slack(precision: Precision, args: &CommonArgs) -> u64 {
    let bytes = chunk(precision) * DTYPES[args.dtype as usize].0.size() as u64;
    (SLACK_BYTES / bytes).min(MAX_SLACK)
}

/// Which kernel encodes rows, and how they are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Short { group: u64 },
    Long { chunks: u64 },
}

impl Path {
    fn of(precision: Precision, args: &CommonArgs) -> Self {
        let units = (args.dim() * precision.size() as u64).div_ceil(16);
        let group = (units / UNITS).max(units.min(MIN_GROUP));
        if group <= MAX_GROUP {
            Self::Short { group }
        } else {
            Self::Long { chunks: args.dim() / chunk(precision) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Input;

    #[test]
    fn kernels_are_found_by_element_type() {
        for (index, (dtype, _)) in DTYPES.iter().enumerate() {
            assert_eq!(*dtype as usize, index);
        }
    }

    /// Short rows: a thread has at most [`UNITS`] units and groups fill blocks. Long rows: chunks
    /// are of one size and cover the row.
    #[test]
    fn rows_are_cut_evenly() {
        for n in 1..=40 {
            for precision in [Precision::Complex64, Precision::Complex128] {
                let common = CommonArgs::new(&Input::sample(&[1.0]), (0, 0), (0, 0, 0), n);
                let units = (common.dim() * precision.size() as u64).div_ceil(16);
                match Path::of(precision, &common) {
                    Path::Short { group } => {
                        assert!(group.is_power_of_two() && group <= MAX_GROUP, "{n}");
                        assert!(group * UNITS >= units && group <= units, "{n}");
                    }
                    Path::Long { chunks } => {
                        assert!(chunks.is_power_of_two(), "{n}");
                        assert_eq!(chunks * LONG_THREADS * UNITS, units, "{n}");
                    }
                }
            }
        }
    }
}
