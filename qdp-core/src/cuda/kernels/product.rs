//! Launches of product.cu.

use super::tile::{Tile, TileArgs};
use super::{CommonArgs, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::Precision;
use crate::encoding::product::Factor;
use crate::encoding::{Product, Rotation};
use crate::error::Result;

/// Bytes that a block writes.
///
/// Fractions of the write-only rate on one H200, `angle` with 1 GiB of output, by threads and bytes
/// of a block:
///
/// | | n = 4 | 6 | 8 | 10 | 12 | 16 | 24 |
/// |---|---|---|---|---|---|---|---|
/// | f32 to complex64: 128 x 8 KiB | | 0.60 | 0.87 | 0.92 | 0.96 | 0.94 | 0.89 |
/// | 128 x 16 KiB | 0.43 | 0.70 | 0.87 | 0.92 | 0.95 | 0.98 | 0.98 |
/// | f64 to complex64: 128 x 8 KiB | 0.43 | 0.60 | 0.80 | 0.89 | 0.96 | 0.94 | 0.93 |
/// | 128 x 16 KiB | 0.43 | 0.69 | 0.82 | 0.89 | 0.93 | 0.98 | 0.98 |
/// | 256 x 64 KiB | | | 0.81 | 0.86 | 0.91 | 0.95 | 0.96 |
/// | f64 to complex128: 128 x 8 KiB | 0.64 | 0.75 | 0.87 | 0.92 | 0.97 | 0.98 | 0.98 |
/// | 128 x 16 KiB | 0.69 | 0.81 | 0.88 | 0.91 | 0.95 | 0.98 | 0.98 |
/// | 256 x 64 KiB | | | 0.85 | 0.90 | 0.93 | 0.96 | 0.96 |
///
/// With 8 KiB, `phase`, of two sines more to a feature, falls to 0.84 at n = 24; with 16 KiB every
/// kind stays within 0.01 of `angle`. Reading the features is what is lost at n = 8: where the
/// cache holds them, at 256 MiB, complex64 from f64 has 0.88. Below, making the factors is.
const BLOCK_BYTES: u64 = 16 << 10;
/// Size of `qdp::Factor`: two complex numbers.
const FACTOR_BYTES: u32 = 32;

/// Mirrors `qdp::ProductArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct ProductArgs {
    tile: TileArgs,
    factor: FactorArgs,
}

/// Mirrors `qdp::FactorArgs` in product.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct FactorArgs {
    scale: f64,
    global: f64,
    kind: u32,
    reps: u32,
    big_endian: u32,
    final_hadamard: u32,
}

pub(super) struct Kernels {
    product: [Function; 2],
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        Ok(Self { product: loader.by_precision("qdp_product")? })
    }

    /// # Safety
    ///
    /// As for [`super::Kernels::enqueue`].
    pub(super) unsafe fn enqueue(
        &self,
        product: &Product,
        precision: Precision,
        common: CommonArgs,
        stream: LaunchStream,
    ) -> Result<()> {
        let tile = Tile::new(common, precision, BLOCK_BYTES);
        let args = ProductArgs { tile: tile.args, factor: FactorArgs::new(product) };
        let shape = Shape {
            blocks: tile.blocks,
            threads: tile.threads,
            shared: shared_bytes(&tile.args, precision),
        };
        // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
        unsafe { shape.launch(&self.product[precision as usize], &args, stream) }
    }
}

/// Each row has a factor for every qubit and tables over the lower and the upper half of the bits.
fn shared_bytes(tile: &TileArgs, precision: Precision) -> u32 {
    let upper_bits = tile.chunk_bits / 2;
    let entries = (1 << (tile.chunk_bits - upper_bits)) + (1 << upper_bits);
    tile.rows * (tile.common.num_qubits * FACTOR_BYTES + entries * precision.size() as u32)
}

impl FactorArgs {
    pub(super) fn new(product: &Product) -> Self {
        let (kind, scale) = match product.factor {
            Factor::Rotation { axis: Rotation::X, scale } => (0, scale),
            Factor::Rotation { axis: Rotation::Y, scale } => (1, scale),
            Factor::Rotation { axis: Rotation::Z, scale } => (2, scale),
            Factor::Layers { scale, .. } => (3, scale),
            Factor::Bit => (4, 0.0),
        };
        let (global, reps, final_hadamard) = match product.factor {
            Factor::Layers { global, reps, final_hadamard, .. } => {
                (global, reps, u32::from(final_hadamard))
            }
            _ => (0.0, 0, 0),
        };
        let big_endian = u32::from(product.big_endian);
        Self { scale, global, kind, reps, big_endian, final_hadamard }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::tests::common;
    use super::*;

    #[test]
    fn a_block_has_room_and_a_thread_per_store_of_the_lower_table() {
        for precision in [Precision::Complex64, Precision::Complex128] {
            for n in 1..=50 {
                for batch in [1, 64, 1 << 20] {
                    let common = common(n, batch, u64::from(n));
                    let tile = Tile::new(common, precision, BLOCK_BYTES);
                    assert!(shared_bytes(&tile.args, precision) <= 48 << 10);
                    let lower = 1 << tile.args.chunk_bits.div_ceil(2);
                    assert!(tile.threads as usize >= lower * precision.size() / 16);
                    assert!(tile.threads.is_power_of_two());
                }
            }
        }
    }
}
