//! The calls of an engine that encode, and the one for their gradient.

use super::{Backend, Device, Engine};
use crate::cpu;
use crate::cpu::memory::HostBuffer;
use crate::cuda::{Encoded, PinnedBuffer, RawStream, Reading};
use crate::element::Precision;
use crate::encoding::EncodeSpec;
use crate::error::Result;
use crate::gradient::Gradient;
use crate::input::{Input, OwnedInput};
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::pipeline::dispatch::{Dispatched, EncodeFuture};
use crate::plan::EncodePlan;
use crate::shape::check_shape;
use crate::state::{StateBatch, Storage};
use std::sync::Arc;

/// How one encode is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeOptions {
    /// Precision of the result; `None` follows the input.
    pub precision: Option<Precision>,
    /// The caller's stream, on which device input is ready and the result is wanted.
    pub stream: Option<RawStream>,
    /// Wait for the validation of device input and raise at the call.
    pub validate_now: bool,
    /// Asked by a long call now and then, on the thread that made it, whether to go on: an error
    /// ([`Error::Interrupted`]) ends the call.
    pub interrupt: Option<fn() -> Result<()>>,
    /// Leave what deferred validation has found in earlier encodes to other calls, as it is not
    /// about what whoever asked for this one gave.
    pub leave_overdue: bool,
}

impl Engine {
    /// The plan for inputs like `input`, made now or found again.
    pub fn plan(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        precision: Option<Precision>,
    ) -> Result<Arc<EncodePlan>> {
        let (dtype, features) = (input.dtype(), input.features());
        let precision = precision.unwrap_or_else(|| input.natural_precision());
        if input.affine().is_some() && !spec.encoding().takes_affine() {
            input.refuse_affine(&format!("{} encoding", spec.encoding().name()))?;
        }
        self.shared.plans.find(spec, dtype, features, precision)
    }

    /// The plan for [`Engine::encode_into`]; refuses an output that the states do not fit.
    pub fn plan_into(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        output: &Output<'_>,
    ) -> Result<Arc<EncodePlan>> {
        let plan = self.plan(input, spec, Some(output.precision()))?;
        check_shape("out", (output.batch(), output.dim()), (input.batch(), spec.dim()))?;
        self.device().check_holds("out", output.device())?;
        Ok(plan)
    }

    /// Encodes into new memory on the engine's device.
    pub fn encode(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        precision: Option<Precision>,
    ) -> Result<StateBatch> {
        self.encode_with(input, spec, &EncodeOptions { precision, ..EncodeOptions::default() })
    }

    /// Encodes into new memory on the engine's device.
    ///
    /// Host input is validated before this returns. Device input is read on
    /// [`EncodeOptions::stream`] (the engine's own where it is `None`), nothing waits for it, and
    /// its validation is deferred unless [`EncodeOptions::validate_now`] is set. It must stay valid
    /// until the stream has passed the encode.
    pub fn encode_with(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        options: &EncodeOptions,
    ) -> Result<StateBatch> {
        let plan = self.plan(input, spec, options.precision)?;
        match &self.shared.backend {
            Backend::Cpu => {
                Device::Cpu.check_holds("data", input.device())?;
                let buffer = HostBuffer::new(plan.output_bytes(input.batch()))?;
                // SAFETY: the buffer is new, large enough, initialised and aligned to 64 bytes.
                let mut output = unsafe {
                    Output::from_raw(
                        buffer.as_ptr(),
                        plan.precision(),
                        Device::Cpu,
                        (input.batch(), spec.dim()),
                        spec.dim(),
                    )
                };
                cpu::encode(spec, plan.form(), input, &mut output, Interrupt::new(options))?;
                Ok(StateBatch::new(
                    Storage::Host(buffer),
                    plan.precision(),
                    spec.num_qubits(),
                    input.batch(),
                ))
            }
            Backend::Cuda(cuda) => {
                let states = cuda.encode(&plan, input, options)?;
                Ok(StateBatch::new(
                    Storage::Device(states),
                    plan.precision(),
                    spec.num_qubits(),
                    input.batch(),
                ))
            }
        }
    }

    /// Encodes into memory of the caller's on the engine's device; allocates nothing of the
    /// result's size. `options.precision` is taken from `output`.
    ///
    /// On a CUDA device `output` must stay valid until `options.stream` has passed the encode. On
    /// an error its contents are unspecified.
    pub fn encode_into(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        output: &mut Output<'_>,
        options: &EncodeOptions,
    ) -> Result<Encoded> {
        let plan = self.plan_into(input, spec, output)?;
        match &self.shared.backend {
            Backend::Cpu => {
                Device::Cpu.check_holds("data", input.device())?;
                cpu::encode(spec, plan.form(), input, output, Interrupt::new(options))?;
                Ok(Encoded::default())
            }
            Backend::Cuda(cuda) => cuda.encode_into(&plan, input, output, options),
        }
    }

    /// Writes the gradient of a loss by the features, given its gradient by the states.
    ///
    /// `input` has shape `(batch, features)` and a floating element type, complex for amplitude
    /// encoding only; `cotangent`, shape `(batch, 2^n)`, complex64 or complex128, any strides, is
    /// `dL/d(Re psi) + i dL/d(Im psi)` for the states psi that encoding `input` gives. `gradient`
    /// has the shape and element type of `input`: `dL/dx`, or `dL/d(Re x) + i dL/d(Im x)`. Both lie
    /// on the engine's device, and must stay valid until `options.stream` has passed the call.
    /// Computed in the precision of `cotangent`; no other option counts. Where the features are
    /// mapped ([`Input::with_affine`]), the gradient is that by the mapped ones.
    ///
    /// Nothing is validated: a sample that has no state (a value that is not finite, a norm of
    /// zero) gets a gradient of NaN.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for basis encoding, which has no gradient; [`Error::DType`],
    /// [`Error::Shape`], [`Error::FeatureCount`] and [`Error::DeviceMismatch`] for arrays other than
    /// described, in arguments `data`, `grad` and `out`; what the device fails with.
    pub fn backward(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        cotangent: &Input<'_>,
        gradient: &mut Gradient<'_>,
        options: &EncodeOptions,
    ) -> Result<()> {
        let precision = gradient.check(self.device(), spec, input, cotangent)?;
        let plan = self.plan(input, spec, Some(precision))?;
        match &self.shared.backend {
            Backend::Cpu => {
                let interrupt = Interrupt::new(options);
                cpu::gradient::backward(spec, plan.form(), input, cotangent, gradient, interrupt)
            }
            Backend::Cuda(cuda) => cuda.backward(&plan, input, cotangent, gradient, options),
        }
    }

    /// Encodes into new memory on the engine's device, asynchronously.
    ///
    /// Host input is encoded on the engine's dispatch thread, after every asynchronous encode
    /// before it, and let go before the future is done. Device input is encoded at the call, as
    /// its stream orders the work already; the future that comes back is done, and the input is
    /// kept until the stream has passed the encode. Every error comes through the future.
    pub fn encode_async(
        &self,
        input: OwnedInput,
        spec: EncodeSpec,
        options: EncodeOptions,
    ) -> EncodeFuture {
        if input.input().device() == Device::Cpu {
            let engine = self.clone();
            let stream = options.stream.map(RawStream::for_any_thread);
            let options = EncodeOptions { stream, ..options };
            return self.dispatch(move || engine.encode_with(&input.input(), &spec, &options));
        }
        let result = self.encode_with(&input.input(), &spec, &options);
        if let Some(stream) = options.stream.or_else(|| self.stream()) {
            // Where this fails, the owner is dropped: the context is broken, and nothing runs in
            // it any more.
            let _ = self.keep_until_done(stream, input.into_owner());
        }
        Dispatched::done(result)
    }

    /// Describes memory of the caller's, in use on `stream`, as a batch of states: those that the
    /// [`Engine::encode_into`] that answered `encoded` wrote.
    ///
    /// # Safety
    ///
    /// `output` describes memory that stays valid until `owner` is dropped.
    pub unsafe fn adopt(
        &self,
        output: &mut Output<'_>,
        num_qubits: u32,
        encoded: Encoded,
        stream: Option<RawStream>,
        owner: Box<dyn Send + Sync>,
    ) -> StateBatch {
        let shape = (output.batch(), output.row_stride());
        let precision = output.precision();
        match &self.shared.backend {
            Backend::Cpu => {
                let ptr = std::ptr::NonNull::new(output.as_mut_ptr())
                    .unwrap_or(std::ptr::NonNull::<u64>::dangling().cast());
                // SAFETY: passed on to the caller.
                unsafe { StateBatch::from_host_owner(ptr, precision, num_qubits, shape, owner) }
            }
            Backend::Cuda(cuda) => {
                let bytes = shape.0 * shape.1 * precision.size();
                // SAFETY: passed on to the caller.
                let states = unsafe {
                    cuda.adopt((output.as_mut_ptr() as u64, bytes), encoded, stream, owner)
                };
                StateBatch::new(Storage::Device(states), precision, num_qubits, shape.0)
                    .with_row_stride(shape.1)
            }
        }
    }

    /// Encodes the first `batch` rows of page-locked memory on a CUDA device, whose values were
    /// checked, and waits for nothing.
    ///
    /// # Safety
    ///
    /// Nobody writes the rows before what comes back says that they were read, nor frees them.
    pub(crate) unsafe fn encode_checked(
        &self,
        plan: &EncodePlan,
        rows: &PinnedBuffer,
        batch: usize,
    ) -> Option<Result<(StateBatch, Reading)>> {
        let Backend::Cuda(cuda) = &self.shared.backend else { return None };
        // SAFETY: passed on to the caller.
        let encoded = unsafe { cuda.encode_checked(plan, rows, batch) };
        let (precision, qubits) = (plan.precision(), plan.spec().num_qubits());
        Some(encoded.map(|(states, reading)| {
            (StateBatch::new(Storage::Device(states), precision, qubits, batch), reading)
        }))
    }
}
