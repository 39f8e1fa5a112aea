//! The kernels of one device, resolved once, and the launches that evaluate a form.

use super::args::KernelArgs;
use super::{Context, DeviceBuffer, Function, Module, RawStream, launch};
use crate::element::{DType, Precision};
use crate::encoding::{Diagonal, Form};
use crate::error::{Error, Result, Unavailable};
use std::ffi::CString;
use std::sync::Arc;

/// Rows up to this many amplitudes take one block; longer ones two kernels.
const ROW_BITS: u32 = 13;
/// Long rows are cut into chunks of this many amplitudes, or into [`MAX_CHUNKS`].
const CHUNK: u64 = 1 << 13;
/// A bound on the sums that each block of the second kernel adds up.
const MAX_CHUNKS: u64 = 1 << 10;
/// Amplitudes of a block of the basis kernel.
const BASIS_CHUNK: u64 = 1 << 12;
/// Bits of a chunk of the product kernel (twice `TABLE_BITS` in product.cu).
const PRODUCT_BITS: u32 = 12;
/// `MAX_TILE_BITS` of diagonal.cu.
const MAX_TILE_BITS: u32 = 12;
/// Columns beside the transformed bits of a strided tile: 8 amplitudes fill a memory line.
const MIN_COLUMN_BITS: u32 = 3;

struct AmplitudeKernels {
    row: [Function; 2],
    norm: Function,
    scale: [Function; 2],
}

/// Every kernel, by precision where there are two (complex64, complex128).
pub(super) struct Kernels {
    amplitude: Vec<AmplitudeKernels>,
    product: [Function; 2],
    basis: [Function; 2],
    diagonal: [Function; 2],
    /// Bits of the largest tile that fits a block's shared memory.
    tile_bits: [u32; 2],
}

const DTYPES: [(DType, &str); 14] = [
    (DType::U8, "u8"),
    (DType::U16, "u16"),
    (DType::U32, "u32"),
    (DType::U64, "u64"),
    (DType::I8, "i8"),
    (DType::I16, "i16"),
    (DType::I32, "i32"),
    (DType::I64, "i64"),
    (DType::F16, "f16"),
    (DType::BF16, "bf16"),
    (DType::F32, "f32"),
    (DType::F64, "f64"),
    (DType::C64, "c64"),
    (DType::C128, "c128"),
];
const PRECISIONS: [(Precision, &str); 2] =
    [(Precision::Complex64, "c64"), (Precision::Complex128, "c128")];

impl Kernels {
    pub(super) fn load(context: &Arc<Context>) -> Result<Self> {
        let image = qdp_kernels::IMAGE.ok_or_else(|| Error::DeviceUnavailable {
            device: context.label(),
            reason: Unavailable::KernelsNotBuilt,
        })?;
        let module = Module::load(context, image, qdp_kernels::ARCHS)?;
        let function = |name: String| {
            let name = CString::new(name)
                .map_err(|error| Error::invalid("kernel", "a name without NUL", error))?;
            module.function(&name)
        };
        let pair = |stem: String| -> Result<[Function; 2]> {
            let [single, double] =
                PRECISIONS.map(|(_, suffix)| function(format!("{stem}_{suffix}")));
            Ok([single?, double?])
        };
        let amplitude = DTYPES
            .iter()
            .map(|(_, dtype)| {
                Ok(AmplitudeKernels {
                    row: pair(format!("qdp_amplitude_row_{dtype}"))?,
                    norm: function(format!("qdp_amplitude_norm_{dtype}"))?,
                    scale: pair(format!("qdp_amplitude_scale_{dtype}"))?,
                })
            })
            .collect::<Result<_>>()?;
        let diagonal = pair("qdp_diagonal".to_owned())?;
        let mut tile_bits = [0; 2];
        for (precision, _) in PRECISIONS {
            let kernel = &diagonal[precision as usize];
            let room = context.max_shared_memory_per_block() - kernel.static_shared_bytes()?;
            let bits = (1..=MAX_TILE_BITS).rfind(|&bits| tile_bytes(bits, precision) <= room);
            let bits = bits.unwrap_or(1);
            kernel.set_max_dynamic_shared(tile_bytes(bits, precision))?;
            tile_bits[precision as usize] = bits;
        }
        Ok(Self {
            amplitude,
            product: pair("qdp_product".to_owned())?,
            basis: pair("qdp_basis".to_owned())?,
            diagonal,
            tile_bits,
        })
    }

    /// Bytes of the partial sums that [`Kernels::enqueue`] needs as its workspace.
    pub(super) fn workspace_bytes(form: &Form, num_qubits: u32, batch: usize) -> usize {
        match form {
            Form::Amplitude if num_qubits > ROW_BITS => {
                batch * (chunks_of_long_row(num_qubits) as usize) * size_of::<f64>()
            }
            _ => 0,
        }
    }

    /// Enqueues the launches that evaluate `form`.
    ///
    /// # Safety
    ///
    /// The pointers in `args` (with `multiplicity` and `workspace` for the forms that need them)
    /// must be valid for the input and output that it describes, in the order of `stream`.
    pub(super) unsafe fn enqueue(
        &self,
        form: &Form,
        precision: Precision,
        args: KernelArgs,
        multiplicity: Option<&DeviceBuffer>,
        workspace: Option<&DeviceBuffer>,
        stream: RawStream,
    ) -> Result<()> {
        let n = args.num_qubits;
        let dim = 1u64 << n;
        let which = precision as usize;
        let run =
            |function: &Function, blocks: u64, threads: u64, shared: u32, args: &KernelArgs| {
                let grid = (blocks.min(i32::MAX as u64) as u32, 1, 1);
                // SAFETY: `KernelArgs` mirrors the kernels' one parameter; the rest is the caller's.
                unsafe { launch(function, grid, (threads as u32, 1, 1), shared, stream, args) }
            };
        match form {
            Form::Amplitude if n <= ROW_BITS => {
                let kernel = &self.amplitude[args.dtype as usize].row[which];
                run(kernel, args.batch, (dim / 4).clamp(32, 1024), 0, &args)
            }
            Form::Amplitude => {
                let kernels = &self.amplitude[args.dtype as usize];
                let chunks = chunks_of_long_row(n);
                let partials = workspace.map_or(0, DeviceBuffer::ptr);
                let args = KernelArgs { partials, chunk: dim / chunks, ..args };
                run(&kernels.norm, args.batch * chunks, 512, 0, &args)?;
                run(&kernels.scale[which], args.batch * chunks, 512, 0, &args)
            }
            Form::Basis => {
                let chunk = dim.min(BASIS_CHUNK);
                let args = KernelArgs { chunk, ..args };
                let threads = (chunk / 4).clamp(32, 256);
                run(&self.basis[which], args.batch * (dim / chunk), threads, 0, &args)
            }
            Form::Product(product) => {
                let chunk = 1u64 << n.min(PRODUCT_BITS);
                let threads = (chunk / 4).clamp(32, 256);
                let args = args.with_product(product);
                run(&self.product[which], args.batch * (dim / chunk), threads, 0, &args)
            }
            Form::Diagonal(diagonal) => {
                let args = KernelArgs {
                    multiplicity: multiplicity.map_or(0, DeviceBuffer::ptr),
                    kind: diagonal.terms as u32,
                    reps: diagonal.reps,
                    big_endian: u32::from(diagonal.big_endian),
                    ..args
                };
                for pass in passes(diagonal, self.tile_bits[which], args) {
                    let tiles = pass.batch << (n - pass.tile_bits);
                    let threads = (1u64 << pass.tile_bits >> 3).clamp(32, 256);
                    let shared = tile_bytes(pass.tile_bits, precision);
                    run(&self.diagonal[which], tiles, threads, shared, &pass)?;
                }
                Ok(())
            }
        }
    }
}

fn chunks_of_long_row(num_qubits: u32) -> u64 {
    ((1u64 << num_qubits) / CHUNK).min(MAX_CHUNKS)
}

/// Shared memory of a tile with its padding (`padded` in diagonal.cu).
fn tile_bytes(bits: u32, precision: Precision) -> u32 {
    let size = 1u32 << bits;
    (size + size / 16) * precision.size() as u32
}

/// The launches of the diagonal kernel for one encode, in order.
fn passes(diagonal: &Diagonal, tile_bits: u32, args: KernelArgs) -> Vec<KernelArgs> {
    let n = diagonal.num_qubits;
    let transforms = diagonal.reps - 1 + u32::from(diagonal.final_hadamard);
    if n <= tile_bits {
        return vec![KernelArgs {
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
        KernelArgs { tile_bits, scale, last_scale: scale, ..args }
    };
    if transforms == 0 {
        return vec![KernelArgs { generate: 1, ..scaled(0) }];
    }
    let high_bits = n - tile_bits;
    let high_passes = high_bits.div_ceil(tile_bits - MIN_COLUMN_BITS);
    let mut passes = Vec::new();
    for t in 0..transforms {
        let generate = u32::from(t == 0);
        passes.push(KernelArgs { generate, transforms: 1, ..scaled(0) });
        let mut low_bit = tile_bits;
        for pass in 0..high_passes {
            let bits = (n - low_bit).div_ceil(high_passes - pass);
            let last = pass + 1 == high_passes;
            let rep = t + 1;
            let multiply = last && rep < diagonal.reps;
            passes.push(KernelArgs {
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
    use crate::encoding::{EncodeSpec, Encoding, Entanglement};
    use crate::input::Input;

    fn passes_of(encoding: Encoding, n: u32) -> (Diagonal, Vec<KernelArgs>) {
        let spec = EncodeSpec::new(encoding, n).unwrap();
        let Form::Diagonal(diagonal) = spec.form(spec.num_features()).unwrap() else {
            panic!("not a diagonal encoding");
        };
        let args = KernelArgs::new(&Input::sample(&[0.0]), 0, 0, n);
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

    #[test]
    fn chunks_divide_long_rows() {
        for n in ROW_BITS + 1..=40 {
            let chunks = chunks_of_long_row(n);
            assert_eq!((1u64 << n) % chunks, 0);
            assert!((1..=MAX_CHUNKS).contains(&chunks));
        }
    }
}
