//! What this installation can use.

use crate::errors::Result;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use qdp_core::{Engine, cuda};

/// What this installation can use, as a dict.
///
/// Keys: `version`; `kernels`, the GPU architectures that the kernels were built for or `None`;
/// `driver`, the CUDA version that the NVIDIA driver supports or `None`; `devices`, a list of
/// dicts with `name`, `ordinal`, `compute_capability` and `memory_bytes`; `cuda_unavailable`, what
/// is missing or `None`; `cpu_threads`.
#[pyfunction]
pub(crate) fn device_info(py: Python<'_>) -> Result<Bound<'_, PyDict>> {
    let (driver, devices) = py.detach(|| (cuda::probe(), cuda::devices()));
    let list = PyList::empty(py);
    for device in devices.as_deref().unwrap_or_default() {
        let entry = PyDict::new(py);
        let (major, minor) = device.compute_capability;
        entry.set_item("name", &device.name)?;
        entry.set_item("ordinal", device.ordinal)?;
        entry.set_item("compute_capability", format!("{major}.{minor}"))?;
        entry.set_item("memory_bytes", device.total_memory)?;
        list.append(entry)?;
    }
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("kernels", qdp_kernels::IMAGE.map(|_| qdp_kernels::ARCHS))?;
    let version = driver.as_ref().ok().map(|driver| {
        let (major, minor) = driver.version;
        format!("{major}.{minor}")
    });
    info.set_item("driver", version)?;
    info.set_item("devices", list)?;
    info.set_item("cuda_unavailable", devices.err().map(|reason| reason.to_string()))?;
    info.set_item("cpu_threads", Engine::num_threads())?;
    Ok(info)
}
