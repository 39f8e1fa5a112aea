//! Encodes captured once and replayed: static memory, one launch for each batch.
//!
//! A [`Graph`] is captured for a table of batch sizes. On a CUDA device a replay writes the samples
//! to page-locked memory and launches one graph, which brings them to the device, encodes them, by
//! parallel branches where there are several encodings, and records the event behind each state.
//! Other inputs of a batch (labels, say) travel in the same copy, and constants do once.
//!
//! The memory of a replay is a slot, and a slot is reused when nobody holds anything of the replay
//! that it was used for: behind everything that the streams it was handed to did with it until it
//! was let go, and when its copies are done. There are two, or four of small batches, so that one
//! can be prepared while others are in use; where somebody holds more, there are more, until
//! [`Graph::trim`]. So what a replay returns never changes.
//!
//! On the CPU a replay is an encode.

mod array;
mod layout;

pub use array::Array;
pub use layout::InputSpec;
pub(crate) use layout::Layout;

use crate::cpu::memory::HostBuffer;
use crate::cuda::{RawStream, Replayed, Replayer};
use crate::element::{DType, Precision};
use crate::encoding::EncodeSpec;
use crate::engine::{Device, EncodeOptions, Engine};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::state::{StateBatch, Storage};
use std::fmt;
use std::sync::Arc;

/// What a graph is captured for.
#[derive(Debug, Clone)]
pub struct GraphSpec {
    /// Of the same samples, at least one.
    pub encodings: Vec<EncodeSpec>,
    /// Batch sizes, at least one.
    pub sizes: Vec<usize>,
    /// Element type of the samples.
    pub dtype: DType,
    /// Values per sample; by default as many as the first encoding takes.
    pub features: Option<usize>,
    /// Precision of the states; by default as the samples' type has it.
    pub precision: Option<Precision>,
    /// Wait for the validation of samples on the device and raise at the replay.
    pub validate_now: bool,
    /// Inputs beside the samples.
    pub inputs: Vec<InputSpec>,
}

impl GraphSpec {
    /// One encoding of one batch size, of `f64` samples.
    pub fn new(encoding: EncodeSpec, batch: usize) -> Self {
        Self {
            encodings: vec![encoding],
            sizes: vec![batch],
            dtype: DType::F64,
            features: None,
            precision: None,
            validate_now: false,
            inputs: Vec::new(),
        }
    }
}

/// What a replay made of a batch.
#[derive(Debug, Clone)]
pub struct Replay {
    /// One for each encoding, in their order.
    pub states: Vec<StateBatch>,
    /// The inputs beside the samples, in their order.
    pub inputs: Vec<Array>,
}

/// Encodes captured for replay; made by [`Engine::capture`]. Threads may share it.
pub struct Graph {
    // What is in flight goes before what it uses.
    target: Target,
    layout: Arc<Layout>,
    constants: Vec<(String, Array)>,
    validate_now: bool,
    engine: Engine,
}

enum Target {
    Cpu,
    Cuda(Replayer),
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph")
            .field("device", &self.engine.device())
            .field("sizes", &self.layout.sizes)
            .finish_non_exhaustive()
    }
}

impl Graph {
    pub(crate) fn capture(
        engine: &Engine,
        spec: GraphSpec,
        constants: &[(InputSpec, Input<'_>)],
    ) -> Result<Self> {
        let Some(first) = spec.encodings.first() else {
            return Err(Error::invalid("encoding", "at least one", "none"));
        };
        let features = spec.features.unwrap_or_else(|| first.num_features());
        // SAFETY: a plan asks for the shape and looks at no value.
        let samples = unsafe {
            let (device, strides) = (engine.device(), (features as isize, 1));
            Input::from_raw(std::ptr::null(), spec.dtype, device, (1, features), strides)
        };
        let plan = |encoding| engine.plan(&samples, encoding, spec.precision);
        let plans = spec.encodings.iter().map(plan).collect::<Result<_>>()?;
        let names = spec.inputs.iter().map(|input| &input.name);
        let mut names: Vec<_> = names.chain(constants.iter().map(|(spec, _)| &spec.name)).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::invalid("inputs", "names that differ", twice[0]));
        }
        let layout = Arc::new(Layout::new(plans, spec.sizes, spec.inputs)?);
        let constants = constants
            .iter()
            .map(|(spec, input)| Ok((spec.name.clone(), constant(engine, spec, input)?)))
            .collect::<Result<_>>()?;
        let target = match engine.cuda() {
            None => Target::Cpu,
            Some(cuda) => Target::Cuda(Replayer::capture(cuda, &layout)?),
        };
        let validate_now = spec.validate_now;
        Ok(Self { target, layout, constants, validate_now, engine: engine.clone() })
    }

    /// The engine that it was captured with.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Batch sizes, ascending.
    pub fn sizes(&self) -> &[usize] {
        &self.layout.sizes
    }

    /// Element type and number of the values of a sample.
    pub fn samples(&self) -> (DType, usize) {
        (self.layout.dtype(), self.layout.features())
    }

    /// The encodings, in the order of the states.
    pub fn encodings(&self) -> impl Iterator<Item = &EncodeSpec> {
        self.layout.plans.iter().map(|plan| plan.spec())
    }

    /// Inputs beside the samples.
    pub fn inputs(&self) -> &[InputSpec] {
        &self.layout.inputs
    }

    /// What was copied to the device once, by name.
    pub fn constants(&self) -> &[(String, Array)] {
        &self.constants
    }

    /// How many batches there is memory for at the moment; 0 on the CPU, which keeps none.
    pub fn slots(&self) -> usize {
        match &self.target {
            Target::Cpu => 0,
            Target::Cuda(replayer) => replayer.slots(),
        }
    }

    /// Encodes a batch of at most the largest size, with its other inputs in their order.
    ///
    /// Samples on the host are copied and validated before this returns. Those on the device are
    /// copied on `stream`, where they must be ready, without gaps; they must stay valid until it
    /// has passed the copy, and their validation is deferred unless
    /// [`GraphSpec::validate_now`] was set. Other inputs are on the host.
    ///
    /// Waits for the replay before the last, where that is still at it. Replays of several threads
    /// at once each have memory of their own.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] (with the sizes), [`Error::DType`], [`Error::DeviceMismatch`] and
    /// [`Error::InvalidArgument`] for what the graph was not captured for; what is wrong with the
    /// values; [`Error::Capturing`] where `stream` is being captured; [`Error::OutOfMemory`] where
    /// memory for one more batch is needed; [`Error::Driver`].
    pub fn replay(
        &self,
        input: &Input<'_>,
        others: &[Input<'_>],
        stream: Option<RawStream>,
    ) -> Result<Replay> {
        self.layout.check(input, others)?;
        match &self.target {
            Target::Cpu => self.encode(input, others),
            Target::Cuda(replayer) => self.finish(input, replayer.replay(input, others, stream)?),
        }
    }

    /// [`Graph::replay`], unless that had to wait, or to take memory: then `None`. Always `None` on
    /// the CPU, where it computes.
    pub fn try_replay(
        &self,
        input: &Input<'_>,
        others: &[Input<'_>],
        stream: Option<RawStream>,
    ) -> Result<Option<Replay>> {
        let Target::Cuda(replayer) = &self.target else { return Ok(None) };
        if self.validate_now && input.device() != Device::Cpu {
            return Ok(None);
        }
        self.layout.check(input, others)?;
        let replayed = replayer.try_replay(input, others, stream)?;
        replayed.map(|replayed| self.finish(input, replayed)).transpose()
    }

    fn finish(&self, input: &Input<'_>, replayed: Replayed) -> Result<Replay> {
        let batch = input.batch();
        let states = self.layout.plans.iter().zip(replayed.states).map(|(plan, states)| {
            let qubits = plan.spec().num_qubits();
            StateBatch::new(Storage::Device(states), plan.precision(), qubits, batch)
        });
        let states: Vec<_> = states.collect();
        if self.validate_now && input.device() != Device::Cpu {
            states.iter().try_for_each(StateBatch::check)?;
        }
        let storage = replayed.inputs.map(|inputs| Arc::new(Storage::Device(inputs)));
        Ok(Replay { states, inputs: self.arrays(storage.as_ref(), batch) })
    }

    /// Gives back the memory that no replay is using, and what the driver keeps for graphs. The
    /// next replay takes memory anew, and updates its graph in place.
    pub fn trim(&self) -> Result<()> {
        match &self.target {
            Target::Cpu => Ok(()),
            Target::Cuda(replayer) => replayer.trim(),
        }
    }

    fn encode(&self, input: &Input<'_>, others: &[Input<'_>]) -> Result<Replay> {
        let states = self.layout.plans.iter().map(|plan| {
            let options =
                EncodeOptions { precision: Some(plan.precision()), ..EncodeOptions::default() };
            self.engine.encode_with(input, plan.spec(), &options)
        });
        let states = states.collect::<Result<_>>()?;
        if others.is_empty() {
            return Ok(Replay { states, inputs: Vec::new() });
        }
        let buffer = HostBuffer::new(self.layout.header as u128)?;
        // SAFETY: the buffer is new, initialised, and has so many bytes.
        let block = unsafe { std::slice::from_raw_parts_mut(buffer.as_ptr(), self.layout.header) };
        self.layout.stage_inputs(others, block);
        let storage = Arc::new(Storage::Host(buffer));
        Ok(Replay { states, inputs: self.arrays(Some(&storage), input.batch()) })
    }

    /// The other inputs, which begin where the storage does.
    fn arrays(&self, storage: Option<&Arc<Storage>>, batch: usize) -> Vec<Array> {
        let Some(storage) = storage else { return Vec::new() };
        let places = self.layout.inputs.iter().zip(&self.layout.offsets);
        let array = |(spec, &offset): (&InputSpec, &usize)| {
            Array::new(Arc::clone(storage), offset, spec.shape_for(batch), spec.dtype)
        };
        places.map(array).collect()
    }
}

/// Values on the engine's device, copied and there.
fn constant(engine: &Engine, spec: &InputSpec, input: &Input<'_>) -> Result<Array> {
    layout::check_input(spec, input, 0)?;
    let buffer = HostBuffer::new(input.num_bytes() as u128)?;
    // SAFETY: the buffer is new, initialised, and has so many bytes.
    let values = unsafe { std::slice::from_raw_parts_mut(buffer.as_ptr(), input.num_bytes()) };
    crate::pipeline::stage::copy_rows(input, values);
    let storage = match engine.cuda() {
        None => Storage::Host(buffer),
        Some(cuda) => Storage::Device(cuda.upload(values)?),
    };
    Ok(Array::new(Arc::new(storage), 0, spec.shape_for(0), spec.dtype))
}
