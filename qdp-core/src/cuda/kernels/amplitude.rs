//! Launches of amplitude.cu.

use super::{CommonArgs, LaunchStream, Loader, Shape, Workspace};
use crate::cuda::Function;
use crate::element::{DType, Precision};
use crate::error::Result;

// How rows are cut. Measured on one H200 on 2026-11-21, for real input of 2, 4 and 8 bytes, as
// fractions of the best kernel that only moves as many bytes, output 256 MiB (and 1 GiB).

/// `MAX_UNITS` of amplitude.cu: stores of 16 bytes that a thread makes for a row. 8: 0.96 to 0.99
/// for short rows; 4: 0.80 to 0.99, the less the longer the row. At batch 64 and n = 10, 8 takes
/// 2.2 us, 4 takes 2.4.
const UNITS: u64 = 8;
/// `MAX_GROUP` of amplitude.cu: the most threads that share a short row. The last short row (n =
/// 13 in complex64, 12 in complex128) reaches 0.96, as a long one 0.85 to 0.90.
const MAX_GROUP: u64 = 512;
/// `LONG_THREADS` of amplitude.cu: threads of a chunk of a long row. 256: 0.87 to 0.91 (0.90 to
/// 0.94) for n = 14 to 18; 512: 0.84 to 0.92, 128: 0.85 for float32.
const LONG_THREADS: u64 = 256;
/// How many chunks behind the end of its row a long row is scaled. With 0 blocks wait (0.75), with
/// 528 the L2 cache has lost the row (0.82); 132 and 264 differ by 0.02, to either side by type.
const SLACK: u64 = 192;
/// Threads that share a short row at least, where it has so many units: lines stay whole.
const MIN_GROUP: u64 = 8;
/// Threads of a block of short rows, at least. 64, 128 and 256 differ by 0.01.
const SHORT_THREADS: u64 = 128;
/// Size of `qdp::Slot`.
const SLOT_BYTES: u64 = 8;

/// In the order of [`DType`], by which they are indexed.
const DTYPES: [(DType, &str); 14] = [
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
        Ok(Self { by_dtype })
    }

    /// For the sums of long rows.
    #[expect(clippy::unused_self, reason = "thresholds may depend on the device")]
    pub(super) fn workspace(&self, precision: Precision, args: &CommonArgs) -> Workspace {
        match Path::of(precision, args) {
            Path::Short { .. } => Workspace::default(),
            Path::Long { chunks } => {
                let bytes = args.batch as usize * (chunks as usize + 1) * SLOT_BYTES as usize;
                Workspace { bytes, zeroed: bytes }
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
        let (kernel, blocks, threads, args) = match Path::of(precision, &common) {
            Path::Short { group } => {
                let threads = group.max(SHORT_THREADS);
                let blocks = (common.batch * group).div_ceil(threads);
                let args = AmplitudeArgs { group: group as u32, ..args };
                (&kernels.short, blocks, threads, args)
            }
            Path::Long { chunks } => {
                let all = common.batch * chunks;
                let args = AmplitudeArgs {
                    total_lag: SLACK as u32 / 2,
                    scale_lag: chunks + SLACK,
                    sums: workspace,
                    totals: workspace + all * SLOT_BYTES,
                    ..args
                };
                (&kernels.long, all + args.scale_lag, LONG_THREADS, args)
            }
        };
        let shape = Shape { blocks, threads: threads as u32, ..Shape::default() };
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter.
        unsafe { shape.launch(&kernel[precision as usize], &args, stream) }
    }
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
            Self::Long { chunks: units / (LONG_THREADS * UNITS) }
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
