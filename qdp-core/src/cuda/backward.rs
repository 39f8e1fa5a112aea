//! Gradients on an open device.
//!
//! As for device input that is encoded: on the caller's stream, and nothing waits.

use super::kernels::{GradientArgs, Held, LaunchStream};
use super::{CudaBackend, DeviceBuffer, RawStream};
use crate::engine::EncodeOptions;
use crate::error::Result;
use crate::gradient::Gradient;
use crate::input::Input;
use crate::plan::EncodePlan;
use std::sync::Arc;

impl CudaBackend {
    /// Enqueues the gradient of device input by the cotangent of its states.
    pub(crate) fn backward(
        self: &Arc<Self>,
        plan: &EncodePlan,
        input: &Input<'_>,
        cotangent: &Input<'_>,
        gradient: &mut Gradient<'_>,
        options: &EncodeOptions,
    ) -> Result<()> {
        self.start_call(false)?;
        if input.batch() == 0 {
            return Ok(());
        }
        let stream = options.stream.unwrap_or(self.stream());
        let captured = stream.is_capturing(&self.context)?;
        let args = GradientArgs::new(input, cotangent, gradient, plan.spec().num_qubits());
        // The ticket is never asked about: it keeps the backend until the stream has passed.
        let ticket = (!captured).then(|| self.board.issue(plan, captured)).transpose()?;
        let to = self.kernels.on(stream, captured);
        // SAFETY: the caller describes valid arrays.
        let launched = unsafe { self.enqueue_backward(plan, args, stream, captured, to) };
        let Some(ticket) = ticket else { return launched };
        launched
            .and_then(|()| self.board.enqueued(ticket, stream))
            .inspect_err(|_| self.board.abandon(ticket, stream))
    }

    /// # Safety
    ///
    /// `args` describe valid arrays in the order of `stream`.
    unsafe fn enqueue_backward(
        self: &Arc<Self>,
        plan: &EncodePlan,
        args: GradientArgs,
        stream: RawStream,
        captured: bool,
        to: LaunchStream,
    ) -> Result<()> {
        let bytes = self.kernels.gradient_workspace_bytes(plan, &args);
        let prepared = self.prepare(plan)?;
        let workspace = self.working_memory(bytes, captured, stream)?;
        let ptr = |buffer: Option<&DeviceBuffer>| buffer.map_or(0, DeviceBuffer::ptr);
        let held = Held {
            workspace: ptr(workspace.as_ref()),
            multiplicity: ptr(prepared.multiplicity.as_deref()),
            ..Held::default()
        };
        // SAFETY: the caller's promise; workspace and multiplicity are the backend's, which outlives
        // its enqueued work: its drop waits for the board's slots, and captured work keeps it for
        // good.
        let launched = unsafe { self.kernels.enqueue_gradient(plan, args, held, to) };
        if captured {
            // Also where a later launch failed: the graph may hold an earlier one.
            self.keep_captured([workspace, None], prepared);
        }
        launched
    }
}
