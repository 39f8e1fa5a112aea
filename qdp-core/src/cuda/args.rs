//! The kernels' argument block and what its numbers mean.

use crate::encoding::product::Factor;
use crate::encoding::{Product, Rotation};
use crate::input::Input;

/// Mirrors `qdp::Args` in qdp-kernels/cuda/common.cuh; the two must stay equal field by field.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct KernelArgs {
    pub(super) input: u64,
    pub(super) output: u64,
    pub(super) multiplicity: u64,
    pub(super) partials: u64,
    pub(super) record: u64,
    pub(super) slot_flag: u64,
    pub(super) any_flag: u64,
    pub(super) row_stride: i64,
    pub(super) col_stride: i64,
    pub(super) output_stride: u64,
    pub(super) batch: u64,
    pub(super) features: u64,
    pub(super) chunk: u64,
    pub(super) scale: f64,
    pub(super) last_scale: f64,
    pub(super) global: f64,
    pub(super) dtype: u32,
    pub(super) num_qubits: u32,
    pub(super) kind: u32,
    pub(super) reps: u32,
    pub(super) big_endian: u32,
    pub(super) final_hadamard: u32,
    pub(super) generate: u32,
    pub(super) transforms: u32,
    pub(super) multiplies: u32,
    pub(super) low_bit: u32,
    pub(super) tile_bits: u32,
    pub(super) column_bits: u32,
}

impl KernelArgs {
    /// What every encoding passes.
    pub(super) fn new(input: &Input<'_>, output: u64, output_stride: u64, num_qubits: u32) -> Self {
        Self {
            input: input.as_ptr() as u64,
            output,
            multiplicity: 0,
            partials: 0,
            record: 0,
            slot_flag: 0,
            any_flag: 0,
            row_stride: input.strides().0 as i64,
            col_stride: input.strides().1 as i64,
            output_stride,
            batch: input.batch() as u64,
            features: input.features() as u64,
            chunk: 0,
            scale: 1.0,
            last_scale: 1.0,
            global: 0.0,
            dtype: input.dtype() as u32,
            num_qubits,
            kind: 0,
            reps: 0,
            big_endian: 0,
            final_hadamard: 0,
            generate: 0,
            transforms: 0,
            multiplies: 0,
            low_bit: 0,
            tile_bits: 0,
            column_bits: 0,
        }
    }

    /// The product state's share.
    pub(super) fn with_product(self, product: &Product) -> Self {
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
        Self { scale, global, kind, reps, big_endian, final_hadamard, ..self }
    }
}
