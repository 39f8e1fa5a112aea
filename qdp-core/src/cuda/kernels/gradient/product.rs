//! Launches of `product_gradient.cu`.

use super::super::product::FactorArgs;
use super::super::{LaunchStream, Loader, Shape};
use super::GradientArgs;
use crate::cuda::Function;
use crate::element::Precision;
use crate::encoding::Product;
use crate::error::Result;

/// `MAX_TEAM_BITS` of `product_gradient.cu`: 2^bits threads at most share a row, or a tile of a long
/// one.
const MAX_TEAM_BITS: u32 = 7;
/// Tiles of a chunk of a long row: 2^bits, at most `MAX_OUTER_BITS` there.
///
/// Fractions of the read-only rate (4.26 TB/s) on one H200, bytes of cotangent, features and
/// gradient, `angle` with 512 MiB of cotangent, by these bits. Up to n = 11 and 10 rows are not long.
///
/// | | n = 4 | 6 | 7 | 8 | 10 | 11 | 12 | 14 | 18 | 22 | 24 |
/// |---|---|---|---|---|---|---|---|---|---|---|---|
/// | complex64: 2 bits | | | | | | | 0.84 | 0.88 | 0.87 | 0.85 | 0.80 |
/// | 3 | 0.37 | 0.65 | 0.83 | 0.92 | 0.86 | 0.89 | 0.84 | 0.92 | 0.89 | 0.88 | 0.86 |
/// | 4 | | | | | | | 0.84 | 0.93 | 0.91 | 0.89 | 0.88 |
/// | complex128: 2 bits | | | | | | | 0.82 | 0.79 | 0.78 | 0.75 | 0.66 |
/// | 3 | 0.57 | 0.81 | 0.82 | 0.86 | 0.81 | 0.70 | 0.83 | 0.86 | 0.86 | 0.83 | 0.78 |
/// | 4 | | | | | | | 0.82 | 0.90 | 0.89 | 0.88 | 0.85 |
///
/// More would leave multiprocessors idle where rows are few: batch 64 at n = 14 is 64 blocks
/// already. Below n = 7, making the factors is what takes the time.
const OUTER_BITS: u32 = 3;
/// Threads of a block that adds up chunks.
const COMBINE_THREADS: u64 = 128;
/// Lanes that share the chunks of a row and bit.
const COMBINE_LANES: u64 = 32;

/// Mirrors `qdp::ProductGradientArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct ProductGradientArgs {
    gradient: GradientArgs,
    factor: FactorArgs,
    sums: u64,
    chunk_bits: u32,
    unused: u32,
}

pub(super) struct Kernels {
    /// By the bits of a team.
    teams: Vec<[Function; 2]>,
    long: [Function; 2],
    combine: Function,
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let team = |bits| loader.by_precision(&format!("qdp_product_gradient_{bits}"));
        Ok(Self {
            teams: (0..=MAX_TEAM_BITS).map(team).collect::<Result<_>>()?,
            long: loader.by_precision("qdp_product_gradient_long")?,
            combine: loader.function("qdp_product_gradient_combine")?,
        })
    }

    /// For the sums of the chunks of long rows.
    pub(super) fn workspace_bytes(precision: Precision, args: &GradientArgs) -> usize {
        let cut = Cut::of(precision, args.common.num_qubits);
        match cut.chunks() {
            1 => 0,
            chunks => {
                let sums = args.common.batch * u64::from(args.common.num_qubits) * chunks;
                sums as usize * size_of::<f64>()
            }
        }
    }

    /// # Safety
    ///
    /// As for [`super::super::Kernels::enqueue_gradient`].
    pub(super) unsafe fn enqueue(
        &self,
        product: &Product,
        precision: Precision,
        gradient: GradientArgs,
        workspace: u64,
        stream: LaunchStream,
    ) -> Result<()> {
        let cut = Cut::of(precision, gradient.common.num_qubits);
        let batch = gradient.common.batch;
        let args = ProductGradientArgs {
            gradient,
            factor: FactorArgs::new(product),
            sums: workspace,
            chunk_bits: cut.chunk_bits,
            unused: 0,
        };
        let kernels = if cut.long { &self.long } else { &self.teams[cut.team_bits as usize] };
        let kernel = &kernels[precision as usize];
        let blocks = batch.div_ceil(cut.rows()) * cut.chunks();
        // SAFETY: the caller's promise; the arguments mirror the kernels' parameter. The workspace
        // has a sum for each bit of each chunk, all of which are written before they are read.
        unsafe {
            Shape { blocks, threads: cut.threads(), shared: 0 }.launch(kernel, &args, stream)?;
            if cut.chunks() > 1 {
                let sums = batch * u64::from(cut.num_qubits);
                let threads = sums * cut.chunks().min(COMBINE_LANES);
                let blocks = threads.div_ceil(COMBINE_THREADS);
                let shape = Shape { blocks, threads: COMBINE_THREADS as u32, shared: 0 };
                shape.launch(&self.combine, &args, stream)?;
            }
        }
        Ok(())
    }
}

/// How rows are dealt to blocks.
#[derive(Debug, Clone, Copy)]
struct Cut {
    num_qubits: u32,
    /// 2^bits threads share a row.
    team_bits: u32,
    /// 2^bits amplitudes of a row belong to one block.
    chunk_bits: u32,
    /// Whether a row is longer than the tile that a block holds.
    long: bool,
}

impl Cut {
    fn of(precision: Precision, num_qubits: u32) -> Self {
        let held_bits = held_bits(precision);
        let team_bits = num_qubits.saturating_sub(held_bits).min(MAX_TEAM_BITS);
        let tile_bits = held_bits + team_bits;
        let chunk_bits = num_qubits.min(tile_bits + OUTER_BITS);
        Self { num_qubits, team_bits, chunk_bits, long: num_qubits > tile_bits }
    }

    /// Chunks of a row.
    fn chunks(self) -> u64 {
        1 << (self.num_qubits - self.chunk_bits)
    }

    /// Threads of a block: `TEAMS_THREADS` of `product_gradient.cu`.
    fn threads(self) -> u32 {
        if self.team_bits < 2 { 64 } else { 128 }
    }

    /// Rows of a block.
    fn rows(self) -> u64 {
        u64::from(self.threads() >> self.team_bits)
    }
}

/// `HELD_BITS` of `product_gradient.cu`: bits of the amplitudes of a thread, 8 loads of 16 bytes.
fn held_bits(precision: Precision) -> u32 {
    (8 * 16 / precision.size()).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_and_tiles_cover_a_row_once() {
        for precision in [Precision::Complex64, Precision::Complex128] {
            for n in 1..=50 {
                let cut = Cut::of(precision, n);
                let tile = held_bits(precision) + cut.team_bits;
                assert_eq!(u64::from(cut.threads()), cut.rows() << cut.team_bits);
                if cut.long {
                    assert!(tile < cut.chunk_bits && cut.chunk_bits <= n, "{n}");
                    assert!(cut.chunk_bits - tile <= OUTER_BITS && cut.rows() == 1);
                    assert_eq!(cut.chunks() << cut.chunk_bits, 1 << n);
                } else {
                    // A row is a tile, or, where one thread holds more than there is, part of one.
                    assert!(tile == n || n < tile && cut.team_bits == 0, "{n}");
                    assert_eq!(cut.chunks(), 1);
                }
            }
        }
    }
}
