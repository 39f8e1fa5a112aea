//! Memory of the caller's for a result (`out=`).

use crate::errors::{Failure, Result, invalid_because};
use crate::exchange::{Table, resolve_torch};
use crate::input::import_dlpack;
use crate::layout::Layout;
use dlpark::DlpackFlags;
use numpy::npyffi::flags::NPY_ARRAY_WRITEABLE;
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use qdp_core::cuda::RawStream;
use qdp_core::{Device, Engine, Error, Output, Precision};

const ARGUMENT: &str = "out";

/// An array to write a result into.
pub(crate) struct Target {
    pub(crate) layout: Layout,
    pub(crate) precision: Precision,
    /// The stream that an array on a device is ready on.
    pub(crate) stream: Option<RawStream>,
    /// Nobody said which stream uses the array next, so the host has to wait for the result.
    pub(crate) wait: bool,
    /// Torch's, which counts what is written to it ([`count_write`]).
    pub(crate) tensor: Option<Py<PyAny>>,
    /// What keeps the memory, for as long as somebody may read the result.
    owner: Box<dyn Send + Sync>,
}

impl Target {
    /// Borrows `object` for writing; on a device, ordered with `stream` where one is given.
    pub(crate) fn import(
        object: &Bound<'_, PyAny>,
        engine: &Engine,
        stream: Option<RawStream>,
    ) -> Result<Self> {
        let mut wait = false;
        let mut tensor = None;
        let (layout, ready, owner): (_, _, Box<dyn Send + Sync>) = if let Ok(array) =
            object.cast::<PyUntypedArray>()
        {
            (numpy_layout(array)?, None, Box::new(object.clone().unbind()))
        } else if let Some((layout, ready)) = torch_layout(object)? {
            tensor = Some(object.clone().unbind());
            (layout, ready, Box::new(object.clone().unbind()))
        } else if object.hasattr(intern!(object.py(), "__dlpack__"))? {
            let (layout, imported, ready) = import_dlpack(ARGUMENT, object, engine, stream)
                .map_err(|failure| match failure {
                    Failure::Python(error) => {
                        let expected = "an array that DLPack can describe";
                        invalid_because(object.py(), ARGUMENT, expected, error)
                    }
                    core @ Failure::Core(_) => core,
                })?;
            check_writable(!imported.flags().contains(DlpackFlags::READ_ONLY))?;
            wait = layout.device != Device::Cpu && stream.is_none();
            (layout, ready, Box::new(imported))
        } else {
            return Err(Error::DType {
                argument: ARGUMENT,
                expected: "a NumPy array, a torch tensor or an array with __dlpack__".to_owned(),
                got: object.get_type().name()?.to_string(),
            }
            .into());
        };
        let precision = layout.precision(ARGUMENT)?;
        if layout.device != engine.device() {
            return Err(Error::DeviceMismatch {
                argument: ARGUMENT,
                expected: engine.device().to_string(),
                got: layout.device.to_string(),
            }
            .into());
        }
        // The core asks for more than some elements need by themselves.
        layout.check_alignment(ARGUMENT, layout.natural_alignment().max(8))?;
        check_rows(&layout)?;
        Ok(Self { layout, precision, stream: ready, wait, tensor, owner })
    }

    /// The array as the core writes it.
    pub(crate) fn output(&mut self) -> Output<'_> {
        // SAFETY: the layout came from a producer that vouches for it; it is writable, aligned, and
        // its rows are without gaps and do not overlap (`import` checked each); `owner` keeps the
        // memory. That nobody else uses it meanwhile is the caller's side of passing it.
        unsafe { self.layout.output(self.precision) }
    }

    /// What keeps the memory.
    pub(crate) fn into_owner(self) -> Box<dyn Send + Sync> {
        self.owner
    }
}

/// A [`Target`] for somebody who writes it later, on another thread.
pub(crate) struct OwnedTarget {
    pub(crate) output: Output<'static>,
    pub(crate) single: bool,
    pub(crate) wait: bool,
    pub(crate) tensor: Option<Py<PyAny>>,
    pub(crate) owner: Box<dyn Send + Sync>,
}

impl From<Target> for OwnedTarget {
    fn from(target: Target) -> Self {
        let Target { layout, precision, wait, tensor, owner, .. } = target;
        // SAFETY: as in `Target::output`; the owner goes along.
        let output = unsafe { layout.output(precision) };
        Self { output, single: layout.single, wait, tensor, owner }
    }
}

/// Has autograd know that a tensor was written to, as torch's own operators do: what saved it for a
/// gradient before refuses to use it.
pub(crate) fn count_write(py: Python<'_>, tensor: Option<&Py<PyAny>>) -> PyResult<()> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if let Some(tensor) = tensor {
        FUNCTION.import(py, "torch.autograd.graph", "increment_version")?.call1((tensor,))?;
    }
    Ok(())
}

fn numpy_layout(array: &Bound<'_, PyUntypedArray>) -> Result<Layout> {
    // SAFETY: the array is alive while it is borrowed, and NumPy keeps its flags in it.
    let flags = unsafe { (*array.as_array_ptr()).fields.flags };
    check_writable(flags & NPY_ARRAY_WRITEABLE != 0)?;
    Layout::of_numpy(ARGUMENT, array)?.ok_or_else(|| {
        Error::invalid(ARGUMENT, "aligned elements in native byte order", "others").into()
    })
}

/// The layout of a torch tensor and, on a device, torch's current stream; `None` for anything
/// else. Other exchange tables do not say whether a tensor may be written to.
fn torch_layout(object: &Bound<'_, PyAny>) -> Result<Option<(Layout, Option<RawStream>)>> {
    let py = object.py();
    let Some(table) = Table::of(object)? else { return Ok(None) };
    if Table::torch(py)? != Some(table) {
        return Ok(None);
    }
    let Some(layout) = table.layout(ARGUMENT, object)? else { return Ok(None) };
    resolve_torch(ARGUMENT, object, &layout)?;
    let ready = match layout.device {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(table.current_stream(py, ordinal)?),
    };
    Ok(Some((layout, ready)))
}

fn check_writable(writable: bool) -> Result<()> {
    if writable {
        return Ok(());
    }
    Err(Error::invalid(ARGUMENT, "a writable array", "a read-only one").into())
}

pub(crate) fn check_rows(layout: &Layout) -> Result<()> {
    let ((batch, dim), (rows, columns)) = (layout.shape, layout.strides);
    let apart = usize::try_from(rows).is_ok_and(|rows| rows >= dim);
    // Of nothing, and of what there is one of, a stride says nothing.
    if batch == 0 || ((columns == 1 || dim == 1) && (batch == 1 || apart)) {
        return Ok(());
    }
    let expected = "rows without gaps that do not overlap";
    Err(Error::invalid(ARGUMENT, expected, format!("strides ({rows}, {columns})")).into())
}
