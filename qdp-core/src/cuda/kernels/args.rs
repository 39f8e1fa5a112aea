//! What every kernel is told.

use crate::affine::Vector;
use crate::input::Input;

/// Mirrors `qdp::Args` in qdp-kernels/cuda/common.cuh; the two must stay equal field by field.
/// Each encoding's own arguments start with these.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(in crate::cuda) struct CommonArgs {
    pub(super) input: u64,
    pub(super) output: u64,
    pub(super) record: u64,
    pub(super) slot_flag: u64,
    pub(super) any_flag: u64,
    pub(super) row_stride: i64,
    pub(super) col_stride: i64,
    pub(super) output_stride: u64,
    pub(super) batch: u64,
    pub(super) features: u64,
    pub(super) dtype: u32,
    pub(super) num_qubits: u32,
    pub(super) weight: Parameter,
    pub(super) bias: Parameter,
}

/// Mirrors `qdp::Parameter`: values of features' affine map; no address where there are none.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Parameter {
    values: u64,
    dtype: u32,
    _unused: u32,
}

impl Parameter {
    fn new(vector: Option<Vector<'_>>) -> Self {
        vector.map_or_else(Self::default, |vector| Self {
            values: vector.as_ptr() as u64,
            dtype: vector.dtype() as u32,
            _unused: 0,
        })
    }
}

impl CommonArgs {
    /// `input` encoded to device address `output`; `report` is where a bad value is told: the
    /// record, its flag and the flag of all.
    pub(in crate::cuda) fn new(
        input: &Input<'_>,
        (output, output_stride): (u64, u64),
        (record, slot_flag, any_flag): (u64, u64, u64),
        num_qubits: u32,
    ) -> Self {
        let affine = input.affine().copied().unwrap_or_default();
        Self {
            input: input.as_ptr() as u64,
            output,
            record,
            slot_flag,
            any_flag,
            row_stride: input.strides().0 as i64,
            col_stride: input.strides().1 as i64,
            output_stride,
            batch: input.batch() as u64,
            features: input.features() as u64,
            dtype: input.dtype() as u32,
            num_qubits,
            weight: Parameter::new(affine.weight),
            bias: Parameter::new(affine.bias),
        }
    }

    pub(super) fn dim(&self) -> u64 {
        1 << self.num_qubits
    }
}
