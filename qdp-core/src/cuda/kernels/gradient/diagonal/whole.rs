//! States that a block holds.

use super::{Args, Cotangent, coefficients};
use crate::cuda::kernels::diagonal::{
    GROUP_THREAD_BITS, Limits, MAX_TILE_CELLS, MIN_MADE_CELLS, MIN_REGISTER_BITS, REGISTER_BITS,
    THREAD_BITS, THREADS_PER_SM, WARP_BITS, cell_bits, factors_size, tables_size,
};
use crate::cuda::kernels::{CommonArgs, Shape};
use crate::element::Precision;
use crate::encoding::Diagonal;
use crate::encoding::diagonal::PairTerms;

/// The least bits of a cell's number for which the kernels that know them are the faster also where
/// states are few, and fewer cells in registers would make more threads: 64 states of iqp,
/// complex64, take them 6.3 us instead of 7.7 at n = 12, but 8.3 instead of 6.8 at n = 8 (H200).
const KNOWN_CELLS: u32 = 11;

/// States that a block holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whole {
    precision: Precision,
    limits: Limits,
    pub(super) register_bits: u32,
    pub(super) cells: u32,
    transforms: bool,
    /// Whether several diagonals need the cotangent while a state is made.
    stash: bool,
    /// Whether features are not the coefficients themselves.
    derived: bool,
}

impl Whole {
    /// `None` where a block cannot hold a state.
    pub(super) fn new(
        diagonal: &Diagonal,
        precision: Precision,
        common: CommonArgs,
        limits: Limits,
    ) -> Option<Self> {
        let cells = diagonal.num_qubits - cell_bits(precision);
        let layered = diagonal.reps > 1;
        let per_thread =
            (common.batch << cells.min(MAX_TILE_CELLS)) / (THREADS_PER_SM * limits.sms);
        let wanted = per_thread.max(1).ilog2().clamp(MIN_REGISTER_BITS, REGISTER_BITS);
        let wanted = if cells >= KNOWN_CELLS { REGISTER_BITS } else { wanted };
        let register_bits = (wanted..=REGISTER_BITS)
            .find(|&bits| cells <= bits + THREAD_BITS[bits as usize])?
            .min(cells);
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
    pub(super) fn made_cells(&self) -> Option<u32> {
        Some(self.cells).filter(|cells| {
            self.register_bits == REGISTER_BITS && (MIN_MADE_CELLS..=MAX_TILE_CELLS).contains(cells)
        })
    }

    pub(super) fn launch(&self, mut args: Args) -> (Args, Shape) {
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

#[cfg(test)]
mod tests {
    use super::super::cases::{H200, case, encodings, for_all};
    use super::*;
    use crate::cuda::kernels::diagonal::DiagonalArgs;

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
}
