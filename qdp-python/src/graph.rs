//! `Graph`: encodes captured once and replayed.

use crate::errors::{Failure, Result};
use crate::graph_input::GraphInput;
use crate::input::{Data, plain_array};
use crate::options::{self, SpecArgs};
use crate::state::StateBatch;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyGenericAlias, PyString, PyTuple, PyType};
use qdp_core::graph::{GraphSpec, InputSpec};
use qdp_core::{DType, Device, EncodeSpec, Error, Input, Precision};

/// Batches of so few bytes are copied sooner than the GIL is given up and taken back.
const QUICK_BYTES: usize = 64 << 10;

/// Encodes captured for batches of fixed sizes: made by :meth:`qdp.Engine.capture`.
///
/// Attributes: ``sizes``, the batch sizes, ascending; ``num_features`` and ``dtype`` of a sample;
/// ``device``; ``slots``, how many batches there is memory for at the moment.
///
/// Threads may share it; each that replays at the same time takes memory of its own.
#[pyclass(frozen, module = "qdp", name = "Graph")]
pub(crate) struct Graph {
    captured: qdp_core::Graph,
    /// Whether a replay is one batch of states and nothing else.
    plain: bool,
    names: Vec<Name>,
    constants: Vec<(Py<PyString>, Py<GraphInput>)>,
}

/// An input beside the samples.
struct Name {
    name: Py<PyString>,
    /// Truth values, which are bytes to the core.
    boolean: bool,
}

/// What is captured, as Python values.
pub(crate) struct CaptureArgs<'a, 'py> {
    pub(crate) encoding: &'a Bound<'py, PyAny>,
    /// The options of every encoding, but its name.
    pub(crate) spec: SpecArgs<'a, 'py>,
    pub(crate) batch_size: &'a Bound<'py, PyAny>,
    pub(crate) input: Option<&'a Bound<'py, PyAny>>,
    pub(crate) features: Option<&'a Bound<'py, PyAny>>,
    pub(crate) inputs: Option<&'a Bound<'py, PyDict>>,
    pub(crate) constants: Option<&'a Bound<'py, PyDict>>,
    pub(crate) validate: &'a str,
}

impl CaptureArgs<'_, '_> {
    pub(crate) fn run(
        &self,
        py: Python<'_>,
        engine: &qdp_core::Engine,
        precision: Option<Precision>,
    ) -> Result<Graph> {
        let inputs = self.inputs.map_or(Ok(Vec::new()), input_specs)?;
        let (inputs, booleans): (Vec<_>, Vec<_>) = inputs.into_iter().unzip();
        let data = self.constants.map_or(Ok(Vec::new()), |constants| {
            constants
                .iter()
                .map(|(name, value)| Ok((name.extract()?, Data::import(&value, engine, None)?)))
                .collect::<Result<Vec<(String, _)>>>()
        })?;
        let constants: Vec<_> = data.iter().map(|(name, data)| constant(name, data)).collect();
        let dtype = self.input.map(|input| element("input", input)).transpose()?;
        let spec = GraphSpec {
            encodings: self.specs()?,
            sizes: sizes(self.batch_size)?,
            dtype: dtype.map_or(DType::F64, |(dtype, _)| dtype),
            features: self.features.map(|value| options::size("features", value)).transpose()?,
            precision,
            validate_now: options::validate_now(self.validate)?,
            inputs,
        };
        let graph = py.detach(|| engine.capture(spec, &constants))?;
        let single = self.encoding.is_instance_of::<PyString>();
        let plain = single && self.inputs.is_none() && self.constants.is_none();
        let intern = |name: &String| PyString::intern(py, name).unbind();
        let names = graph.inputs().iter().zip(booleans);
        let names = names.map(|(spec, boolean)| Name { name: intern(&spec.name), boolean });
        let names = names.collect();
        let constants = graph.constants().iter().zip(&data).map(|((name, array), (_, data))| {
            let array = GraphInput::new(array.clone(), data.layout.boolean).constant();
            Ok((intern(name), Py::new(py, array)?))
        });
        let constants = constants.collect::<PyResult<_>>()?;
        Ok(Graph { captured: graph, plain, names, constants })
    }

    /// The encodings, of which each may have options of its own.
    fn specs(&self) -> Result<Vec<EncodeSpec>> {
        if let Ok(encoding) = self.encoding.extract::<String>() {
            return Ok(vec![SpecArgs { encoding: &encoding, ..self.spec }.parse()?]);
        }
        let expected = "an encoding, or several, each a name or a pair of a name and its options";
        let parse = |item: PyResult<Bound<'_, PyAny>>| -> Result<EncodeSpec> {
            let item = item?;
            if let Ok(encoding) = item.extract::<String>() {
                return SpecArgs { encoding: &encoding, ..self.spec }.parse();
            }
            let pair = item.extract::<(String, Bound<'_, PyDict>)>();
            let (encoding, given) = options::accepted(item.py(), pair)?
                .ok_or_else(|| options::invalid("encoding", expected, &item))?;
            let known = ["rotation", "reps", "entanglement", "convention"];
            for name in given.keys() {
                if !known.contains(&name.extract::<String>()?.as_str()) {
                    return Err(options::invalid("encoding", &format!("options {known:?}"), &name));
                }
            }
            let option = |name| given.get_item(name);
            let text = |name| -> PyResult<Option<String>> {
                option(name)?.map(|value| value.extract()).transpose()
            };
            let (rotation, convention) = (text("rotation")?, text("convention")?);
            let (reps, entanglement) = (option("reps")?, option("entanglement")?);
            SpecArgs {
                num_qubits: self.spec.num_qubits,
                encoding: &encoding,
                rotation: rotation.as_deref().or(self.spec.rotation),
                reps: reps.as_ref().or(self.spec.reps),
                entanglement: entanglement.as_ref().or(self.spec.entanglement),
                convention: convention.as_deref().unwrap_or(self.spec.convention),
            }
            .parse()
        };
        options::accepted(self.encoding.py(), self.encoding.try_iter())?
            .ok_or_else(|| options::invalid("encoding", expected, self.encoding))?
            .map(parse)
            .collect()
    }
}

fn sizes(value: &Bound<'_, PyAny>) -> Result<Vec<usize>> {
    let size = |value: &Bound<'_, PyAny>| options::size("batch_size", value);
    if value.hasattr(intern!(value.py(), "__index__"))? {
        return Ok(vec![size(value)?]);
    }
    let items = options::accepted(value.py(), value.try_iter())?
        .ok_or_else(|| options::invalid("batch_size", "a positive integer or several", value))?;
    items.map(|item| size(&item?)).collect()
}

/// An element type by its name, or as NumPy's or torch's, and whether it is bool.
fn element(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<(DType, bool)> {
    let name = if let Ok(name) = value.extract::<String>() {
        name
    } else if let Ok(class) = value.cast::<PyType>() {
        class.name()?.to_string()
    } else {
        value.str()?.to_string()
    };
    let name = name.strip_prefix("torch.").unwrap_or(&name);
    // The last is the name of NumPy's class before NumPy 2.
    if matches!(name, "bool" | "bool_") {
        return Ok((DType::U8, true));
    }
    let dtype = name.parse();
    let dtype =
        dtype.map_err(|_| options::invalid(argument, "the name of an element type", value))?;
    Ok((dtype, false))
}

/// The inputs beside the samples, and whether they are bool.
fn input_specs(inputs: &Bound<'_, PyDict>) -> Result<Vec<(InputSpec, bool)>> {
    let expected =
        "names with a shape and an element type, such as {\"labels\": ((None,), \"int64\")}";
    let spec = |(name, value): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
        let pair = value.extract::<(Vec<Option<usize>>, Bound<'_, PyAny>)>();
        let (shape, named) = options::accepted(value.py(), pair)?
            .ok_or_else(|| options::invalid("inputs", expected, &value))?;
        let (dtype, boolean) = element("inputs", &named)?;
        Ok((InputSpec { name: name.extract()?, shape, dtype }, boolean))
    };
    inputs.iter().map(spec).collect()
}

fn constant<'a>(name: &str, data: &'a Data<'_>) -> (InputSpec, Input<'a>) {
    let input = data.input();
    let shape = if data.layout.single {
        vec![Some(input.features())]
    } else {
        vec![Some(input.batch()), Some(input.features())]
    };
    (InputSpec { name: name.to_owned(), shape, dtype: input.dtype() }, input)
}

#[pymethods]
impl Graph {
    #[classmethod]
    fn __class_getitem__<'py>(
        class: &Bound<'py, PyType>,
        item: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyGenericAlias>> {
        PyGenericAlias::new(class.py(), class.as_any(), item)
    }

    /// Batch sizes, ascending.
    #[getter]
    fn sizes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.captured.sizes())
    }

    /// Values per sample.
    #[getter]
    fn num_features(&self) -> usize {
        self.captured.samples().1
    }

    /// Name of the samples' element type.
    #[getter]
    fn dtype(&self) -> String {
        self.captured.samples().0.to_string()
    }

    /// Where it encodes, `"cpu"` or `"cuda:N"`.
    #[getter]
    fn device(&self) -> String {
        self.captured.engine().device().to_string()
    }

    /// How many batches there is memory for at the moment; 0 on the CPU, which keeps none.
    #[getter]
    fn slots(&self, py: Python<'_>) -> usize {
        py.detach(|| self.captured.slots())
    }

    /// Encode a batch: samples of the captured element type and number of features, shape
    /// `(batch, num_features)` with batch at most the largest size, or one of shape
    /// `(num_features,)`. A batch between two sizes is padded to the larger one, and the states are
    /// those of the batch.
    ///
    /// Returns the `StateBatch`, or, where the graph was captured with several encodings, `inputs`
    /// or `constants`, a `Replay`. What it returns never changes: its memory is used again when
    /// nobody holds it, or a tensor made of it, any more, behind everything that the streams it was
    /// handed to did with it. Whoever holds more than the last batch makes the graph take memory
    /// for as many more, until `trim()`.
    ///
    /// Samples on the host are copied and validated before this returns. A CUDA tensor is copied on
    /// its stream, and validated by the kernel. Inputs are named as at the capture, and on the host.
    ///
    /// Raises `ShapeError`, `DTypeError`, `DeviceMismatchError` and `InvalidArgumentError` for what
    /// the graph was not captured for, `CaptureError` while the tensor's stream is being captured,
    /// and what encode raises.
    #[pyo3(signature = (data, /, **inputs))]
    fn replay<'py>(
        &self,
        data: &Bound<'py, PyAny>,
        inputs: Option<&Bound<'py, PyDict>>,
    ) -> Result<Bound<'py, PyAny>> {
        let py = data.py();
        if let Some(samples) = plain_array(data) {
            return self.run(py, &samples, inputs, None);
        }
        let mut imported = Data::import(data, self.captured.engine(), None)?;
        if imported.layout.device != Device::Cpu && imported.layout.has_gaps() {
            // Whatever library's it is, a copy without gaps is its own to make, on its stream.
            let dense = data.call_method0(intern!(py, "contiguous")).map_err(|cause| {
                let expected = "samples without gaps";
                crate::errors::invalid_because(py, "data", expected, cause)
            })?;
            imported = Data::import(&dense, self.captured.engine(), None)?;
        }
        let stream = imported.stream;
        let replayed = self.run(py, &imported.input(), inputs, stream);
        if let (Some(owner), Some(stream)) = (imported.into_device_owner(), stream) {
            // Where this fails, the owner is dropped: the context is broken, and nothing runs in
            // it any more.
            let _ = self.captured.engine().keep_until_done(stream, owner);
        }
        replayed
    }

    /// Give back the memory that no replay is using, and what the driver keeps for graphs. The next
    /// replay takes memory anew and updates its graph in place, which takes a while.
    fn trim(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.captured.trim())?)
    }

    fn __repr__(&self) -> String {
        let names: Vec<&str> =
            self.captured.encodings().map(|spec| spec.encoding().name()).collect();
        let qubits = self.captured.encodings().next().map_or(0, EncodeSpec::num_qubits);
        let (dtype, features) = self.captured.samples();
        format!(
            "Graph(num_qubits={qubits}, encodings={names:?}, sizes={:?}, dtype={dtype}, \
             num_features={features}, device='{}')",
            self.captured.sizes(),
            self.device()
        )
    }
}

impl Graph {
    fn run<'py>(
        &self,
        py: Python<'py>,
        samples: &Input<'_>,
        inputs: Option<&Bound<'py, PyDict>>,
        stream: Option<qdp_core::cuda::RawStream>,
    ) -> Result<Bound<'py, PyAny>> {
        let given = inputs.map_or(0, PyDictMethods::len);
        if given != self.names.len() {
            return Err(self.wrong_inputs(py, inputs));
        }
        if given == 0 {
            return self.run_with(py, samples, &[], stream);
        }
        let mut others = Vec::with_capacity(given);
        for input in &self.names {
            let value = inputs.map_or(Ok(None), |inputs| inputs.get_item(&input.name))?;
            let Some(value) = value else { return Err(self.wrong_inputs(py, inputs)) };
            others.push(Other::import(value, input, self.captured.engine())?);
        }
        let others: Vec<_> = others.iter().map(Other::input).collect();
        self.run_with(py, samples, &others, stream)
    }

    fn run_with<'py>(
        &self,
        py: Python<'py>,
        samples: &Input<'_>,
        others: &[Input<'_>],
        stream: Option<qdp_core::cuda::RawStream>,
    ) -> Result<Bound<'py, PyAny>> {
        let quick = if samples.num_bytes() <= QUICK_BYTES {
            self.captured.try_replay(samples, others, stream)?
        } else {
            None
        };
        let mut replay = match quick {
            Some(replay) => replay,
            None => py.detach(|| self.captured.replay(samples, others, stream))?,
        };
        if self.plain
            && let Some(state) = replay.states.pop()
        {
            return Ok(Bound::new(py, StateBatch::new(state, false))?.into_any());
        }
        let states =
            replay.states.into_iter().map(|state| Py::new(py, StateBatch::new(state, false)));
        let states = states.collect::<PyResult<Vec<_>>>()?;
        let inputs = PyDict::new(py);
        for (input, array) in self.names.iter().zip(replay.inputs) {
            let array = GraphInput::new(array, input.boolean);
            inputs.set_item(&input.name, Py::new(py, array)?)?;
        }
        for (name, array) in &self.constants {
            inputs.set_item(name, array)?;
        }
        let states = PyTuple::new(py, states)?.unbind();
        Ok(Bound::new(py, Replay { states, inputs: inputs.unbind() })?.into_any())
    }

    #[cold]
    fn wrong_inputs(&self, py: Python<'_>, inputs: Option<&Bound<'_, PyDict>>) -> Failure {
        let wanted: Vec<String> =
            self.names.iter().map(|input| input.name.bind(py).to_string()).collect();
        let given = inputs.map_or(Vec::new(), |inputs| {
            inputs.keys().iter().map(|name| name.to_string()).collect::<Vec<_>>()
        });
        Error::invalid("inputs", format!("{wanted:?}"), format!("{given:?}")).into()
    }
}

/// An input beside the samples: an array as it is, or what describes it.
enum Other<'py> {
    Plain(Bound<'py, PyAny>),
    Data(Data<'py>),
}

impl<'py> Other<'py> {
    fn import(value: Bound<'py, PyAny>, name: &Name, engine: &qdp_core::Engine) -> Result<Self> {
        if !name.boolean && plain_array(&value).is_some() {
            return Ok(Self::Plain(value));
        }
        let data = Data::import(&value, engine, None)?;
        if name.boolean && !data.layout.boolean {
            return Err(Error::DType {
                argument: "inputs",
                expected: format!("bool for {:?}", name.name.bind(value.py()).to_string()),
                got: data.layout.dtype.to_string(),
            }
            .into());
        }
        Ok(Self::Data(data))
    }

    fn input(&self) -> Input<'_> {
        match self {
            Self::Data(data) => data.input(),
            Self::Plain(array) => plain_array(array).unwrap_or(Input::sample::<f64>(&[])),
        }
    }
}

/// What a replay made of a batch: `states`, a tuple with a `StateBatch` for each encoding, and
/// `inputs`, a dict with a `GraphInput` for each input beside the samples and for each constant.
#[pyclass(frozen, module = "qdp", name = "Replay")]
pub(crate) struct Replay {
    states: Py<PyTuple>,
    inputs: Py<PyDict>,
}

#[pymethods]
impl Replay {
    /// The states of the batch, for each encoding.
    #[getter]
    fn states(&self, py: Python<'_>) -> Py<PyTuple> {
        self.states.clone_ref(py)
    }

    /// The states of the first encoding.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.states.bind(py).get_item(0).map(Bound::into_any)
    }

    /// The inputs beside the samples and the constants, by name.
    #[getter]
    fn inputs(&self, py: Python<'_>) -> Py<PyDict> {
        self.inputs.clone_ref(py)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (states, inputs) = (self.states.bind(py).repr()?, self.inputs.bind(py).repr()?);
        Ok(format!("Replay(states={states}, inputs={inputs})"))
    }
}
