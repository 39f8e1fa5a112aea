//! Launches of diagonal.cu.

use super::{CommonArgs, Held, LaunchStream, Loader, Shape};
use crate::cuda::Function;
use crate::element::Precision;
use crate::encoding::Diagonal;
use crate::error::Result;

/// `MAX_TILE_BITS` of diagonal.cu.
const MAX_TILE_BITS: u32 = 12;
/// Columns beside the transformed bits of a strided tile: 8 amplitudes fill a memory line.
const MIN_COLUMN_BITS: u32 = 3;

/// Mirrors `qdp::DiagonalArgs`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct DiagonalArgs {
    common: CommonArgs,
    multiplicity: u64,
    scale: f64,
    last_scale: f64,
    kind: u32,
    reps: u32,
    big_endian: u32,
    generate: u32,
    transforms: u32,
    multiplies: u32,
    low_bit: u32,
    tile_bits: u32,
    column_bits: u32,
    unused: u32,
}

pub(super) struct Kernels {
    diagonal: [Function; 2],
    /// Bits of the largest tile that fits a block's shared memory.
    tile_bits: [u32; 2],
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        let diagonal = loader.by_precision("qdp_diagonal")?;
        let mut tile_bits = [0; 2];
        for precision in [Precision::Complex64, Precision::Complex128] {
            let kernel = &diagonal[precision as usize];
            let room =
                loader.context.max_shared_memory_per_block() - kernel.static_shared_bytes()?;
            let bits = (1..=MAX_TILE_BITS).rfind(|&bits| tile_bytes(bits, precision) <= room);
            let bits = bits.unwrap_or(1);
            kernel.set_max_dynamic_shared(tile_bytes(bits, precision))?;
            tile_bits[precision as usize] = bits;
        }
        Ok(Self { diagonal, tile_bits })
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
        let which = precision as usize;
        let args = DiagonalArgs::new(common, diagonal, held.multiplicity);
        for pass in passes(diagonal, self.tile_bits[which], args) {
            let shape = Shape {
                blocks: common.batch << (common.num_qubits - pass.tile_bits),
                threads: (1u32 << pass.tile_bits >> 3).clamp(32, 256),
                shared: tile_bytes(pass.tile_bits, precision),
                ..Shape::default()
            };
            // SAFETY: the caller's promise; the arguments mirror the kernel's parameter.
            unsafe { shape.launch(&self.diagonal[which], &pass, stream)? };
        }
        Ok(())
    }
}

impl DiagonalArgs {
    fn new(common: CommonArgs, diagonal: &Diagonal, multiplicity: u64) -> Self {
        Self {
            common,
            multiplicity,
            scale: 1.0,
            last_scale: 1.0,
            kind: diagonal.terms as u32,
            reps: diagonal.reps,
            big_endian: u32::from(diagonal.big_endian),
            generate: 0,
            transforms: 0,
            multiplies: 0,
            low_bit: 0,
            tile_bits: 0,
            column_bits: 0,
            unused: 0,
        }
    }
}

/// Shared memory of a tile with its padding (`padded` in diagonal.cu).
fn tile_bytes(bits: u32, precision: Precision) -> u32 {
    let size = 1u32 << bits;
    (size + size / 16) * precision.size() as u32
}

/// The launches of the diagonal kernel for one encode, in order.
fn passes(diagonal: &Diagonal, tile_bits: u32, args: DiagonalArgs) -> Vec<DiagonalArgs> {
    let n = diagonal.num_qubits;
    let transforms = diagonal.reps - 1 + u32::from(diagonal.final_hadamard);
    if n <= tile_bits {
        return vec![DiagonalArgs {
            generate: 1,
            transforms,
            multiplies: diagonal.reps - 1,
            tile_bits: n,
            scale: diagonal.scale(0),
            last_scale: diagonal.scale(diagonal.reps - 1),
            ..args
        }];
    }
    // `diagonal.scale` of the one diagonal that a pass makes or multiplies.
    let scaled = |rep| {
        let scale = diagonal.scale(rep);
        DiagonalArgs { tile_bits, scale, last_scale: scale, ..args }
    };
    if transforms == 0 {
        return vec![DiagonalArgs { generate: 1, ..scaled(0) }];
    }
    let high_bits = n - tile_bits;
    let high_passes = high_bits.div_ceil(tile_bits - MIN_COLUMN_BITS);
    let mut passes = Vec::new();
    for t in 0..transforms {
        let generate = u32::from(t == 0);
        passes.push(DiagonalArgs { generate, transforms: 1, ..scaled(0) });
        let mut low_bit = tile_bits;
        for pass in 0..high_passes {
            let bits = (n - low_bit).div_ceil(high_passes - pass);
            let last = pass + 1 == high_passes;
            let rep = t + 1;
            let multiply = last && rep < diagonal.reps;
            passes.push(DiagonalArgs {
                transforms: 1,
                multiplies: u32::from(multiply),
                low_bit,
                column_bits: tile_bits - bits,
                ..scaled(if multiply { rep } else { 0 })
            });
            low_bit += bits;
        }
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{EncodeSpec, Encoding, Entanglement, Form};
    use crate::input::Input;

    fn passes_of(encoding: Encoding, n: u32) -> (Diagonal, Vec<DiagonalArgs>) {
        let spec = EncodeSpec::new(encoding, n).unwrap();
        let Form::Diagonal(diagonal) = spec.form(spec.num_features()).unwrap() else {
            panic!("not a diagonal encoding");
        };
        let common = CommonArgs::new(&Input::sample(&[0.0]), (0, 0), (0, 0, 0), n);
        let args = DiagonalArgs::new(common, &diagonal, 0);
        let list = passes(&diagonal, 12, args);
        (diagonal, list)
    }

    #[test]
    fn every_transform_covers_every_bit_once() {
        for n in 2..=34 {
            for reps in 1..=3 {
                let zz = Encoding::Zz { reps, entanglement: Entanglement::default() };
                for encoding in [zz, Encoding::Iqp] {
                    let (diagonal, list) = passes_of(encoding, n);
                    let transforms = diagonal.reps - 1 + u32::from(diagonal.final_hadamard);
                    let mut covered = vec![0; n as usize];
                    for pass in &list {
                        for bit in 0..pass.tile_bits - pass.column_bits {
                            covered[(pass.low_bit + bit) as usize] += pass.transforms;
                        }
                        assert!(pass.column_bits <= pass.low_bit);
                        assert!(pass.column_bits == 0 || pass.column_bits >= MIN_COLUMN_BITS);
                    }
                    assert_eq!(covered, vec![transforms; n as usize], "n={n} reps={reps}");
                    assert_eq!(list.iter().map(|pass| pass.generate).sum::<u32>(), 1);
                    let multiplies: u32 = list.iter().map(|pass| pass.multiplies).sum();
                    assert_eq!(multiplies, diagonal.reps - 1);
                }
            }
        }
    }
}
