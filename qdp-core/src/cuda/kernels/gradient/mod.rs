//! Launches of the gradients: of a loss by the features, given its gradient by the states.

mod amplitude;
mod diagonal;
mod product;

use super::{CommonArgs, Held, LaunchStream, Loader};
use crate::encoding::Form;
use crate::error::Result;
use crate::gradient::{Gradient, no_gradient_of};
use crate::input::Input;
use crate::plan::EncodePlan;

/// Where a cotangent lies. Mirrors `qdp::Cotangent` in qdp-kernels/cuda/gradient.cuh.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Cotangent {
    pub(super) values: u64,
    /// In amplitudes.
    pub(super) row_stride: i64,
    pub(super) col_stride: i64,
}

/// What every gradient's kernel is told. Mirrors `qdp::GradientArgs`; the output of the common
/// arguments is the gradient, its stride in elements of the input's type. Nothing is reported.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(in crate::cuda) struct GradientArgs {
    pub(super) common: CommonArgs,
    pub(super) cotangent: Cotangent,
}

impl GradientArgs {
    pub(in crate::cuda) fn new(
        input: &Input<'_>,
        cotangent: &Input<'_>,
        gradient: &mut Gradient<'_>,
        num_qubits: u32,
    ) -> Self {
        let output = (gradient.as_mut_ptr() as u64, gradient.row_stride() as u64);
        let (row_stride, col_stride) = cotangent.strides();
        Self {
            common: CommonArgs::new(input, output, (0, 0, 0), num_qubits),
            cotangent: Cotangent {
                values: cotangent.as_ptr() as u64,
                row_stride: row_stride as i64,
                col_stride: col_stride as i64,
            },
        }
    }
}

/// The gradients' kernels.
pub(super) struct Kernels {
    amplitude: amplitude::Kernels,
    product: product::Kernels,
    diagonal: diagonal::Kernels,
}

impl Kernels {
    pub(super) fn load(loader: &Loader<'_>) -> Result<Self> {
        Ok(Self {
            amplitude: amplitude::Kernels::load(loader)?,
            product: product::Kernels::load(loader)?,
            diagonal: diagonal::Kernels::load(loader)?,
        })
    }
}

impl super::Kernels {
    /// Bytes of device memory that a gradient needs beside its arrays.
    pub(in crate::cuda) fn gradient_workspace_bytes(
        &self,
        plan: &EncodePlan,
        args: &GradientArgs,
    ) -> usize {
        match plan.form() {
            Form::Amplitude => self.gradient.amplitude.workspace_bytes(plan.precision(), args),
            Form::Product(_) => product::Kernels::workspace_bytes(plan.precision(), args),
            Form::Diagonal(diagonal) => {
                self.gradient.diagonal.workspace_bytes(diagonal, plan.precision(), &args.common)
            }
            Form::Basis => 0,
        }
    }

    /// Enqueues the launches that write the gradient of the plan's form.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver);
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a form without a gradient.
    ///
    /// # Safety
    ///
    /// The pointers in `args` and `held` must be valid for the arrays that `args` describes and for
    /// what [`Kernels::gradient_workspace_bytes`](super::Kernels::gradient_workspace_bytes) asked
    /// for, in the order of `stream`.
    pub(in crate::cuda) unsafe fn enqueue_gradient(
        &self,
        plan: &EncodePlan,
        args: GradientArgs,
        held: Held,
        stream: LaunchStream,
    ) -> Result<()> {
        let (kernels, precision) = (&self.gradient, plan.precision());
        // SAFETY: passed on to the caller.
        unsafe {
            match plan.form() {
                Form::Amplitude => {
                    kernels.amplitude.enqueue(precision, args, held.workspace, stream)
                }
                Form::Product(product) => {
                    kernels.product.enqueue(product, precision, args, held.workspace, stream)
                }
                Form::Diagonal(diagonal) => {
                    let types = (plan.dtype(), precision);
                    let encode = &self.diagonal;
                    kernels.diagonal.enqueue(encode, diagonal, types, args, held, stream)
                }
                Form::Basis => Err(no_gradient_of(plan.spec())),
            }
        }
    }
}
