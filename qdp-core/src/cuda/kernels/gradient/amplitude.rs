//! Launches of `amplitude_gradient.cu` and `amplitude_ring.cu`.

use super::super::amplitude::DTYPES;
use super::super::{LaunchStream, Loader, Shape};
use super::GradientArgs;
use crate::cuda::{Function, LaunchOptions};
use crate::element::Precision;
use crate::error::{Error, Result};

// Measured on one H200: fractions of the rate of a kernel that only moves the same bytes (4.2 to
// 4.3 TB/s), 512 MiB of cotangent.
//
// | | n = 4 | 6 | 8 to 12 | 13 | 14 | 15 | 16 | 17 | 18 | 19 | 20 | 22 |
// |---|---|---|---|---|---|---|---|---|---|---|---|---|
// | float16, complex64 | 0.23 | 0.81 | 0.99 | 1.00 | 0.89 | 0.87 | 0.84 | 0.78 | 0.78 | 0.76 | 0.77 | 0.50 |
// | float32, complex64 | 0.31 | 1.01 | 1.01 | 1.00 | 0.92 | 0.92 | 0.89 | 0.94 | 0.94 | 0.90 | 0.76 | 0.54 |
// | complex64 | 0.31 | 0.82 | 1.01 | 1.00 | 0.85 | 0.82 | 0.89 | 0.96 | 0.93 | 0.84 | 0.66 | 0.58 |
// | float64, complex128 | 0.80 | 1.01 | 1.01 | 0.97 | 0.96 | 0.91 | 0.96 | 0.95 | 0.92 | 0.71 | 0.61 | 0.53 |
// | complex128 | 0.78 | 1.00 | 1.01 | 0.93 | 0.88 | 0.91 | 0.96 | 0.94 | 0.85 | 0.68 | 0.58 | 0.58 |
//
// Up to n = 13 in complex64 and 12 in complex128 rows are short; up to 15 and 14 they have clusters,
// and beyond them rings, up to 20 for float16 and float32, 19 for float64 and complex64, 18 for
// complex128. A ring would do as well as a cluster where there is much to do, but takes 2 to 3 us
// more: its sums are cleared first. Rows that do not fit a ring, or are not aligned, are read twice,
// the second time from the L2 cache, whose bandwidth is the limit (0.66 to 0.80), and beyond 32 MiB
// or so from memory.

/// `MAX_UNITS` of amplitude.cuh: units of 16 bytes of the cotangent that a thread takes of a row.
const UNITS: u64 = 8;
/// `MAX_GRADIENT_GROUP` of `amplitude_gradient.cu`: the most threads that share a short row.
const MAX_GROUP: u64 = 512;
/// Blocks that share a row of medium length at most: clusters of more are not portable.
const MAX_CLUSTER: u64 = 8;
/// Threads of a block of a cluster.
const CLUSTER_THREADS: u64 = 256;
/// Threads that share a short row at least, where it has so many units: lines stay whole.
const MIN_GROUP: u64 = 8;
/// Threads of a block of short rows, at least.
const SHORT_THREADS: u64 = 64;
/// `GRADIENT_THREADS` of `amplitude_gradient.cu`: threads of a chunk of a long row.
const LONG_THREADS: u64 = 256;
/// `RING_BYTES` of `amplitude_ring.cu`: of the cotangent in a slot of a ring.
const RING_BYTES: u64 = 16384;
/// `MAX_RING_SLOTS` of `amplitude_ring.cu`.
const MAX_RING_SLOTS: u64 = 16;
/// `RING_THREADS` of `amplitude_ring.cu`.
const RING_THREADS: u64 = 544;
/// Slots that a block has for each chunk of a row: else too few are left for the next rows while
/// one waits for its sums, and reading twice is faster.
const SLOTS_OF_CHUNK: u64 = 2;
/// From so many chunks of a row in a block the ring's writers are one team, which is sooner done
/// with adding the row up: 0.76 instead of 0.64 for float32 at n = 20. Below, two are better, of
/// which one writes while the other waits: 0.94 instead of 0.68 at n = 17.
const ONE_TEAM_CHUNKS: u64 = 4;
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
    slots: u32,
    teams: u32,
    total_lag: u32,
    write_lag: u64,
    chunks: u64,
    sums: u64,
    totals: u64,
}

struct OfDType {
    short: [Function; 2],
    cluster: [Function; 2],
    ring: [Function; 2],
    long: [Function; 2],
}

/// What a device has for long rows.
#[derive(Debug, Clone, Copy)]
struct Device {
    /// Whether it has clusters, and copies to shared memory that barriers wait for.
    hopper: bool,
    multiprocessors: u64,
    /// Bytes of dynamic shared memory that a block of a ring can have.
    shared: u64,
}

pub(super) struct Kernels {
    /// By element type; `None` for integers.
    by_dtype: Vec<Option<OfDType>>,
    clear: Function,
    device: Device,
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let by_dtype = DTYPES.iter().map(|(dtype, name)| {
            if dtype.is_integer() {
                return Ok(None);
            }
            let of = |path| loader.by_precision(&format!("qdp_amplitude_gradient_{path}_{name}"));
            let (short, cluster) = (of("short")?, of("cluster")?);
            Ok(Some(OfDType { short, cluster, ring: of("ring")?, long: of("long")? }))
        });
        let by_dtype: Vec<Option<OfDType>> = by_dtype.collect::<Result<_>>()?;
        let mut shared = loader.context.max_shared_memory_per_block();
        let rings = || by_dtype.iter().flatten().flat_map(|kernels| &kernels.ring);
        for ring in rings() {
            let room = loader.context.max_shared_memory_per_block();
            shared = shared.min(room.saturating_sub(ring.static_shared_bytes()?));
        }
        for ring in rings() {
            ring.set_max_dynamic_shared(shared)?;
        }
        let device = Device {
            hopper: loader.is_hopper()?,
            multiprocessors: u64::from(loader.context.sm_count()),
            shared: u64::from(shared),
        };
        Ok(Self { by_dtype, clear: loader.function("qdp_amplitude_gradient_clear")?, device })
    }

    /// For the sums of long rows.
    pub(super) fn workspace_bytes(&self, precision: Precision, args: &GradientArgs) -> usize {
        match Path::of(precision, args, self.device) {
            Path::Short { .. } | Path::Cluster { .. } => 0,
            Path::Ring { chunks, .. } | Path::Long { chunks } => {
                (args.common.batch * (chunks + 1) * SLOTS_BYTES) as usize
            }
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
        let batch = common.batch;
        let args = AmplitudeGradientArgs {
            gradient,
            group: 0,
            slots: 0,
            teams: 0,
            total_lag: 0,
            write_lag: 0,
            chunks: 0,
            sums: 0,
            totals: 0,
        };
        let shape =
            |blocks, threads: u64| Shape { blocks, threads: threads as u32, ..Shape::default() };
        // Arguments for rows of so many chunks, and their slots, cleared.
        let with_sums = |chunks| {
            let totals = workspace + batch * chunks * SLOTS_BYTES;
            let args = AmplitudeGradientArgs { chunks, sums: workspace, totals, ..args };
            let blocks = (2 * batch * (chunks + 1)).div_ceil(LONG_THREADS);
            // SAFETY: the caller's promise; the workspace holds slots for each chunk and row.
            unsafe { shape(blocks, LONG_THREADS).launch(&self.clear, &args, stream) }?;
            Ok::<_, Error>(args)
        };
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter.
        unsafe {
            match Path::of(precision, &gradient, self.device) {
                Path::Short { group } => {
                    let args = AmplitudeGradientArgs { group: group as u32, ..args };
                    let threads = group.max(SHORT_THREADS);
                    let blocks = (batch * group).div_ceil(threads);
                    let kernel = &kernels.short[precision as usize];
                    shape(blocks, threads).launch(kernel, &args, stream)
                }
                Path::Cluster { blocks } => {
                    let kernel = &kernels.cluster[precision as usize];
                    let shape = shape(batch * blocks, CLUSTER_THREADS);
                    let cluster = blocks as u32;
                    let options = LaunchOptions { cluster, ..LaunchOptions::default() };
                    shape.launch_as(options, kernel, &args, stream)
                }
                Path::Ring { chunks, slots, teams, shared } => {
                    let (slots, teams) = (slots as u32, teams as u32);
                    let args = AmplitudeGradientArgs { slots, teams, ..with_sums(chunks)? };
                    let kernel = &kernels.ring[precision as usize];
                    let blocks = (batch * chunks).min(self.device.multiprocessors);
                    let shape = Shape { shared: shared as u32, ..shape(blocks, RING_THREADS) };
                    let options = LaunchOptions { cooperative: true, ..LaunchOptions::default() };
                    shape.launch_as(options, kernel, &args, stream)
                }
                Path::Long { chunks } => {
                    let slack = slack(precision, common.dtype);
                    let (total_lag, write_lag) = ((slack / 2) as u32, chunks + slack);
                    let args = AmplitudeGradientArgs { total_lag, write_lag, ..with_sums(chunks)? };
                    let kernel = &kernels.long[precision as usize];
                    let shape = shape(batch * chunks + write_lag, LONG_THREADS);
                    shape.launch(kernel, &args, stream)
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
    /// So many blocks do.
    Cluster { blocks: u64 },
    /// A row is cut into so many chunks. A block has so many slots for them, of so many bytes
    /// together, and so many teams that write.
    Ring { chunks: u64, slots: u64, teams: u64, shared: u64 },
    /// A row is cut into so many chunks.
    Long { chunks: u64 },
}

impl Path {
    /// The batch has no part in it: what is made of a row does not depend on it.
    fn of(precision: Precision, args: &GradientArgs, device: Device) -> Self {
        let features = args.common.features;
        let units = (features * precision.size() as u64).div_ceil(16);
        let group = units.div_ceil(UNITS).max(units.min(MIN_GROUP)).next_power_of_two();
        if group <= MAX_GROUP {
            Self::Short { group }
        } else if device.hopper && group <= CLUSTER_THREADS * MAX_CLUSTER {
            Self::Cluster { blocks: group / CLUSTER_THREADS }
        } else if let Some(ring) = Self::ring(precision, args, device) {
            ring
        } else {
            Self::Long { chunks: features.div_ceil(chunk(precision)) }
        }
    }

    fn ring(precision: Precision, args: &GradientArgs, device: Device) -> Option<Self> {
        let GradientArgs { common, cotangent } = args;
        let amplitude = precision.size() as u64;
        let feature = DTYPES[common.dtype as usize].0.size() as u64;
        let of_slot = RING_BYTES / amplitude;
        let slot = RING_BYTES + of_slot * feature;
        let slots = (device.shared / slot).min(MAX_RING_SLOTS);
        let chunks = common.features.div_ceil(of_slot);
        let held = chunks.div_ceil(device.multiprocessors);
        // Copies to shared memory are of multiples of 16 bytes, from and to such.
        let whole = |values: u64, row_stride: u64, size: u64| {
            [values, row_stride.wrapping_mul(size), common.features * size]
                .iter()
                .all(|bytes| bytes.is_multiple_of(16))
        };
        let fits = device.hopper
            && slots >= SLOTS_OF_CHUNK * held
            && common.col_stride == 1
            && cotangent.col_stride == 1
            && whole(common.input, common.row_stride as u64, feature)
            && whole(cotangent.values, cotangent.row_stride as u64, amplitude)
            && whole(common.output, common.output_stride, feature);
        let teams = if held < ONE_TEAM_CHUNKS { 2 } else { 1 };
        fits.then_some(Self::Ring { chunks, slots, teams, shared: slots * slot })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cotangent;
    use super::*;
    use crate::cuda::kernels::CommonArgs;
    use crate::cuda::kernels::tile::tests::common;
    use crate::element::DType;

    const OLD: Device = Device { hopper: false, multiprocessors: 108, shared: 163 << 10 };
    const H200: Device = Device { hopper: true, multiprocessors: 132, shared: 226 << 10 };
    const SMALL: Device = Device { hopper: true, multiprocessors: 16, shared: 98 << 10 };

    /// Arguments of contiguous aligned rows.
    fn rows(precision: Precision, dtype: DType, batch: u64, features: u64) -> GradientArgs {
        let at = |place: u64| place << 40;
        let dim = features.next_power_of_two().max(16 / precision.size() as u64);
        let common = CommonArgs {
            input: at(1),
            output: at(2),
            row_stride: features as i64,
            col_stride: 1,
            output_stride: features,
            dtype: dtype as u32,
            ..common(dim.ilog2(), batch, features)
        };
        GradientArgs {
            common,
            cotangent: Cotangent { values: at(3), row_stride: dim as i64, col_stride: 1 },
        }
    }

    /// Whatever the number of features, threads, slots and chunks have room for all and none is
    /// idle but for rounding to a power of two.
    #[test]
    fn rows_are_covered() {
        let lengths = (1..300).chain([1023, 4096, 8191, 8192, 8193, 1 << 20, (1 << 24) + 1]);
        let dtypes = DTYPES.iter().map(|&(dtype, _)| dtype).filter(|dtype| !dtype.is_integer());
        for (dtype, features) in dtypes.flat_map(|dtype| lengths.clone().map(move |n| (dtype, n))) {
            for precision in [Precision::Complex64, Precision::Complex128] {
                for device in [OLD, H200, SMALL] {
                    covers(precision, dtype, features, device);
                }
            }
        }
    }

    fn covers(precision: Precision, dtype: DType, features: u64, device: Device) {
        let of_thread = UNITS * 16 / precision.size() as u64;
        let path = Path::of(precision, &rows(precision, dtype, 3, features), device);
        let alone = Path::of(precision, &rows(precision, dtype, 1, features), device);
        assert_eq!(path, alone, "{features}");
        match path {
            Path::Short { group } => {
                assert!(group.is_power_of_two() && group <= MAX_GROUP, "{features}");
                assert!(group * of_thread >= features, "{features}");
                assert!(group <= MIN_GROUP || group * of_thread < 2 * features);
            }
            Path::Cluster { blocks } => {
                assert!(device.hopper && (2..=MAX_CLUSTER).contains(&blocks), "{features}");
                let room = blocks * CLUSTER_THREADS * of_thread;
                assert!((features..2 * features + of_thread).contains(&room), "{features}");
            }
            Path::Ring { chunks, slots, teams, shared } => {
                let of_slot = RING_BYTES / precision.size() as u64;
                assert!((features..features + of_slot).contains(&(chunks * of_slot)), "{features}");
                assert!(device.hopper && shared <= device.shared && slots <= MAX_RING_SLOTS);
                let bytes = of_slot * (dtype.size() + precision.size()) as u64;
                assert_eq!(shared, slots * bytes);
                // Slots are taken by turns, and a row is there as a whole, wherever in the turn of
                // the blocks it begins.
                assert!((1..=2).contains(&teams) && teams <= slots);
                assert!(device.multiprocessors * (slots - 1) >= chunks, "{features}");
            }
            Path::Long { chunks } => {
                assert!(chunks * chunk(precision) >= features, "{features}");
                assert!((chunks - 1) * chunk(precision) < features, "{features}");
            }
        }
    }

    /// Rings take what their copies can: whole units of 16 bytes, one after another.
    #[test]
    fn rings_take_aligned_rows_that_fit() {
        let of = |args: &GradientArgs, device| Path::of(Precision::Complex64, args, device);
        let is_ring = |args: &GradientArgs| matches!(of(args, H200), Path::Ring { .. });
        let fine = rows(Precision::Complex64, DType::F32, 7, 100_000);
        assert!(is_ring(&fine));
        assert!(matches!(of(&fine, OLD), Path::Long { .. }));
        for break_it in [
            |args: &mut GradientArgs| args.common.input += 4,
            |args: &mut GradientArgs| args.common.output += 8,
            |args: &mut GradientArgs| args.cotangent.values += 8,
            |args: &mut GradientArgs| args.common.row_stride += 2,
            |args: &mut GradientArgs| args.common.output_stride += 1,
            |args: &mut GradientArgs| args.cotangent.row_stride = -100_001,
            |args: &mut GradientArgs| args.common.col_stride = 2,
            |args: &mut GradientArgs| args.cotangent.col_stride = -1,
            |args: &mut GradientArgs| args.common.features -= 2,
        ] {
            let mut args = fine;
            break_it(&mut args);
            assert!(matches!(of(&args, H200), Path::Long { .. }), "{args:?}");
        }
        let mut same = fine;
        (same.common.row_stride, same.cotangent.row_stride) = (0, -100_002);
        assert!(is_ring(&same));
        let long = |bits| is_ring(&rows(Precision::Complex64, DType::F32, 7, 1_u64 << bits));
        assert!(long(16) && long(20) && !long(22));
    }
}
