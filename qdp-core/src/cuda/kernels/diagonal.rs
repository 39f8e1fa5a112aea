//! Launches of diagonal.cu: how states are cut into tiles.
//!
//! A tile has 2^11 cells of 16 bytes where there is a choice: four blocks of 128 threads then share
//! an SM of an H200, and one computes while another stores. A larger tile, or folding another bit,
//! costs less than another pass over memory up to the limits in [`FOLDS`].

use super::{CommonArgs, Held, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::Precision;
use crate::encoding::Diagonal;
use crate::error::Result;

/// Bits of a cell's number that a thread has in registers, at most, and where the state has them.
pub(super) const REGISTER_BITS: u32 = 4;
pub(super) const MIN_REGISTER_BITS: u32 = 2;
/// Bits of the number of threads of a block, at most, by bits in registers: `__launch_bounds__`
/// of diagonal.cu.
pub(super) const THREAD_BITS: [u32; REGISTER_BITS as usize + 1] = [0, 8, 8, 8, 9];
/// Bits of the number of a tile's cells that suits the device.
pub(super) const TILE_CELLS: u32 = 11;
/// Likewise, at most.
pub(super) const MAX_TILE_CELLS: u32 = 13;
/// The least bits of a cell's number for which kernels know them.
pub(super) const MIN_MADE_CELLS: u32 = 7;
/// Folded bits, at most, that suit tiles of 2^11, 2^12 and 2^13 cells. Measured on an H200 with
/// 512 MB of output; where the list ends, the pass over memory costs less.
const FOLDS: [u32; (MAX_TILE_CELLS - TILE_CELLS) as usize + 1] = [0, 3, MAX_FOLD_BITS];
/// `MAX_FOLD_BITS` of phase.cuh.
const MAX_FOLD_BITS: u32 = 4;
/// Folded bits where another pass follows all the same.
const PASS_FOLD_BITS: u32 = 2;
/// Columns beside the transformed bits of a strided tile: 8 cells fill a line of memory, 4 do
/// where more bits are to be transformed.
pub(super) const COLUMN_CELLS: u32 = 3;
pub(super) const MIN_COLUMN_CELLS: u32 = 2;
/// Threads that an SM should have before each of them gets more registers.
pub(super) const THREADS_PER_SM: u64 = 128;
/// Threads of a block that takes several small states.
pub(super) const GROUP_THREAD_BITS: u32 = 7;
/// Bits of the number of threads of a warp.
pub(super) const WARP_BITS: u32 = 5;

/// Mirrors `qdp::DiagonalArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DiagonalArgs {
    pub(super) common: CommonArgs,
    pub(super) multiplicity: u64,
    pub(super) scale: f64,
    pub(super) last_scale: f64,
    pub(super) kind: u32,
    pub(super) big_endian: u32,
    pub(super) reps: u32,
    pub(super) diagonals: u32,
    pub(super) generate: u32,
    pub(super) transforms: u32,
    pub(super) multiplies: u32,
    pub(super) tile_bits: u32,
    pub(super) column_bits: u32,
    pub(super) low_bit: u32,
    pub(super) fold_bits: u32,
    pub(super) group_bits: u32,
    pub(super) parts: u32,
    pub(super) ahead: u32,
    pub(super) factors_at: u32,
    pub(super) tables_at: u32,
    pub(super) tables_size: u32,
}

pub(super) struct Kernels {
    /// By bits in registers less one, then by [`Precision`].
    any_tile: Vec<[Function; 2]>,
    /// By bits of a cell's number less [`MIN_MADE_CELLS`], then by [`Precision`].
    made_tile: Vec<[Function; 2]>,
    limits: Limits,
}

/// What of the device decides how states are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) sms: u64,
    /// Bytes that a block can have.
    pub(super) shared: u32,
}

impl Limits {
    pub(super) fn of(loader: &Loader<'_>) -> Self {
        Self {
            sms: u64::from(loader.context.sm_count()),
            shared: loader.context.max_shared_memory_per_block(),
        }
    }
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let limits = Limits::of(loader);
        let any_tile = (1..=REGISTER_BITS)
            .map(|bits| loader.by_precision(&format!("qdp_diagonal_{bits}")))
            .collect::<Result<Vec<_>>>()?;
        let made_tile = (MIN_MADE_CELLS..=MAX_TILE_CELLS)
            .map(|cells| loader.by_precision(&format!("qdp_diagonal_made_{cells}")))
            .collect::<Result<Vec<_>>>()?;
        for kernel in any_tile.iter().chain(&made_tile).flatten() {
            kernel.set_max_dynamic_shared(limits.shared)?;
        }
        Ok(Self { any_tile, made_tile, limits })
    }

    /// # Safety
    ///
    /// As for [`super::Kernels::enqueue`].
    pub(super) unsafe fn enqueue(
        &self,
        diagonal: &Diagonal,
        precision: Precision,
        common: CommonArgs,
        held: Held,
        stream: LaunchStream,
    ) -> Result<()> {
        let args = DiagonalArgs::new(common, diagonal, held.multiplicity);
        let cut = Cut::new(diagonal, precision, common.batch, self.limits);
        for pass in Passes::new(diagonal, cut, args) {
            let kernels = match pass.made_cells {
                Some(cells) => &self.made_tile[(cells - MIN_MADE_CELLS) as usize],
                None => &self.any_tile[pass.register_bits as usize - 1],
            };
            let kernel = &kernels[precision as usize];
            // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
            unsafe { pass.shape.launch(kernel, &pass.args, stream)? };
        }
        Ok(())
    }
}

impl DiagonalArgs {
    pub(super) fn new(common: CommonArgs, diagonal: &Diagonal, multiplicity: u64) -> Self {
        Self {
            common,
            multiplicity,
            scale: diagonal.scale(0),
            last_scale: diagonal.scale(diagonal.reps - 1),
            kind: diagonal.terms as u32,
            big_endian: u32::from(diagonal.big_endian),
            reps: diagonal.reps,
            diagonals: 0,
            generate: 0,
            transforms: 0,
            multiplies: 0,
            tile_bits: 0,
            column_bits: 0,
            low_bit: 0,
            fold_bits: 0,
            group_bits: 0,
            parts: 1,
            ahead: 1,
            factors_at: 0,
            tables_at: 0,
            tables_size: 0,
        }
    }
}

/// `CELL_BITS` of phase.cuh: a cell is 16 bytes.
pub(super) fn cell_bits(precision: Precision) -> u32 {
    match precision {
        Precision::Complex64 => 1,
        Precision::Complex128 => 0,
    }
}

/// Walsh-Hadamard transforms that are not in the scale: the first is.
fn transforms(diagonal: &Diagonal) -> u32 {
    diagonal.reps - 1 + u32::from(diagonal.final_hadamard)
}

/// How the states of one encode are cut.
#[derive(Debug, Clone, Copy)]
struct Cut {
    precision: Precision,
    limits: Limits,
    /// Bits of a cell's number in registers, where a tile has as many.
    register_bits: u32,
    /// Bits of a tile of neighbouring amplitudes.
    tile_bits: u32,
    /// Bits above those of the tile, summed over while it is made.
    fold_bits: u32,
    /// Sets of bits that take turns: those of a tile with what is folded, and those of the strided
    /// tiles.
    sets: u32,
    /// Bits of a strided tile.
    strided_bits: u32,
}

impl Cut {
    fn new(diagonal: &Diagonal, precision: Precision, batch: u64, limits: Limits) -> Self {
        let (n, c) = (diagonal.num_qubits, cell_bits(precision));
        let (cells, folds) = (n - c, transforms(diagonal) == 1);
        // No less than what a tile and its tables take.
        let takes = |cells: u32| {
            (16 << cells) + ((9 * 16) << cells >> REGISTER_BITS) + 8 * (n * n + 3 * n + 1000)
        };
        let room = (1..=MAX_TILE_CELLS).rfind(|&cells| takes(cells) <= limits.shared).unwrap_or(1);
        let most = |registers: u32| {
            room.min(MAX_TILE_CELLS).min(registers + THREAD_BITS[registers as usize])
        };
        let per_thread = (batch << cells) / (THREADS_PER_SM * limits.sms);
        let wanted = per_thread.max(1).ilog2().clamp(MIN_REGISTER_BITS, REGISTER_BITS);
        let register_bits =
            (wanted..=REGISTER_BITS).find(|&bits| cells <= most(bits)).unwrap_or(REGISTER_BITS);
        // A second diagonal takes tables of its own for every tile, so fewer tiles suit it.
        let suits = TILE_CELLS + u32::from(diagonal.reps > 1);
        let largest = most(register_bits);
        let folds_of = |tile: u32| match FOLDS[(tile - TILE_CELLS) as usize] {
            _ if !folds => 0,
            // Where a larger tile finds no room, folding still costs less than a pass.
            few if tile == largest => few.max(PASS_FOLD_BITS),
            few => few,
        };
        let tile = (suits..=largest)
            .find(|&tile| cells.saturating_sub(tile) <= folds_of(tile))
            .or_else(|| (cells <= largest).then_some(cells));
        if let Some(tile) = tile {
            // Folding also makes more blocks of few states; each keeps a warp busy.
            let few = (limits.sms / (4 * batch)).max(1).ilog2().min(MAX_FOLD_BITS);
            let few = few.min(cells.saturating_sub(register_bits + WARP_BITS));
            let fold_bits = (cells - cells.min(tile)).max(if folds { few } else { 0 });
            let tile_bits = n - fold_bits;
            let (sets, strided_bits) = (1, 0);
            return Self {
                precision,
                limits,
                register_bits,
                tile_bits,
                fold_bits,
                sets,
                strided_bits,
            };
        }
        let most = most(register_bits);
        let (small, widest) = (most.min(TILE_CELLS), most - MIN_COLUMN_CELLS);
        let fold_bits = if folds { PASS_FOLD_BITS } else { 0 };
        // A larger tile where it saves a pass.
        let rest_of = |tile: u32| cells.saturating_sub(tile + fold_bits);
        let tile = (small..=most).find(|&tile| rest_of(tile) <= widest).unwrap_or(small);
        let fold_bits = fold_bits.min(cells - tile);
        let rest = rest_of(tile);
        let strided = rest.div_ceil(widest);
        let strided_cells =
            if rest == 0 { 0 } else { (rest.div_ceil(strided) + COLUMN_CELLS).clamp(small, most) };
        Self {
            precision,
            limits,
            register_bits,
            tile_bits: tile + c,
            fold_bits,
            sets: 1 + strided,
            strided_bits: strided_cells + c,
        }
    }
}

/// One launch.
#[derive(Debug, Clone, Copy)]
struct Pass {
    args: DiagonalArgs,
    register_bits: u32,
    /// Bits of a cell's number, where a kernel that knows them makes the tile.
    made_cells: Option<u32>,
    shape: Shape,
}

impl Pass {
    /// With what follows from the tile and what is done to it.
    fn new(mut args: DiagonalArgs, cut: &Cut) -> Self {
        let (n, c) = (args.common.num_qubits, cell_bits(cut.precision));
        let cells = args.tile_bits - c;
        let register_bits = cut.register_bits.min(cells);
        let tile_threads = cells - register_bits;
        let first_cell = args.column_bits.max(c) - c;
        let exchanges = args.transforms > 0 && cells - first_cell > register_bits;
        let tile_size = if exchanges { 16 << cells } else { 0 };
        let made = args.generate != 0 && args.transforms <= 1 && args.column_bits == 0;
        let made_cells = Some(cells).filter(|cells| {
            made && register_bits == REGISTER_BITS
                && (MIN_MADE_CELLS..=MAX_TILE_CELLS).contains(cells)
        });
        let factors_size = factors_size(&args, register_bits, cut.precision);
        // `separate_factors` of phase.cuh
        let separate = made_cells.is_some() && tile_threads >= GROUP_THREAD_BITS;
        let beside = if separate { 0 } else { factors_size };
        args.tables_size = tables_size(&args, register_bits, cut.precision, beside);

        // Small states share a block, as long as there are blocks for all SMs.
        let tiles = args.common.batch << (n - args.tile_bits);
        let least = WARP_BITS.saturating_sub(tile_threads);
        let most = GROUP_THREAD_BITS.saturating_sub(tile_threads);
        let most = most.min((tiles / (2 * cut.limits.sms)).max(1).ilog2()).max(least);
        let fits = |bits: &u32| (tile_size + args.tables_size) << bits <= cut.limits.shared;
        let whole = args.tile_bits == n;
        args.group_bits = if whole { (least..=most).rfind(fits).unwrap_or(least) } else { 0 };
        args.factors_at = tile_size << args.group_bits;
        args.tables_at = args.factors_at;

        // Tiles that differ in what is folded share their tables, if one block takes them.
        let parts = tiles.div_ceil(1 << args.group_bits);
        let at_once = cut.limits.sms * (512 >> tile_threads.min(9));
        args.parts = parts.div_ceil(at_once).min(1 << args.fold_bits) as u32;
        let mut tables = 1 << args.group_bits;
        if separate {
            args.tables_at += factors_size;
            // Each warp makes the tables of a state, two where a second diagonal follows, as long
            // as there are blocks for all SMs and three quarters of them still find room.
            let states = 1 << (tile_threads - WARP_BITS);
            let parts_of_states = states << args.fold_bits;
            let wanted = states as u32 * (1 + args.multiplies);
            let shared = args.tables_at + wanted * args.tables_size;
            if args.tile_bits + args.fold_bits == n
                && (args.multiplies == 0 || args.fold_bits == 0)
                && parts >= at_once * parts_of_states
                && 4 * (cut.limits.shared / shared) >= 3 * (512 >> tile_threads)
            {
                args.ahead = states as u32;
                args.parts = parts_of_states as u32;
                tables = wanted;
            }
        }
        let shape = Shape {
            blocks: parts.div_ceil(u64::from(args.parts)),
            threads: 1 << (tile_threads + args.group_bits),
            shared: args.tables_at + tables * args.tables_size,
        };
        Self { args, register_bits, made_cells, shape }
    }
}

/// Bytes of the factors of a tile's threads in shared memory: `Diagonal` of phase.cuh.
pub(super) fn factors_size(args: &DiagonalArgs, register_bits: u32, precision: Precision) -> u32 {
    if args.generate == 0 && args.multiplies == 0 {
        return 0;
    }
    let c = cell_bits(precision);
    let others = c + register_bits + args.fold_bits;
    (precision.size() as u32 * (1 + others)) << (args.tile_bits - c - register_bits)
}

/// Bytes of a state's tables in shared memory, `beside` included: `Diagonal` of phase.cuh.
pub(super) fn tables_size(
    args: &DiagonalArgs,
    register_bits: u32,
    precision: Precision,
    beside: u32,
) -> u32 {
    if args.generate == 0 && args.multiplies == 0 {
        return 0;
    }
    let (n, c) = (args.common.num_qubits, cell_bits(precision));
    let amplitude = precision.size() as u32;
    let turns = amplitude / 2;
    let thread_bits = args.tile_bits - c - register_bits;
    let (lows, highs) = (thread_bits.div_ceil(2), thread_bits / 2);
    let others = c + register_bits + args.fold_bits;
    let first = register_bits / 2;
    let folded = ((16 << (register_bits - first)) + (amplitude << first)).next_multiple_of(16);
    let corners = (16 << register_bits) + folded * ((1 << args.fold_bits) - 1);
    let coefficients = n * n + 3 * n;
    let phases = (others << lows) + ((lows + others) << highs) + (1 << lows) + (1 << highs);
    let bytes = beside + corners + turns * (coefficients + phases) + 4 * (n + 1);
    // An odd number of 16 bytes, so that neighbouring states lie in different banks.
    (bytes.div_ceil(16) | 1) * 16
}

/// The launches of one encode, in order. They walk over the sets of bits and back, one transform
/// each way: the last set of a transform is the first of the next, and takes the diagonal between.
struct Passes {
    cut: Cut,
    args: DiagonalArgs,
    transforms: u32,
    /// Of those, how many are complete.
    done: u32,
    set: u32,
    ascending: bool,
    /// Diagonals so far.
    diagonals: u32,
    finished: bool,
}

impl Passes {
    fn new(diagonal: &Diagonal, cut: Cut, args: DiagonalArgs) -> Self {
        let transforms = transforms(diagonal);
        let (done, set, ascending, diagonals, finished) = (0, 0, true, 0, false);
        Self { cut, args, transforms, done, set, ascending, diagonals, finished }
    }
}

impl Iterator for Passes {
    type Item = Pass;

    fn next(&mut self) -> Option<Pass> {
        if self.finished {
            return None;
        }
        let (n, reps) = (self.args.common.num_qubits, self.args.reps);
        let mut args = DiagonalArgs { diagonals: self.diagonals, ..self.args };
        if self.diagonals == 0 {
            args.generate = 1;
            args.fold_bits = self.cut.fold_bits;
            self.diagonals = 1;
        }
        args.tile_bits = self.cut.tile_bits;
        let sets = self.cut.sets;
        if sets == 1 || self.transforms == 0 {
            args.transforms = self.transforms;
            args.multiplies = reps - 1;
            self.finished = true;
            return Some(Pass::new(args, &self.cut));
        }
        if self.set > 0 {
            let below = self.cut.tile_bits + self.cut.fold_bits;
            let bit = |set: u32| below + (n - below) * set / (sets - 1);
            let (from, to) = (bit(self.set - 1), bit(self.set));
            args.low_bit = from;
            args.tile_bits = self.cut.strided_bits;
            args.column_bits = args.tile_bits - (to - from);
        }
        args.transforms = 1;
        if self.set == (if self.ascending { sets - 1 } else { 0 }) {
            self.done += 1;
            self.ascending = !self.ascending;
            if self.diagonals < reps {
                self.diagonals += 1;
                args.multiplies = 1;
                args.transforms += u32::from(self.done < self.transforms);
            }
            self.finished = self.done == self.transforms;
        }
        self.set = if self.ascending { self.set + 1 } else { self.set.saturating_sub(1) };
        Some(Pass::new(args, &self.cut))
    }
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

    fn passes(
        encoding: &Encoding,
        n: u32,
        precision: Precision,
        batch: u64,
        limits: Limits,
    ) -> (Diagonal, Vec<Pass>) {
        let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
        let Form::Diagonal(diagonal) = spec.form(spec.num_features()).unwrap() else {
            panic!("not a diagonal encoding");
        };
        let mut common = CommonArgs::new(&Input::sample(&[0.0]), (0, 0), (0, 0, 0), n);
        common.batch = batch;
        let cut = Cut::new(&diagonal, precision, batch, limits);
        let list = Passes::new(&diagonal, cut, DiagonalArgs::new(common, &diagonal, 0)).collect();
        (diagonal, list)
    }

    fn for_all(mut check: impl FnMut(&Diagonal, Precision, Limits, &[Pass])) {
        for limits in LIMITS {
            for precision in [Precision::Complex64, Precision::Complex128] {
                for encoding in encodings() {
                    for n in 2..=34 {
                        for batch in [1, 3, 64, 5000] {
                            let (diagonal, list) = passes(&encoding, n, precision, batch, limits);
                            check(&diagonal, precision, limits, &list);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_transform_covers_every_bit_once() {
        for_all(|diagonal, _, _, list| {
            let mut covered = vec![0; diagonal.num_qubits as usize];
            for Pass { args, .. } in list {
                assert!(args.column_bits <= args.low_bit);
                for bit in 0..args.tile_bits - args.column_bits {
                    covered[(args.low_bit + bit) as usize] += args.transforms;
                }
                for bit in 0..args.fold_bits {
                    covered[(args.tile_bits + bit) as usize] += args.transforms;
                }
            }
            let transforms = transforms(diagonal);
            assert_eq!(covered, vec![transforms; diagonal.num_qubits as usize], "{list:?}");
        });
    }

    #[test]
    fn diagonals_come_in_order_and_passes_are_few() {
        for_all(|diagonal, _, limits, list| {
            let mut diagonals = 0;
            for Pass { args, .. } in list {
                assert_eq!(args.diagonals, diagonals);
                assert_eq!(args.generate, u32::from(diagonals == 0));
                diagonals += args.generate + args.multiplies;
            }
            assert_eq!(diagonals, diagonal.reps);
            // Two folded bits spare a pass whatever the tile.
            if transforms(diagonal) == 1 && diagonal.num_qubits <= 13 {
                assert!(list.len() == 1 || limits.shared < 99 << 10, "{list:?}");
            }
            // No more than one extra pass for a transform.
            if diagonal.num_qubits <= 24 && limits.sms == H200.sms {
                assert!(list.len() as u32 <= transforms(diagonal) + 1, "{list:?}");
            }
        });
    }

    #[test]
    fn launches_are_within_the_limits() {
        for_all(|diagonal, precision, limits, list| {
            for pass @ Pass { args, register_bits, made_cells, shape } in list {
                let cells = args.tile_bits - cell_bits(precision);
                assert!(shape.shared <= limits.shared, "{pass:?}");
                assert!((32..=1 << THREAD_BITS[*register_bits as usize]).contains(&shape.threads));
                assert_eq!(shape.threads << register_bits, 1 << (cells + args.group_bits));
                assert!(args.group_bits == 0 || args.tile_bits == diagonal.num_qubits, "{pass:?}");
                assert!(args.fold_bits <= MAX_FOLD_BITS && args.tables_size.is_multiple_of(16));
                let columns = args.column_bits.saturating_sub(cell_bits(precision));
                assert!(args.column_bits == 0 || columns >= MIN_COLUMN_CELLS, "{pass:?}");
                if made_cells.is_some() {
                    assert!(args.generate == 1 && args.transforms <= 1 && *register_bits == 4);
                    assert!(cells >= 11 || shape.threads <= 1 << GROUP_THREAD_BITS, "{pass:?}");
                }
                // Blocks that make tables ahead begin with a state, and do so once.
                assert!(args.ahead == 1 || args.parts == args.ahead << args.fold_bits);
                assert!(args.ahead == 1 || made_cells.is_some() && args.group_bits == 0);
                let tiles = args.common.batch << (diagonal.num_qubits - args.tile_bits);
                assert!((shape.blocks * u64::from(args.parts)) << args.group_bits >= tiles);
            }
        });
    }
}
