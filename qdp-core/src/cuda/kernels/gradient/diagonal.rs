//! Launches of `diagonal_gradient.cu`: how states are cut.
//!
//! A block that can hold a state does all of it at once and reads its cotangent once. Larger states
//! go through a workspace, in rounds over the rows: tiles of neighbouring amplitudes and strided
//! ones take turns as in an encode, and what they find out is put together by two small launches.

use super::super::diagonal::{
    COLUMN_CELLS, DiagonalArgs, GROUP_THREAD_BITS, Kernels as Encode, Limits, MAX_TILE_CELLS,
    MIN_COLUMN_CELLS, MIN_MADE_CELLS, MIN_REGISTER_BITS, REGISTER_BITS, THREAD_BITS,
    THREADS_PER_SM, TILE_CELLS, WARP_BITS, cell_bits, factors_size, tables_size,
};
use super::super::{CommonArgs, Held, LaunchStream, Loader, Shape};
use super::{Cotangent, GradientArgs};
use crate::cuda::Function;
use crate::element::{DType, Precision};
use crate::encoding::Diagonal;
use crate::encoding::diagonal::PairTerms;
use crate::error::Result;

/// What the rows of a round take in the workspace, where that is several rows.
const ROUND_BYTES: u64 = 64 << 20;
/// Threads of a block of the launches that put moments together: `__launch_bounds__` there.
const COMBINE_THREADS: u64 = 256;

/// Mirrors `qdp::DiagonalGradientArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Args {
    diagonal: DiagonalArgs,
    source: Cotangent,
    states: u64,
    target: u64,
    sums: u64,
    before: u32,
    after: u32,
    add_sums: u32,
    memory_size: u32,
    stash_at: u32,
    features_at: u32,
}

/// Mirrors `qdp::TileMoments`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct TileMoments {
    sums: u64,
    tile_bits: u32,
    column_bits: u32,
    low_bit: u32,
}

/// Mirrors `qdp::CombineArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct CombineArgs {
    common: CommonArgs,
    multiplicity: u64,
    tiles: [TileMoments; 2],
    coefficients: u64,
    kind: u32,
    big_endian: u32,
}

pub(in crate::cuda::kernels) struct Kernels {
    /// By bits in registers less one, then by [`Precision`].
    any: Vec<[Function; 2]>,
    /// For one diagonal and for several, by bits of a cell's number less [`MIN_MADE_CELLS`], then
    /// by [`Precision`].
    whole: [Vec<[Function; 2]>; 2],
    pass: [Function; 2],
    combine: Function,
    features: Function,
    limits: Limits,
}

impl Kernels {
    pub(in crate::cuda::kernels) fn load(loader: &Loader<'_>) -> Result<Self> {
        let limits = Limits::of(loader);
        let any = (1..=REGISTER_BITS)
            .map(|bits| loader.by_precision(&format!("qdp_diagonal_gradient_{bits}")))
            .collect::<Result<Vec<_>>>()?;
        let whole = |name| {
            (MIN_MADE_CELLS..=MAX_TILE_CELLS)
                .map(|cells| loader.by_precision(&format!("qdp_diagonal_gradient_{name}_{cells}")))
                .collect::<Result<Vec<_>>>()
        };
        let whole = [whole("single")?, whole("layered")?];
        let pass = loader.by_precision("qdp_diagonal_gradient_pass")?;
        for kernel in any.iter().chain(whole.iter().flatten()).chain([&pass]).flatten() {
            kernel.set_max_dynamic_shared(limits.shared)?;
        }
        let combine = loader.function("qdp_diagonal_gradient_combine")?;
        let features = loader.function("qdp_diagonal_gradient_features")?;
        Ok(Self { any, whole, pass, combine, features, limits })
    }

    /// Bytes of device memory for what is kept between launches, of as many rows as a round has.
    pub(in crate::cuda::kernels) fn workspace_bytes(
        &self,
        diagonal: &Diagonal,
        precision: Precision,
        common: &CommonArgs,
    ) -> usize {
        if Whole::new(diagonal, precision, *common, self.limits).is_some() {
            return 0;
        }
        let cut = Cut::new(diagonal, precision, *common, self.limits);
        (cut.round(common.batch) * cut.row_bytes()) as usize
    }

    /// Enqueues the gradients of all rows. `encode` makes the states that layers pass through.
    ///
    /// # Safety
    ///
    /// As for [`Kernels::enqueue_gradient`](super::super::Kernels::enqueue_gradient).
    pub(in crate::cuda::kernels) unsafe fn enqueue(
        &self,
        encode: &Encode,
        diagonal: &Diagonal,
        (dtype, precision): (DType, Precision),
        args: GradientArgs,
        held: Held,
        stream: LaunchStream,
    ) -> Result<()> {
        let GradientArgs { common, cotangent } = args;
        let args = Args::new(common, cotangent, diagonal, held.multiplicity);
        if let Some(whole) = Whole::new(diagonal, precision, common, self.limits) {
            let (args, shape) = whole.launch(args);
            let kernels = match whole.made_cells() {
                Some(cells) => {
                    &self.whole[usize::from(diagonal.reps > 1)][(cells - MIN_MADE_CELLS) as usize]
                }
                None => &self.any[whole.register_bits as usize - 1],
            };
            // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
            return unsafe { shape.launch(&kernels[precision as usize], &args, stream) };
        }
        let cut = Cut::new(diagonal, precision, common, self.limits);
        let rows = cut.round(common.batch);
        let mut first = 0;
        while first < common.batch {
            let args = args.rows(first, rows.min(common.batch - first), dtype, precision);
            // SAFETY: the caller's promise holds for the rows of a round, which take no more of
            // the workspace than was asked for.
            unsafe { self.round(encode, diagonal, &cut, &args, held, stream)? };
            first += rows;
        }
        Ok(())
    }

    /// The launches for the rows that `args` tells.
    ///
    /// # Safety
    ///
    /// As for [`Kernels::enqueue`], where the rows take [`Cut::row_bytes`] each of the workspace.
    unsafe fn round(
        &self,
        encode: &Encode,
        diagonal: &Diagonal,
        cut: &Cut,
        args: &Args,
        held: Held,
        stream: LaunchStream,
    ) -> Result<()> {
        let common = args.diagonal.common;
        let places = cut.places(held.workspace, common.batch);
        let mut args = *args;
        let mut moments = [TileMoments::default(); 2];
        // The states before a diagonal are those after the transform that follows the others.
        let mut layers = diagonal.clone();
        layers.final_hadamard = true;
        for launch in cut.launches() {
            let mut args_now = cut.pass(args, launch);
            if let Some(rep) = launch.diagonal {
                if rep > 1 {
                    layers.reps = rep - 1;
                    let common =
                        CommonArgs { output: places.states, output_stride: common.dim(), ..common };
                    // SAFETY: the workspace has room for the states; nothing is reported.
                    unsafe { encode.enqueue(&layers, cut.precision, common, held, stream)? };
                    args_now.0.states = places.states;
                }
                let of_set = usize::from(launch.set > 0);
                let tile = &mut moments[of_set];
                args_now.0.add_sums = u32::from(tile.sums != 0);
                let DiagonalArgs { tile_bits, column_bits, low_bit, .. } = args_now.0.diagonal;
                let sums = places.sums[of_set];
                *tile = TileMoments { sums, tile_bits, column_bits, low_bit };
                args_now.0.sums = sums;
                args_now.0.diagonal.last_scale =
                    if rep < diagonal.reps || diagonal.final_hadamard { cut.scale } else { 1.0 };
            }
            args_now.0.target = if launch.last { 0 } else { places.cotangents };
            let (pass, shape) = args_now;
            // SAFETY: the caller's promise; the arguments mirror the kernel's parameter, and the
            // workspace has room for what tiles leave there.
            unsafe { shape.launch(&self.pass[cut.precision as usize], &pass, stream)? };
            args.source = Cotangent {
                values: places.cotangents,
                row_stride: common.dim() as i64,
                col_stride: 1,
            };
        }
        let combine = CombineArgs {
            common,
            multiplicity: held.multiplicity,
            tiles: moments,
            coefficients: places.coefficients,
            kind: diagonal.terms as u32,
            big_endian: u32::from(diagonal.big_endian),
        };
        let warps = common.batch * coefficients(common.num_qubits);
        let shape = |threads: u64| Shape {
            blocks: threads.div_ceil(COMBINE_THREADS),
            threads: COMBINE_THREADS as u32,
            shared: 0,
        };
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter, and the
        // workspace has room for the coefficients.
        unsafe {
            shape(warps << WARP_BITS).launch(&self.combine, &combine, stream)?;
            shape(common.batch * common.features).launch(&self.features, &combine, stream)
        }
    }
}

impl Args {
    fn new(common: CommonArgs, source: Cotangent, diagonal: &Diagonal, multiplicity: u64) -> Self {
        let mut args = DiagonalArgs::new(common, diagonal, multiplicity);
        // Tables are made of the diagonal, as where a state is.
        args.generate = 1;
        args.scale = transform_scale(diagonal);
        args.last_scale = if diagonal.final_hadamard { args.scale } else { 1.0 };
        Self {
            diagonal: args,
            source,
            states: 0,
            target: 0,
            sums: 0,
            before: 0,
            after: 0,
            add_sums: 0,
            memory_size: 0,
            stash_at: 0,
            features_at: 0,
        }
    }

    /// For `count` rows from `first` on.
    fn rows(mut self, first: u64, count: u64, dtype: DType, precision: Precision) -> Self {
        let common = &mut self.diagonal.common;
        let size = dtype.size() as u64;
        let offset = |stride: i64, size: u64| (first as i64 * stride * size as i64) as u64;
        common.input = common.input.wrapping_add(offset(common.row_stride, size));
        common.output = common.output.wrapping_add(first * common.output_stride * size);
        common.batch = count;
        let amplitude = precision.size() as u64;
        self.source.values =
            self.source.values.wrapping_add(offset(self.source.row_stride, amplitude));
        self
    }
}

/// A normalised transform's.
fn transform_scale(diagonal: &Diagonal) -> f64 {
    let scale = diagonal.scale(0);
    if diagonal.reps == 1 && diagonal.final_hadamard { scale.sqrt() } else { scale }
}

/// `coefficients` of moments.cuh.
fn coefficients(bits: u32) -> u64 {
    let bits = u64::from(bits);
    1 + bits * (bits + 1) / 2
}

/// States that a block holds.
#[derive(Debug, Clone, Copy)]
struct Whole {
    precision: Precision,
    limits: Limits,
    register_bits: u32,
    cells: u32,
    transforms: bool,
    /// Whether several diagonals need the cotangent while a state is made.
    stash: bool,
    /// Whether features are not the coefficients themselves.
    derived: bool,
}

impl Whole {
    /// `None` where a block cannot hold a state.
    fn new(
        diagonal: &Diagonal,
        precision: Precision,
        common: CommonArgs,
        limits: Limits,
    ) -> Option<Self> {
        let cells = diagonal.num_qubits - cell_bits(precision);
        let per_thread =
            (common.batch << cells.min(MAX_TILE_CELLS)) / (THREADS_PER_SM * limits.sms);
        let wanted = per_thread.max(1).ilog2().clamp(MIN_REGISTER_BITS, REGISTER_BITS);
        let register_bits = (wanted..=REGISTER_BITS)
            .find(|&bits| cells <= bits + THREAD_BITS[bits as usize])?
            .min(cells);
        let layered = diagonal.reps > 1;
        let whole = Self {
            precision,
            limits,
            register_bits,
            cells,
            transforms: layered || diagonal.final_hadamard,
            stash: diagonal.reps > 2,
            derived: diagonal.terms != PairTerms::Explicit,
        };
        // Several diagonals behind a last transform are nobody's encoding; passes can do them.
        if layered && diagonal.final_hadamard {
            return None;
        }
        let args = Args::new(common, Cotangent::default(), diagonal, 0);
        let (_, shape) = whole.launch(args);
        (shape.shared <= limits.shared).then_some(whole)
    }

    /// Where a kernel knows the bits of a cell's number.
    fn made_cells(&self) -> Option<u32> {
        Some(self.cells).filter(|cells| {
            self.register_bits == REGISTER_BITS && (MIN_MADE_CELLS..=MAX_TILE_CELLS).contains(cells)
        })
    }

    fn launch(&self, mut args: Args) -> (Args, Shape) {
        let (n, c) = (args.diagonal.common.num_qubits, cell_bits(self.precision));
        let batch = args.diagonal.common.batch;
        let tile_threads = self.cells - self.register_bits;
        let tables = &mut args.diagonal;
        tables.tile_bits = n;
        args.before = u32::from(tables.reps == 1 && self.transforms);

        // What a group of threads has of shared memory.
        let exchanges = self.transforms && self.cells > self.register_bits;
        let moments = (coefficients(self.register_bits + c) << tile_threads) as u32
            * (self.precision.size() / 2) as u32;
        let tile_size = 16 << self.cells;
        args.memory_size = if exchanges { tile_size } else { moments.next_multiple_of(16) };
        let stash_size = if self.stash { tile_size } else { 0 };
        let features_size = if self.derived { (n * n * 8).next_multiple_of(16) } else { 0 };
        let factors_size = factors_size(tables, self.register_bits, self.precision);
        // `separate_factors` of phase.cuh
        let separate = self.made_cells().is_some() && tile_threads >= GROUP_THREAD_BITS;
        let beside = if separate { 0 } else { factors_size };
        tables.tables_size = tables_size(tables, self.register_bits, self.precision, beside);
        let group_size = args.memory_size + stash_size + features_size + tables.tables_size;

        // Small states share a block, as long as there are blocks for all SMs.
        let least = WARP_BITS.saturating_sub(tile_threads);
        let most = GROUP_THREAD_BITS.saturating_sub(tile_threads);
        let most = most.min((batch / (2 * self.limits.sms)).max(1).ilog2()).max(least);
        let fits = |bits: &u32| group_size << bits <= self.limits.shared;
        tables.group_bits = (least..=most).rfind(fits).unwrap_or(least);
        args.stash_at = args.memory_size << tables.group_bits;
        args.features_at = args.stash_at + (stash_size << tables.group_bits);
        tables.factors_at = args.features_at + (features_size << tables.group_bits);
        tables.tables_at = tables.factors_at + if separate { factors_size } else { 0 };

        let parts = batch.div_ceil(1 << tables.group_bits);
        let mut count = 1 << tables.group_bits;
        if separate {
            // Each warp makes the tables of a state, as long as there are blocks for all SMs and
            // three quarters of them still find room.
            let at_once = self.limits.sms * (512 >> tile_threads.min(9));
            let states = 1 << (tile_threads - WARP_BITS);
            let shared = tables.tables_at + states * tables.tables_size;
            if parts >= at_once * u64::from(states)
                && 4 * (self.limits.shared / shared) >= 3 * (512 >> tile_threads)
            {
                (tables.ahead, tables.parts, count) = (states, states, states);
            }
        }
        let shape = Shape {
            blocks: parts.div_ceil(u64::from(tables.parts)),
            threads: 1 << (tile_threads + tables.group_bits),
            shared: tables.tables_at + count * tables.tables_size,
        };
        (args, shape)
    }
}

/// How larger states are cut.
#[derive(Debug, Clone, Copy)]
struct Cut {
    precision: Precision,
    num_qubits: u32,
    reps: u32,
    final_hadamard: bool,
    scale: f64,
    /// Bits of a tile of neighbouring amplitudes.
    tile_bits: u32,
    /// Bits of a strided tile.
    strided_bits: u32,
    /// Sets of bits that take turns: those of a tile, and those of the strided tiles.
    sets: u32,
}

/// A launch over all tiles of one set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Launch {
    set: u32,
    /// Transforms before the diagonal, or without one.
    before: u32,
    /// Which diagonal, counted from 1.
    diagonal: Option<u32>,
    after: u32,
    /// Whether nothing is left to do with the tile.
    last: bool,
}

/// Addresses in the workspace.
#[derive(Debug, Clone, Copy)]
struct Places {
    cotangents: u64,
    states: u64,
    /// Of tiles, of strided tiles.
    sums: [u64; 2],
    coefficients: u64,
}

impl Cut {
    fn new(diagonal: &Diagonal, precision: Precision, common: CommonArgs, limits: Limits) -> Self {
        let (n, c) = (diagonal.num_qubits, cell_bits(precision));
        let cells = n - c;
        let args = DiagonalArgs::new(common, diagonal, 0);
        let most = (REGISTER_BITS + 1..=MAX_TILE_CELLS)
            .rfind(|&cells| shared_size(&args, cells + c, precision) <= limits.shared)
            .unwrap_or(REGISTER_BITS + 1)
            .min(cells);
        let (small, widest) = (most.min(TILE_CELLS), most - MIN_COLUMN_CELLS);
        // A larger tile where it saves a pass.
        let tile = (small..=most).find(|&tile| cells - tile <= widest).unwrap_or(small);
        let rest = cells - tile;
        let strided = rest.div_ceil(widest);
        let strided_cells =
            if rest == 0 { 0 } else { (rest.div_ceil(strided) + COLUMN_CELLS).clamp(small, most) };
        Self {
            precision,
            num_qubits: n,
            reps: diagonal.reps,
            final_hadamard: diagonal.final_hadamard,
            scale: transform_scale(diagonal),
            tile_bits: tile + c,
            strided_bits: strided_cells + c,
            sets: 1 + strided,
        }
    }

    /// They walk over the sets and back, one transform each way: the last set of a transform is the
    /// first of the next, and takes the diagonal between.
    fn launches(&self) -> Vec<Launch> {
        let mut list: Vec<Launch> = Vec::new();
        let (mut set, mut ascending) = (0, true);
        for rep in (1..=self.reps).rev() {
            if rep < self.reps || self.final_hadamard {
                for step in 0..self.sets {
                    set = if ascending { step } else { self.sets - 1 - step };
                    match list.last_mut() {
                        Some(last) if step == 0 => last.after = 1,
                        _ => list.push(Launch {
                            set,
                            before: 1,
                            diagonal: None,
                            after: 0,
                            last: false,
                        }),
                    }
                }
                ascending = !ascending;
            }
            match list.last_mut() {
                Some(last) if last.diagonal.is_none() => last.diagonal = Some(rep),
                _ => {
                    list.push(Launch {
                        set,
                        before: 0,
                        diagonal: Some(rep),
                        after: 0,
                        last: false,
                    });
                }
            }
        }
        if let Some(last) = list.last_mut() {
            last.last = true;
        }
        list
    }

    /// The tile of a set.
    fn pass(&self, mut args: Args, launch: Launch) -> (Args, Shape) {
        let tables = &mut args.diagonal;
        tables.tile_bits = self.tile_bits;
        if launch.set > 0 {
            let below = self.tile_bits;
            let bit = |set: u32| below + (self.num_qubits - below) * set / (self.sets - 1);
            let (from, to) = (bit(launch.set - 1), bit(launch.set));
            tables.low_bit = from;
            tables.tile_bits = self.strided_bits;
            tables.column_bits = self.strided_bits - (to - from);
        }
        let c = cell_bits(self.precision);
        let cells = tables.tile_bits - c;
        tables.tables_at = 16 << cells;
        let beside = factors_size(tables, REGISTER_BITS, self.precision);
        tables.tables_size = tables_size(tables, REGISTER_BITS, self.precision, beside);
        let tiles = tables.common.batch << (self.num_qubits - tables.tile_bits);
        let shape = Shape {
            blocks: tiles,
            threads: 1 << (cells - REGISTER_BITS),
            shared: shared_size(tables, tables.tile_bits, self.precision),
        };
        (args.before, args.after) = (launch.before, launch.after);
        (args, shape)
    }

    /// Amplitudes of a row that are kept between launches: those of its cotangent, and of the state
    /// before a diagonal.
    fn kept(&self) -> [u64; 2] {
        let dim = (1 << self.num_qubits) * self.precision.size() as u64;
        [if self.launches().len() > 1 { dim } else { 0 }, if self.reps > 1 { dim } else { 0 }]
    }

    /// Bytes of what the tiles of a row leave, and the strided ones.
    fn sums(&self) -> [u64; 2] {
        [self.tile_bits, self.strided_bits].map(|bits| {
            if bits == 0 { 0 } else { (8 * coefficients(bits)) << (self.num_qubits - bits) }
        })
    }

    /// Bytes of the workspace that a row takes: a multiple of 16.
    fn row_bytes(&self) -> u64 {
        let parts = self.kept().into_iter().chain(self.sums());
        parts
            .chain([8 * coefficients(self.num_qubits)])
            .map(|bytes| bytes.next_multiple_of(16))
            .sum()
    }

    /// Rows of a round.
    fn round(&self, batch: u64) -> u64 {
        (ROUND_BYTES / self.row_bytes()).clamp(1, batch.max(1))
    }

    fn places(&self, workspace: u64, rows: u64) -> Places {
        let mut end = workspace;
        let mut take = |bytes: u64| {
            let from = end;
            end += rows * bytes.next_multiple_of(16);
            from
        };
        let [cotangents, states] = self.kept().map(&mut take);
        let sums = self.sums().map(&mut take);
        Places { cotangents, states, sums, coefficients: take(8 * coefficients(self.num_qubits)) }
    }
}

/// Bytes of shared memory of a block that takes a tile of a larger state.
fn shared_size(args: &DiagonalArgs, tile_bits: u32, precision: Precision) -> u32 {
    let args = DiagonalArgs { tile_bits, generate: 1, ..*args };
    let beside = factors_size(&args, REGISTER_BITS, precision);
    let tables = tables_size(&args, REGISTER_BITS, precision, beside);
    (16 << (tile_bits - cell_bits(precision))) + tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{EncodeSpec, Encoding, Entanglement, Form};
    use crate::input::Input;

    const H200: Limits = Limits { sms: 132, shared: 227 << 10 };
    const LIMITS: [Limits; 3] =
        [H200, Limits { sms: 28, shared: 99 << 10 }, Limits { sms: 40, shared: 64 << 10 }];

    fn encodings() -> Vec<Encoding> {
        let mut encodings = vec![Encoding::Iqp];
        for reps in 1..=4 {
            encodings.push(Encoding::Zz { reps, entanglement: Entanglement::default() });
            encodings.push(Encoding::IqpEmbedding { reps, entanglement: Entanglement::default() });
        }
        encodings
    }

    fn case(encoding: &Encoding, n: u32, batch: u64) -> (Diagonal, CommonArgs) {
        let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
        let Form::Diagonal(diagonal) = spec.form(spec.num_features()).unwrap() else {
            panic!("not a diagonal encoding");
        };
        let mut common = CommonArgs::new(&Input::sample(&[0.0]), (0, 0), (0, 0, 0), n);
        common.batch = batch;
        (diagonal, common)
    }

    fn for_all(mut check: impl FnMut(&Diagonal, Precision, CommonArgs, Limits)) {
        for limits in LIMITS {
            for precision in [Precision::Complex64, Precision::Complex128] {
                for encoding in encodings() {
                    for n in 2..=34 {
                        for batch in [1, 3, 64, 50_000] {
                            let (diagonal, common) = case(&encoding, n, batch);
                            check(&diagonal, precision, common, limits);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn whole_states_fit_their_blocks() {
        for_all(|diagonal, precision, common, limits| {
            let Some(whole) = Whole::new(diagonal, precision, common, limits) else { return };
            let args = Args::new(common, Cotangent::default(), diagonal, 0);
            let (args, shape) = whole.launch(args);
            assert!(shape.shared <= limits.shared, "{whole:?} {shape:?}");
            let bits = whole.register_bits as usize;
            assert!((32..=1 << THREAD_BITS[bits]).contains(&shape.threads), "{whole:?} {shape:?}");
            let DiagonalArgs { group_bits, parts, ahead, .. } = args.diagonal;
            assert_eq!(shape.threads << bits, 1 << (whole.cells + group_bits), "{whole:?}");
            assert!((shape.blocks * u64::from(parts)) << group_bits >= common.batch);
            // Each warp of a block that makes tables ahead makes those of one of its states.
            assert!(ahead == 1 || (ahead == parts && ahead == shape.threads / 32));
            // The kernels that know the size are compiled for one row of threads at a time.
            if whole.made_cells().is_some() && whole.cells < 11 {
                assert!(shape.threads <= 1 << GROUP_THREAD_BITS);
            }
            // The parts of shared memory lie behind one another.
            let rows = 1 << group_bits;
            let moments = coefficients(whole.register_bits + cell_bits(precision))
                << (whole.cells - whole.register_bits);
            let moments = moments as u32 * (precision.size() / 2) as u32;
            assert!(args.memory_size >= moments && args.memory_size.is_multiple_of(16));
            if whole.transforms && whole.cells > whole.register_bits {
                assert_eq!(args.memory_size, 16 << whole.cells);
            }
            let stash = if diagonal.reps > 2 { 16 << whole.cells } else { 0 };
            assert_eq!(args.stash_at, args.memory_size * rows);
            assert_eq!(args.features_at, args.stash_at + stash * rows);
            assert!(args.diagonal.factors_at.is_multiple_of(16));
            assert!(args.diagonal.tables_at >= args.diagonal.factors_at);
        });
    }

    #[test]
    fn an_h200_holds_the_states_it_should() {
        for (encoding, reps) in encodings().into_iter().zip([1, 1, 1, 2, 2, 3, 3, 4, 4]) {
            for n in 2..=20 {
                for (precision, most) in [(Precision::Complex64, 14), (Precision::Complex128, 13)] {
                    let (diagonal, common) = case(&encoding, n, 1000);
                    assert_eq!(diagonal.reps, reps);
                    let most = if reps > 2 { most - 1 } else { most };
                    let whole = Whole::new(&diagonal, precision, common, H200);
                    assert_eq!(whole.is_some(), n <= most, "{encoding:?} {n} {precision:?}");
                }
            }
        }
    }

    #[test]
    fn passes_transform_every_bit_and_take_every_diagonal() {
        for_all(|diagonal, precision, common, limits| {
            let n = diagonal.num_qubits;
            if n < 11 {
                return;
            }
            let cut = Cut::new(diagonal, precision, common, limits);
            let mut covered = vec![0; n as usize];
            let mut diagonals = Vec::new();
            let list = cut.launches();
            for &launch in &list {
                let args = Args::new(common, Cotangent::default(), diagonal, 0);
                let (args, shape) = cut.pass(args, launch);
                let DiagonalArgs { tile_bits, column_bits, low_bit, .. } = args.diagonal;
                assert!(shape.shared <= limits.shared, "{cut:?} {shape:?}");
                assert!((32..=512).contains(&shape.threads), "{cut:?} {shape:?}");
                assert!(column_bits <= low_bit && column_bits < tile_bits, "{cut:?} {args:?}");
                assert!(column_bits == 0 || column_bits > cell_bits(precision), "{cut:?}");
                for bit in low_bit..low_bit + tile_bits - column_bits {
                    covered[bit as usize] += launch.before + launch.after;
                }
                diagonals.extend(launch.diagonal);
                // Before a diagonal all transforms are complete.
                if launch.diagonal.is_some() {
                    let done = covered[0] - if launch.set == 0 { launch.after } else { 0 };
                    let edge = |bit: usize| {
                        let inside =
                            (low_bit..low_bit + tile_bits - column_bits).contains(&(bit as u32));
                        covered[bit] - if inside { launch.after } else { 0 }
                    };
                    assert!((0..n as usize).all(|bit| edge(bit) == done), "{list:?}");
                }
                assert_eq!(launch.last, launch.diagonal == Some(1), "{list:?}");
            }
            let transforms = diagonal.reps - 1 + u32::from(diagonal.final_hadamard);
            assert_eq!(covered, vec![transforms; n as usize], "{list:?}");
            assert!(diagonals.into_iter().eq((1..=diagonal.reps).rev()), "{list:?}");
            // Two sets of bits are as many as there are, up to a size.
            if n <= 24 && limits.sms == H200.sms {
                assert!(cut.sets <= 2 && list.len() as u32 <= transforms + 1, "{list:?}");
            }
        });
    }

    #[test]
    fn the_workspace_has_room_for_a_round() {
        for_all(|diagonal, precision, common, limits| {
            if diagonal.num_qubits < 11 {
                return;
            }
            let cut = Cut::new(diagonal, precision, common, limits);
            let rows = cut.round(common.batch);
            assert!((1..=common.batch).contains(&rows));
            assert!(rows == 1 || rows * cut.row_bytes() <= ROUND_BYTES);
            let places = cut.places(4096, rows);
            let end = 4096 + rows * cut.row_bytes();
            let last = places.coefficients + rows * 8 * coefficients(diagonal.num_qubits);
            assert!(last <= end, "{places:?} {end}");
            let [cotangents, states] = cut.kept();
            assert!(places.cotangents + rows * cotangents <= places.states);
            assert!(places.states + rows * states <= places.sums[0]);
            assert_eq!(states > 0, diagonal.reps > 1);
            assert_eq!(
                cotangents > 0,
                diagonal.reps > 1 || diagonal.final_hadamard && cut.sets > 1
            );
        });
    }
}
