//! CUDA graphs: captured from a stream, instantiated, launched, updated in place.

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUgraph_st, CUgraphExec_st, CUgraphExecUpdateResult, CUgraphExecUpdateResultInfo,
    CUgraphNodeType, CUresult, CUstreamCaptureMode,
};

use super::driver::{Handle, Kind, Live, check, shutting_down, verify};
use super::gate::{call, call_anyway};
use super::{CaptureGuard, Context, RawStream, Stream};
use crate::error::{Error, Result};

/// Work and its order, to be instantiated. It owns none of the memory that its nodes touch.
#[must_use = "dropping a graph destroys it"]
#[derive(Debug)]
pub struct Graph {
    handle: Handle<CUgraph_st>,
    context: Arc<Context>,
    _live: Live,
}

impl Graph {
    /// The work that `record` enqueues on the stream, which does not run. `record` may let other
    /// streams take part, by an event of this one that they wait for; this one has to wait for
    /// them in the end. Where `record` fails or panics, the capture is over all the same.
    ///
    /// # Errors
    /// What `record` fails with; [`Error::Capturing`] where it enqueued an allocation, as a graph
    /// shall own no memory; [`Error::Driver`].
    pub fn capture(
        stream: &Arc<Stream>,
        record: impl FnOnce(RawStream) -> Result<()>,
    ) -> Result<Self> {
        let context = stream.context();
        let _bound = context.bind()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        check("cuStreamBeginCapture", || unsafe {
            sys::cuStreamBeginCapture_v2(stream.raw().raw(), mode)
        })?;
        let recording = Recording { stream };
        let recorded = record(stream.raw());
        let ended = recording.end();
        recorded?;
        let graph = ended?;
        if graph.allocates()? {
            let hint = "allocate before it; what a graph works on belongs to whoever captures it";
            return Err(Error::Capturing { call: "allocating device memory", hint });
        }
        Ok(graph)
    }

    /// How many nodes the graph has.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn nodes(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: the graph is alive; without an array the driver writes the number alone.
        check("cuGraphGetNodes", || unsafe {
            sys::cuGraphGetNodes(self.handle.raw(), ptr::null_mut(), &raw mut count)
        })?;
        Ok(count)
    }

    fn allocates(&self) -> Result<bool> {
        let mut count = self.nodes()?;
        let mut nodes = vec![ptr::null_mut(); count];
        // SAFETY: the graph is alive, and the array has room for as many nodes as `count` says.
        check("cuGraphGetNodes", || unsafe {
            sys::cuGraphGetNodes(self.handle.raw(), nodes.as_mut_ptr(), &raw mut count)
        })?;
        for node in nodes {
            let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: the node is one of the graph's; the driver writes one enumerator.
            check("cuGraphNodeGetType", || unsafe {
                sys::cuGraphNodeGetType(node, &raw mut kind)
            })?;
            if kind == CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes the graph ready to be launched.
    ///
    /// # Errors
    /// [`Error::Driver`], and the graph is gone.
    pub fn instantiate(self) -> Result<Executable> {
        let mut handle = ptr::null_mut();
        {
            let _bound = self.context.bind()?;
            let _capture = CaptureGuard::relaxed();
            // SAFETY: the graph is alive, and the driver writes one pointer.
            check("cuGraphInstantiate", || unsafe {
                sys::cuGraphInstantiateWithFlags(&raw mut handle, self.handle.raw(), 0)
            })?;
        }
        let handle = Handle::new(handle);
        Ok(Executable { handle, graph: self, _live: Live::new(Kind::Executable) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by a capture, destroyed only here; what was instantiated from it is gone or
        // does not need it.
        self.context
            .in_drop("cuGraphDestroy", || unsafe { sys::cuGraphDestroy(self.handle.raw()) });
    }
}

/// A capture that has begun, and ends with this.
struct Recording<'a> {
    stream: &'a Arc<Stream>,
}

impl Recording<'_> {
    fn end(self) -> Result<Graph> {
        let (ended, graph) = self.finish();
        std::mem::forget(self);
        verify("cuStreamEndCapture", ended)?;
        graph.ok_or(Error::Capturing {
            call: "ending a capture",
            hint: "the stream was captured by somebody else meanwhile",
        })
    }

    /// Ends the capture, whatever became of it, and owns the graph where there is one.
    fn finish(&self) -> (CUresult, Option<Graph>) {
        let mut handle = ptr::null_mut();
        // SAFETY: the stream is alive and being captured by this thread; the driver writes one
        // pointer, null where the capture was invalidated.
        let ended = call_anyway("cuStreamEndCapture", || unsafe {
            sys::cuStreamEndCapture(self.stream.raw().raw(), &raw mut handle)
        });
        let graph = (!handle.is_null()).then(|| Graph {
            handle: Handle::new(handle),
            context: Arc::clone(self.stream.context()),
            _live: Live::new(Kind::Graph),
        });
        (ended, graph)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if !shutting_down()
            && let Some(_bound) = self.stream.context().bind_in_drop()
        {
            drop(self.finish());
        }
    }
}

/// What became of an [`Executable::update`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Updated {
    /// Only parameters differ: pointers, sizes, launch shapes.
    InPlace,
    /// The graph has another form, so it was instantiated.
    Reinstantiated,
}

/// A graph that can be launched, one launch at a time.
#[must_use = "dropping an executable graph destroys it"]
#[derive(Debug)]
pub struct Executable {
    handle: Handle<CUgraphExec_st>,
    // Dropped after the executable is destroyed.
    graph: Graph,
    _live: Live,
}

impl Executable {
    /// Enqueues the whole graph. Of several launches the driver begins each when the one before is
    /// done.
    ///
    /// # Errors
    /// [`Error::Driver`], [`Error::Capturing`].
    ///
    /// # Safety
    /// All memory and every event that the graph's nodes name must be valid until the launch is
    /// done, and used by others only in the order of `stream`.
    pub unsafe fn launch(&self, stream: RawStream) -> Result<()> {
        let _bound = self.graph.context.bind()?;
        // SAFETY: the executable is alive, and whoever made the view keeps the stream alive; what
        // the nodes touch is the caller's promise.
        check("cuGraphLaunch", || unsafe { sys::cuGraphLaunch(self.handle.raw(), stream.raw()) })
    }

    /// Does what a first launch would do beside running, so that it is as fast as later ones.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn upload(&self, stream: &Stream) -> Result<()> {
        let _bound = self.graph.context.bind()?;
        // SAFETY: the executable and the stream are alive; nothing runs.
        check("cuGraphUpload", || unsafe {
            sys::cuGraphUpload(self.handle.raw(), stream.raw().raw())
        })
    }

    /// Makes later launches those of `graph`: in place where it differs in parameters alone, else
    /// by instantiating it. No launch may be in flight.
    ///
    /// # Errors
    /// [`Error::Driver`]; the executable is what it was.
    pub fn update(&mut self, graph: Graph) -> Result<Updated> {
        let mut info = CUgraphExecUpdateResultInfo {
            result: CUgraphExecUpdateResult::CU_GRAPH_EXEC_UPDATE_SUCCESS,
            errorNode: ptr::null_mut(),
            errorFromNode: ptr::null_mut(),
        };
        let result = {
            let _bound = graph.context.bind()?;
            let _capture = CaptureGuard::relaxed();
            // SAFETY: both are alive; the driver writes one struct.
            call("cuGraphExecUpdate", || unsafe {
                sys::cuGraphExecUpdate_v2(self.handle.raw(), graph.handle.raw(), &raw mut info)
            })
        };
        if result != CUresult::CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE {
            verify("cuGraphExecUpdate", result)?;
            self.graph = graph;
            return Ok(Updated::InPlace);
        }
        *self = graph.instantiate()?;
        Ok(Updated::Reinstantiated)
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: made by `instantiate`, destroyed only here. A launch in flight runs to its end: the
        // driver frees the executable behind it.
        self.graph.context.in_drop("cuGraphExecDestroy", || unsafe {
            sys::cuGraphExecDestroy(self.handle.raw())
        });
    }
}

/// Gives memory that the driver keeps for graphs' own allocations, of whomever, back to the device.
///
/// # Errors
/// [`Error::Driver`].
pub(super) fn trim(context: &Context) -> Result<()> {
    let _bound = context.bind()?;
    let _capture = CaptureGuard::relaxed();
    // SAFETY: the device is the context's; memory in use is not touched.
    check("cuDeviceGraphMemTrim", || unsafe { sys::cuDeviceGraphMemTrim(context.device()) })
}
