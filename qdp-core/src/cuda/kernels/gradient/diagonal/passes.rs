//! How larger states are cut into tiles, and the launches over them.

use super::{Args, coefficients, transform_scale};
use crate::cuda::kernels::diagonal::{
    COLUMN_CELLS, DiagonalArgs, Limits, MAX_TILE_CELLS, MIN_COLUMN_CELLS, REGISTER_BITS,
    TILE_CELLS, cell_bits, factors_size, tables_size,
};
use crate::cuda::kernels::{CommonArgs, Shape};
use crate::element::Precision;
use crate::encoding::Diagonal;

/// What the rows of a round take in the workspace, where that is several rows.
const ROUND_BYTES: u64 = 256 << 20;
/// Blocks that an SM should have before they take several tiles.
const BLOCKS_PER_SM: u64 = 16;
/// Bits of the number of tiles that a block takes, at most.
const MAX_PARTS_BITS: u32 = 4;
/// How larger states are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) precision: Precision,
    limits: Limits,
    num_qubits: u32,
    reps: u32,
    final_hadamard: bool,
    pub(super) scale: f64,
    /// Bits of a tile of neighbouring amplitudes.
    tile_bits: u32,
    /// Bits of a strided tile.
    strided_bits: u32,
    /// Sets of bits that take turns: those of a tile, and those of the strided tiles.
    sets: u32,
}

/// A launch over all tiles of one set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) set: u32,
    /// Transforms before the diagonal, or without one.
    pub(super) before: u32,
    /// Which diagonal, counted from 1.
    pub(super) diagonal: Option<u32>,
    pub(super) after: u32,
    /// Whether nothing is left to do with the tile.
    pub(super) last: bool,
}

/// Addresses in the workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub(super) cotangents: u64,
    pub(super) states: u64,
    /// Of tiles, of strided tiles.
    pub(super) sums: [u64; 2],
    pub(super) coefficients: u64,
}

impl Cut {
    pub(super) fn new(
        diagonal: &Diagonal,
        precision: Precision,
        common: CommonArgs,
        limits: Limits,
    ) -> Self {
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
            limits,
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
    pub(super) fn launches(&self) -> Vec<Launch> {
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
    pub(super) fn pass(&self, mut args: Args, launch: Launch) -> (Args, Shape) {
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
        // A block takes neighbouring tiles of a state, as long as there are blocks for all SMs.
        let wanted = tiles / (BLOCKS_PER_SM * self.limits.sms);
        let most = self.num_qubits - tables.tile_bits;
        tables.parts = 1 << wanted.max(1).ilog2().min(most).min(MAX_PARTS_BITS);
        let shape = Shape {
            blocks: tiles / u64::from(tables.parts),
            threads: 1 << (cells - REGISTER_BITS),
            shared: shared_size(tables, tables.tile_bits, self.precision),
        };
        (args.before, args.after) = (launch.before, launch.after);
        (args, shape)
    }

    /// Amplitudes of a row that are kept between launches: those of its cotangent, and of the state
    /// before a diagonal.
    pub(super) fn kept(&self) -> [u64; 2] {
        let dim = (1 << self.num_qubits) * self.precision.size() as u64;
        [if self.launches().len() > 1 { dim } else { 0 }, if self.reps > 1 { dim } else { 0 }]
    }

    /// Bytes of what the tiles of a row leave, and the strided ones.
    pub(super) fn sums(&self) -> [u64; 2] {
        [self.tile_bits, self.strided_bits].map(|bits| {
            if bits == 0 { 0 } else { (8 * coefficients(bits)) << (self.num_qubits - bits) }
        })
    }

    /// Bytes of the workspace that a row takes: a multiple of 16.
    pub(super) fn row_bytes(&self) -> u64 {
        let parts = self.kept().into_iter().chain(self.sums());
        parts
            .chain([8 * coefficients(self.num_qubits)])
            .map(|bytes| bytes.next_multiple_of(16))
            .sum()
    }

    /// Rows of a round.
    pub(super) fn round(&self, batch: u64) -> u64 {
        (ROUND_BYTES / self.row_bytes()).clamp(1, batch.max(1))
    }

    pub(super) fn places(&self, workspace: u64, rows: u64) -> Places {
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
    use super::super::Cotangent;
    use super::super::cases::{H200, for_all};
    use super::*;

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
