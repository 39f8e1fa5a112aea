//! The one function that every encode goes through.

use crate::errors::{Failure, Result};
use crate::exchange::Table;
use crate::input::Data;
use crate::interrupt::interrupt;
use crate::layout::Layout;
use crate::output::{Target, count_write};
use crate::state::StateBatch;
use dlpark::versioned::Dlpack;
use pyo3::intern;
use pyo3::prelude::*;
use qdp_core::cuda::{Encoded, RawStream};
use qdp_core::{DType, Device, EncodeOptions, EncodeSpec, Error, Precision};

/// One encode: what to compute and how, apart from the arrays.
pub(crate) struct Call<'a> {
    pub(crate) engine: &'a qdp_core::Engine,
    pub(crate) spec: &'a EncodeSpec,
    pub(crate) precision: Option<Precision>,
    pub(crate) stream: Option<RawStream>,
    pub(crate) validate_now: bool,
    /// See [`EncodeOptions::leave_overdue`].
    pub(crate) leave_overdue: bool,
}

impl Call<'_> {
    /// Encodes into `out`, or into new memory.
    pub(crate) fn encode(
        &self,
        data: &Bound<'_, PyAny>,
        out: Option<&Bound<'_, PyAny>>,
    ) -> Result<StateBatch> {
        let py = data.py();
        let target = out.map(|out| self.target(data, out)).transpose()?;
        let ready = self.stream.or(target.as_ref().and_then(|target| target.stream));
        let data = Data::import(data, self.engine, ready)?;
        self.encode_to(py, data, target)
    }

    /// Encodes into `target`, or into new memory.
    pub(crate) fn encode_to(
        &self,
        py: Python<'_>,
        data: Data<'_>,
        target: Option<Target>,
    ) -> Result<StateBatch> {
        let Some(mut target) = target else {
            let options = self.options(&data, None);
            let state = self.encode_new(py, &data, &options);
            self.release(data, &options);
            return Ok(StateBatch::new(state?, false));
        };
        let (options, encoded) = self.write(py, data, &mut target)?;
        let single = target.layout.single;
        let layout = target.layout;
        let precision = target.precision;
        let state = self.adopt(layout, precision, &options, encoded, target.into_owner());
        Ok(StateBatch::new(state, single))
    }

    /// Borrows `out` for the states of `data`.
    pub(crate) fn target(&self, data: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> Result<Target> {
        match Target::import(out, self.engine, self.stream) {
            // How many dimensions are too many or too few says nothing of those that fit.
            Err(Failure::Core(Error::Shape { argument, got, .. })) => {
                let (batch, _) = Data::import(data, self.engine, self.stream)?.layout.shape;
                let expected = format!("({batch}, {})", self.spec.dim());
                Err(Error::Shape { argument, expected, got }.into())
            }
            target => target,
        }
    }

    /// Refuses a target that the result may not be written to.
    pub(crate) fn check_target(&self, data: &Data<'_>, target: &Target) -> Result<()> {
        if let Some(forced) = self.precision.filter(|&forced| forced != target.precision) {
            return Err(Error::DType {
                argument: "out",
                expected: forced.to_string(),
                got: target.precision.to_string(),
            }
            .into());
        }
        if data.layout.may_overlap(&target.layout) {
            return Err(Error::invalid("out", "memory apart from data's", "an overlap").into());
        }
        Ok(())
    }

    /// Encodes into `target`, which lies on the stream that the data is ready on.
    pub(crate) fn write(
        &self,
        py: Python<'_>,
        data: Data<'_>,
        target: &mut Target,
    ) -> Result<(EncodeOptions, Encoded)> {
        self.check_target(&data, target)?;
        let options = self.options(&data, target.stream);
        let (result, may_be_written) = {
            let (input, mut output) = (data.input(), target.output());
            let encode = || self.engine.encode_into(&input, self.spec, &mut output, &options);
            let result = self.run(py, &data, encode);
            // What is refused is not begun.
            let begun = || self.engine.plan_into(&input, self.spec, &output).is_ok();
            let may_be_written = result.is_ok() || begun();
            (result, may_be_written)
        };
        self.release(data, &options);
        if may_be_written {
            count_write(py, target.tensor.as_ref())?;
        }
        let encoded = result?;
        if target.wait {
            py.detach(|| self.engine.synchronize())?;
        }
        Ok((options, encoded))
    }

    /// Describes encoded memory of `owner`'s, laid out as `layout` says, as states.
    fn adopt(
        &self,
        layout: Layout,
        precision: Precision,
        options: &EncodeOptions,
        encoded: Encoded,
        owner: Box<dyn Send + Sync>,
    ) -> qdp_core::StateBatch {
        let qubits = self.spec.num_qubits();
        // SAFETY: the memory that was just encoded into is the owner's, which goes along.
        unsafe {
            let mut output = layout.output(precision);
            self.engine.adopt(&mut output, qubits, encoded, options.stream, owner)
        }
    }

    /// Encodes into new memory: torch's where the data is a tensor on a GPU, so that it is ordered
    /// with torch's stream and legal while that is captured, else the engine's.
    fn encode_new(
        &self,
        py: Python<'_>,
        data: &Data<'_>,
        options: &EncodeOptions,
    ) -> Result<qdp_core::StateBatch> {
        let on_device = data.layout.device != Device::Cpu;
        match data.table.filter(|_| on_device) {
            Some(table) if Table::torch(py)? == Some(table) => {
                let tensor = self.encode_tensor(py, data, table, options)?;
                let Tensor { memory, layout, precision, encoded } = tensor;
                Ok(self.adopt(layout, precision, options, encoded, Box::new(memory)))
            }
            _ => {
                let input = data.input();
                Ok(self.run(py, data, || self.engine.encode_with(&input, self.spec, options))?)
            }
        }
    }

    /// Encodes into a new tensor of the framework's that `table` belongs to.
    pub(crate) fn encode_tensor(
        &self,
        py: Python<'_>,
        data: &Data<'_>,
        table: Table,
        options: &EncodeOptions,
    ) -> Result<Tensor> {
        let input = data.input();
        let plan = self.engine.plan(&input, self.spec, self.precision)?;
        let (device, precision) = (data.layout.device, plan.precision());
        let shape = (input.batch(), self.spec.dim());
        let allocate = || table.allocate(self.engine, precision, shape);
        let memory = match allocate() {
            Ok(memory) => memory,
            Err(failure) => outside_of_transforms(py, allocate)?.unwrap_or(Err(failure))?,
        };
        // SAFETY: the tensor is new and nobody else's.
        let ptr = unsafe {
            let tensor = memory.tensor();
            tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize)
        };
        let layout = Layout {
            ptr,
            dtype: match precision {
                Precision::Complex64 => DType::C64,
                Precision::Complex128 => DType::C128,
            },
            boolean: false,
            device,
            shape,
            strides: (shape.1 as isize, 1),
            single: false,
        };
        // SAFETY: the memory is the new tensor's: of this shape, without gaps, aligned as every
        // allocation of a framework, and used by nobody else.
        let mut output = unsafe { layout.output(precision) };
        let encode = || self.engine.encode_into(&input, self.spec, &mut output, options);
        let encoded = self.run(py, data, encode)?;
        Ok(Tensor { memory, layout, precision, encoded })
    }

    pub(crate) fn options(&self, data: &Data<'_>, out: Option<RawStream>) -> EncodeOptions {
        EncodeOptions {
            precision: self.precision,
            stream: self.stream.or(data.stream).or(out),
            validate_now: self.validate_now,
            interrupt: Some(interrupt),
            leave_overdue: self.leave_overdue,
        }
    }

    /// Runs work of the core. What computes or waits does so without the GIL; enqueueing a kernel
    /// is over sooner than the GIL would be given up and taken back.
    fn run<T: Send>(&self, py: Python<'_>, data: &Data<'_>, work: impl FnOnce() -> T + Send) -> T {
        if data.layout.device == Device::Cpu || self.validate_now {
            py.detach(work)
        } else {
            work()
        }
    }

    /// Lets the data go, or hands it to the engine where the device may still be reading it.
    fn release(&self, data: Data<'_>, options: &EncodeOptions) {
        let stream = options.stream.or_else(|| self.engine.stream());
        if let (Some(owner), Some(stream)) = (data.into_device_owner(), stream) {
            // Where this fails, the owner is dropped: the context is broken, and nothing runs in
            // it any more.
            let _ = self.engine.keep_until_done(stream, owner);
        }
    }
}

/// An encoded tensor of a framework's.
pub(crate) struct Tensor {
    pub(crate) memory: Dlpack,
    layout: Layout,
    precision: Precision,
    encoded: Encoded,
}

/// The error for a result that does not fit a device.
pub(crate) fn out_of_memory(engine: &qdp_core::Engine, needed: u128) -> Failure {
    let memory = engine.memory_info();
    Error::OutOfMemory {
        device: engine.device().to_string(),
        needed: u64::try_from(needed).unwrap_or(u64::MAX),
        free: memory.as_ref().map_or(0, |memory| memory.free),
        total: memory.as_ref().map_or(0, |memory| memory.total),
        hint: "lower num_qubits or the batch size, or use precision=\"complex64\"",
    }
    .into()
}

/// Runs `work` as if there were no transform of `torch.func` around the call, in whose inside new
/// tensors of torch's have no memory that they admit to; `None` where there is none.
fn outside_of_transforms<T>(py: Python<'_>, work: impl FnOnce() -> T) -> PyResult<Option<T>> {
    // Private names of torch's, which is there, as one of its tensors is.
    let torch = py.import(intern!(py, "torch._C"))?;
    let transforms = torch.getattr(intern!(py, "_functorch"))?;
    if transforms.call_method0(intern!(py, "peek_interpreter_stack"))?.is_none() {
        return Ok(None);
    }
    let outside = torch.getattr(intern!(py, "_DisableFuncTorch"))?.call0()?;
    outside.call_method0(intern!(py, "__enter__"))?;
    let result = work();
    let none = py.None();
    outside.call_method1(intern!(py, "__exit__"), (&none, &none, &none))?;
    Ok(Some(result))
}
