//! States as DLPack tensors: fresh managed tensors for every export, and the C exchange table of
//! our own.

use crate::engine;
use crate::errors::{Failure, Result};
use crate::graph_input::GraphInput;
use crate::layout::{dlpack_device, dlpack_dtype};
use crate::state::StateBatch;
use dlpark::ffi::{DLDevice, DLDeviceType, DLTensor};
use dlpark::metadata::Dynamic;
use dlpark::python::DlpackExchangeProducer;
use dlpark::versioned::Dlpack;
use dlpark::{DlpackFlags, Managed, ManagedTensorBase};
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use qdp_core::Device;
use std::ffi::c_void;
use std::ptr;

/// A managed tensor over the states, which it keeps.
pub(crate) fn export<M: ManagedTensorBase>(
    states: &StateBatch,
    flags: DlpackFlags,
) -> Result<Managed<M>> {
    let state = states.state();
    let prepared = Dynamic::new(states.dims(), states.strides())
        .prepare_as::<M>()
        .map_err(|error| Failure::Python(PyBufferError::new_err(error.to_string())))?;
    let mut tensor = prepared.initialize(Box::new(state.clone()));
    tensor
        .set_data(data(state))
        .set_device(dlpack_device(state.device()))
        .set_dtype(dlpack_dtype(state.precision()));
    // SAFETY: shape and strides are the states' own; the clone that the tensor holds keeps their
    // memory; IS_COPIED is only passed for states that were copied for this export.
    Ok(unsafe {
        tensor.set_flags_unchecked(flags);
        tensor.finish()
    })
}

/// A managed tensor over an input of a replay, which it keeps. `IS_COPIED` is for one that was made
/// for this export.
pub(crate) fn export_input<M: ManagedTensorBase>(
    input: &GraphInput,
    flags: DlpackFlags,
) -> Result<Managed<M>> {
    let (array, (shape, strides)) = (input.array(), input.dims());
    let prepared = Dynamic::new(shape, strides)
        .prepare_as::<M>()
        .map_err(|error| Failure::Python(PyBufferError::new_err(error.to_string())))?;
    let mut tensor = prepared.initialize(Box::new(array.clone()));
    let empty = array.num_bytes() == 0;
    tensor
        .set_data(if empty { ptr::null_mut() } else { array.as_ptr().cast() })
        .set_device(dlpack_device(array.device()))
        .set_dtype(input.dlpack_dtype());
    // SAFETY: shape and strides are the array's own; the clone that the tensor holds keeps its
    // memory; IS_COPIED is only passed for an array that was copied for this export and is dropped
    // after it.
    Ok(unsafe {
        tensor.set_flags_unchecked(flags);
        tensor.finish()
    })
}

/// DLPack's data pointer: null where there is nothing.
fn data(state: &qdp_core::StateBatch) -> *mut c_void {
    if state.batch() == 0 { ptr::null_mut() } else { state.as_ptr().cast() }
}

/// Makes the states ready on the stream that the exchange table names for their device.
fn make_ready(state: &qdp_core::StateBatch) -> Result<()> {
    if let Some(stream) = engine::shared(state.device())?.stream() {
        state.make_ready_on(stream)?;
    }
    Ok(())
}

// SAFETY: the borrowed view points into the frozen object itself, which the borrower keeps, and
// into the states' memory, which the object keeps. Managed tensors hold their states. The stream
// is that of the process's engine for the device, which is never closed.
unsafe impl DlpackExchangeProducer for StateBatch {
    const HAS_DLTENSOR_VIEW: bool = true;

    fn managed_tensor_no_sync(&self, _py: Python<'_>) -> PyResult<Dlpack> {
        make_ready(self.state())?;
        Ok(export(self, DlpackFlags::empty())?)
    }

    fn tensor_view_no_sync(&self, _py: Python<'_>) -> PyResult<DLTensor> {
        let state = self.state();
        make_ready(state)?;
        Ok(DLTensor {
            data: data(state),
            device: dlpack_device(state.device()),
            ndim: self.dims().len() as i32,
            dtype: dlpack_dtype(state.precision()),
            shape: self.dims().as_ptr().cast_mut(),
            strides: self.strides().as_ptr().cast_mut(),
            byte_offset: 0,
        })
    }

    fn current_work_stream(_py: Python<'_>, device: DLDevice) -> PyResult<*mut c_void> {
        let (DLDeviceType::CUDA, Ok(ordinal)) =
            (device.device_type, u32::try_from(device.device_id))
        else {
            return Ok(ptr::null_mut());
        };
        let stream = engine::shared(Device::Cuda(ordinal))?.stream();
        Ok(stream
            .map_or(ptr::null_mut(), |stream| ptr::with_exposed_provenance_mut(stream.handle())))
    }
}
