//! QDP's Python module: engines, states, and arrays of every kind in and out.
//!
//! Only glue: what an argument means (`options`, `pipeline`), where an array's values lie (`input`,
//! `output`, `layout`, `arrow`, `exchange`), how states leave (`state`, `dlpack`, `future`), what
//! torch differentiates (`gradient`), who shares batches (`batcher`, `event_loop`), what a signal
//! does (`interrupt`) and which exception a failure is (`errors`). Everything that computes or waits
//! is the core's, and runs without the GIL.

mod affine;
mod arrow;
mod batcher;
mod call;
mod coalesce;
mod dlpack;
mod engine;
mod errors;
mod event_loop;
mod exchange;
mod future;
mod gradient;
mod graph;
mod graph_input;
mod info;
mod input;
mod interrupt;
mod layout;
mod options;
mod output;
mod pin;
mod pipeline;
mod plan;
mod state;
mod tensor;
mod turnstile;

/// The native module of the `qdp` package.
#[pyo3::pymodule]
mod _qdp {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::batcher::{BatcherCore, BatcherRequest};
    #[pymodule_export]
    use crate::coalesce::{Coalescer, Handle};
    #[pymodule_export]
    use crate::engine::Engine;
    #[pymodule_export]
    use crate::gradient::encode_backward;
    #[pymodule_export]
    use crate::graph::{Graph, Replay};
    #[pymodule_export]
    use crate::graph_input::GraphInput;
    #[pymodule_export]
    use crate::info::device_info;
    #[pymodule_export]
    use crate::pin::{Pinned, pin};
    #[pymodule_export]
    use crate::pipeline::PipelineConfig;
    #[pymodule_export]
    use crate::plan::{Plan, restore_plan};
    #[pymodule_export]
    use crate::state::StateBatch;
    #[pymodule_export]
    use crate::tensor::{check_tensors, encode_tensor, encode_tensor_values};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        // Looked up now: where a signal's handler raises, the crate panics.
        numpy::dtype::<f64>(py);
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        dlpark::python::install_exchange_api::<StateBatch>(py)?;
        // Asynchronous work ends before the interpreter does. Destructors that run later than this
        // leave the driver alone: it may be gone before them.
        let at_exit = pyo3::wrap_pyfunction!(crate::engine::begin_shutdown, module)?;
        py.import("atexit")?.call_method1("register", (at_exit,))?;
        Ok(())
    }
}
