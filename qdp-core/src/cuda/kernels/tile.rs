//! How the output is dealt to blocks that each compute their part on their own.
//!
//! The less memory the blocks in flight spread over, the faster it takes their stores: on one H200
//! a kernel that only stores reaches 4.64 TB/s with 16 KiB to a block of 512 threads and 4.40 with
//! 256 KiB, and forcing more blocks of the product kernel onto a multiprocessor costs it 4 %. So
//! blocks are small, which also starts small batches sooner; how small is measured for each kernel.

use super::CommonArgs;
use crate::element::Precision;

const MAX_THREADS: u64 = 128;
/// Of a block's rows together: a bound on its shared memory.
const MAX_FEATURES: u64 = 512;
/// A small batch of short rows is spread over this many blocks; more begin no sooner.
const MIN_BLOCKS: u64 = 32;

/// Mirrors `qdp::TileArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct TileArgs {
    pub(super) common: CommonArgs,
    pub(super) rows: u32,
    pub(super) chunk_bits: u32,
}

/// The part of a block: some rows, or a chunk of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub(super) args: TileArgs,
    pub(super) blocks: u64,
    pub(super) threads: u32,
}

impl Tile {
    /// Blocks of `bytes` of output, a power of two, or less where rows are short and few.
    pub(super) fn new(common: CommonArgs, precision: Precision, bytes: u64) -> Self {
        let size = precision.size() as u64;
        let chunk = common.dim().min(bytes / size);
        let rows = (bytes / size / chunk)
            .min(MAX_FEATURES / common.features)
            .min(common.batch / MIN_BLOCKS)
            .max(1);
        let chunks = common.dim() / chunk;
        let stores = (rows * chunk * size).div_ceil(16);
        Self {
            args: TileArgs { common, rows: rows as u32, chunk_bits: chunk.ilog2() },
            blocks: common.batch.div_ceil(rows) * chunks,
            threads: stores.next_power_of_two().clamp(32, MAX_THREADS) as u32,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::args::Parameter;
    use super::*;

    pub(in super::super) fn common(num_qubits: u32, batch: u64, features: u64) -> CommonArgs {
        CommonArgs {
            input: 0,
            output: 0,
            record: 0,
            slot_flag: 0,
            any_flag: 0,
            row_stride: 0,
            col_stride: 0,
            output_stride: 1 << num_qubits,
            batch,
            features,
            dtype: 0,
            num_qubits,
            weight: Parameter::default(),
            bias: Parameter::default(),
        }
    }

    #[test]
    fn tiles_cover_the_output_once() {
        for precision in [Precision::Complex64, Precision::Complex128] {
            for n in 1..=30 {
                for batch in [1, 2, 31, 32, 33, 64, 1000, 65_537] {
                    for (features, bytes) in [(1, 1 << 13), (u64::from(n), 1 << 14)] {
                        let tile = Tile::new(common(n, batch, features), precision, bytes);
                        let rows = u64::from(tile.args.rows);
                        let chunks = 1 << (n - tile.args.chunk_bits);
                        assert!(rows == 1 || chunks == 1, "rows are whole or alone");
                        assert_eq!(tile.blocks, batch.div_ceil(rows) * chunks);
                        assert!(rows * features <= MAX_FEATURES);
                        assert!(tile.blocks >= batch.min(MIN_BLOCKS));
                        assert!((rows << tile.args.chunk_bits) * precision.size() as u64 <= bytes);
                    }
                }
            }
        }
    }
}
