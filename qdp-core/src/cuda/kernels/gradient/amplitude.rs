//! Launches of `amplitude_gradient.cu`.

use super::super::amplitude::DTYPES;
use super::super::{LaunchStream, Loader, Shape};
use super::GradientArgs;
use crate::cuda::Function;
use crate::element::Precision;
use crate::error::Result;

// Measured on one H200: fractions of the rate of a kernel that only moves the same bytes (4.23 to
// 4.29 TB/s), 512 MiB of cotangent.
//
// | | n = 4 | 6 | 8 to 12 | 13 | 14 | 15 | 16 | 17 | 18 | 19 | 20 | 22 |
// |---|---|---|---|---|---|---|---|---|---|---|---|---|
// | float16, complex64 | 0.23 | 0.81 | 0.99 | 1.00 | 0.91 | 0.88 | 0.77 | 0.70 | 0.70 | 0.71 | 0.68 | 0.49 |
// | float32, complex64 | 0.31 | 1.01 | 1.01 | 1.00 | 0.94 | 0.93 | 0.90 | 0.75 | 0.75 | 0.72 | 0.67 | 0.53 |
// | complex64 | 0.31 | 0.82 | 1.01 | 1.00 | 0.85 | 0.82 | 0.73 | 0.74 | 0.72 | 0.68 | 0.66 | 0.59 |
// | float64, complex128 | 0.80 | 1.01 | 1.01 | 0.97 | 0.97 | 0.93 | 0.77 | 0.75 | 0.72 | 0.66 | 0.59 | 0.53 |
// | complex128 | 0.78 | 1.00 | 1.01 | 0.93 | 0.89 | 0.89 | 0.80 | 0.79 | 0.74 | 0.68 | 0.59 | 0.58 |
//
// Up to n = 13 in complex64 and 12 in complex128 rows are short; up to 16 and 15 they have clusters,
// without which they would reach 0.67 to 0.80. Longer ones are read twice, the second time from the
// L2 cache, whose bandwidth is the limit, and beyond 32 MiB or so from memory.

/// `MAX_UNITS` of amplitude.cuh: units of 16 bytes of the cotangent that a thread takes of a row.
const UNITS: u64 = 8;
/// `MAX_GRADIENT_GROUP` of `amplitude_gradient.cu`: the most threads that share a short row.
const MAX_GROUP: u64 = 512;
/// Blocks that share a row of medium length at most: clusters of more are not portable.
const MAX_CLUSTER: u64 = 8;
/// Threads of a block of a cluster, where as many blocks as may be suffice, else [`MAX_GROUP`].
const CLUSTER_THREADS: u64 = 256;
/// Threads that share a short row at least, where it has so many units: lines stay whole.
const MIN_GROUP: u64 = 8;
/// Threads of a block of short rows, at least.
const SHORT_THREADS: u64 = 64;
/// `GRADIENT_THREADS` of `amplitude_gradient.cu`: threads of a chunk of a long row.
const LONG_THREADS: u64 = 256;
/// How far behind the end of its row the gradient of a long row is written, in bytes of features and
/// cotangent and in chunks: where it is too near blocks wait for sums, where it is too far the L2
/// cache has lost the row.
const SLACK_BYTES: u64 = 8 << 20;
const MAX_SLACK: u64 = 1024;
/// Size of the slots of a chunk or row: its two sums.
const SLOTS_BYTES: u64 = 16;

/// Mirrors `qdp::AmplitudeGradientArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AmplitudeGradientArgs {
    gradient: GradientArgs,
    group: u32,
    total_lag: u32,
    write_lag: u64,
    chunks: u64,
    sums: u64,
    totals: u64,
}

struct OfDType {
    short: [Function; 2],
    cluster: [Function; 2],
    long: [Function; 2],
}

pub(super) struct Kernels {
    /// By element type; `None` for integers.
    by_dtype: Vec<Option<OfDType>>,
    clear: Function,
    /// Whether the device has clusters.
    clusters: bool,
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let by_dtype = DTYPES.iter().map(|(dtype, name)| {
            if dtype.is_integer() {
                return Ok(None);
            }
            let of = |path| loader.by_precision(&format!("qdp_amplitude_gradient_{path}_{name}"));
            Ok(Some(OfDType { short: of("short")?, cluster: of("cluster")?, long: of("long")? }))
        });
        Ok(Self {
            by_dtype: by_dtype.collect::<Result<_>>()?,
            clear: loader.function("qdp_amplitude_gradient_clear")?,
            clusters: loader.is_hopper()?,
        })
    }

    /// For the sums of long rows.
    pub(super) fn workspace_bytes(&self, precision: Precision, args: &GradientArgs) -> usize {
        match Path::of(precision, args.common.features, self.clusters) {
            Path::Short { .. } | Path::Cluster { .. } => 0,
            Path::Long { chunks } => (args.common.batch * (chunks + 1) * SLOTS_BYTES) as usize,
        }
    }

    /// # Safety
    ///
    /// As for [`super::super::Kernels::enqueue_gradient`].
    pub(super) unsafe fn enqueue(
        &self,
        precision: Precision,
        gradient: GradientArgs,
        workspace: u64,
        stream: LaunchStream,
    ) -> Result<()> {
        let common = &gradient.common;
        let Some(kernels) = &self.by_dtype[common.dtype as usize] else {
            return Err(crate::gradient::no_gradient_by(DTYPES[common.dtype as usize].0));
        };
        let (batch, features) = (common.batch, common.features);
        let args = AmplitudeGradientArgs {
            gradient,
            group: 0,
            total_lag: 0,
            write_lag: 0,
            chunks: 0,
            sums: 0,
            totals: 0,
        };
        let shape =
            |blocks, threads: u64| Shape { blocks, threads: threads as u32, ..Shape::default() };
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter. The workspace
        // holds slots for each chunk and row, and is cleared in the order of the stream.
        unsafe {
            match Path::of(precision, features, self.clusters) {
                Path::Short { group } => {
                    let args = AmplitudeGradientArgs { group: group as u32, ..args };
                    let threads = group.max(SHORT_THREADS);
                    let blocks = (batch * group).div_ceil(threads);
                    let kernel = &kernels.short[precision as usize];
                    shape(blocks, threads).launch(kernel, &args, stream)
                }
                Path::Cluster { blocks, threads } => {
                    let kernel = &kernels.cluster[precision as usize];
                    let shape = shape(batch * blocks, threads);
                    shape.launch_in_clusters(blocks as u32, kernel, &args, stream)
                }
                Path::Long { chunks } => {
                    let (all, slack) = (batch * chunks, slack(precision, common.dtype));
                    let args = AmplitudeGradientArgs {
                        total_lag: (slack / 2) as u32,
                        write_lag: chunks + slack,
                        chunks,
                        sums: workspace,
                        totals: workspace + all * SLOTS_BYTES,
                        ..args
                    };
                    let slots = 2 * (all + batch);
                    let blocks = slots.div_ceil(LONG_THREADS);
                    shape(blocks, LONG_THREADS).launch(&self.clear, &args, stream)?;
                    let kernel = &kernels.long[precision as usize];
                    shape(all + args.write_lag, LONG_THREADS).launch(kernel, &args, stream)
                }
            }
        }
    }
}

/// Features of a chunk of a long row.
fn chunk(precision: Precision) -> u64 {
    LONG_THREADS * UNITS * 16 / precision.size() as u64
}

/// How many chunks behind the end of its row the gradient of a long row is written.
fn slack(precision: Precision, dtype: u32) -> u64 {
    let both = DTYPES[dtype as usize].0.size() + precision.size();
    (SLACK_BYTES / (chunk(precision) * both as u64)).min(MAX_SLACK)
}

/// Which kernel writes rows, and how they are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// So many threads share a row.
    Short { group: u64 },
    /// So many blocks do, of so many threads.
    Cluster { blocks: u64, threads: u64 },
    /// A row is cut into so many chunks.
    Long { chunks: u64 },
}

impl Path {
    fn of(precision: Precision, features: u64, clusters: bool) -> Self {
        let units = (features * precision.size() as u64).div_ceil(16);
        let group = units.div_ceil(UNITS).max(units.min(MIN_GROUP)).next_power_of_two();
        if group <= MAX_GROUP {
            Self::Short { group }
        } else if clusters && group <= MAX_GROUP * MAX_CLUSTER {
            let few = group / CLUSTER_THREADS <= MAX_CLUSTER;
            let threads = if few { CLUSTER_THREADS } else { MAX_GROUP };
            Self::Cluster { blocks: group / threads, threads }
        } else {
            Self::Long { chunks: features.div_ceil(chunk(precision)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the number of features, threads and chunks have room for all and none is idle but
    /// for rounding to a power of two.
    #[test]
    fn rows_are_covered() {
        for precision in [Precision::Complex64, Precision::Complex128] {
            let of_thread = UNITS * 16 / precision.size() as u64;
            for features in (1..300).chain([1023, 4096, 8191, 8192, 8193, 1 << 20, (1 << 24) + 1]) {
                assert!(!matches!(Path::of(precision, features, false), Path::Cluster { .. }));
                match Path::of(precision, features, true) {
                    Path::Short { group } => {
                        assert!(group.is_power_of_two() && group <= MAX_GROUP, "{features}");
                        assert!(group * of_thread >= features, "{features}");
                        assert!(group <= MIN_GROUP || group * of_thread < 2 * features);
                    }
                    Path::Cluster { blocks, threads } => {
                        assert!((2..=MAX_CLUSTER).contains(&blocks), "{features}");
                        assert!(threads <= MAX_GROUP && threads.is_multiple_of(32));
                        assert!(blocks * threads * of_thread >= features, "{features}");
                        assert!(blocks * threads * of_thread < 2 * features + of_thread);
                    }
                    Path::Long { chunks } => {
                        assert!(chunks * chunk(precision) >= features, "{features}");
                        assert!((chunks - 1) * chunk(precision) < features, "{features}");
                    }
                }
            }
        }
    }
}
