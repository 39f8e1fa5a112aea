//! Every driver call made to fail, one at a time: each gives a typed error or is made up for,
//! nothing leaks, and the engine encodes correctly next. Without a GPU these tests skip, unless
//! `QDP_REQUIRE_GPU=1` asks for one.

#[allow(dead_code)] // each test binary uses its share
mod common;

use common::values;
use num_complex::Complex;
use qdp_core::cuda::faults::{self, Fault};
use qdp_core::cuda::{self, Context, DeviceBuffer, LiveObjects, Pool, RawStream, Stream};
use qdp_core::graph::{Array, InputSpec};
use qdp_core::{
    DType, Device, EncodeOptions, EncodeSpec, Encoding, Engine, Entanglement, Error, Gradient,
    Graph, GraphSpec, Input, Output, PipelineConfig, Precision, Result, StateBatch,
};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

const FAULTS: [Fault; 2] = [Fault::Unknown, Fault::OutOfMemory];

/// A batch on the host and on the device, and its states as the CPU backend gives them.
struct Case {
    spec: EncodeSpec,
    rows: usize,
    features: usize,
    host: Vec<f64>,
    device: DeviceBuffer,
    want: StateBatch,
    /// A cotangent, as pairs of values, and room for the gradient.
    cotangent: DeviceBuffer,
    gradient: DeviceBuffer,
    /// The gradient as the CPU backend gives it.
    slopes: Vec<f64>,
}

impl Case {
    fn new(encoding: Encoding, num_qubits: u32, rows: usize, rig: &Memory) -> Self {
        let spec = EncodeSpec::new(encoding, num_qubits).unwrap();
        let features = spec.num_features();
        let host = values(rows * features, u64::from(num_qubits));
        let device = rig.upload(&host);
        let cpu = Engine::open(Device::Cpu).unwrap();
        let want = cpu.encode(&Input::rows(&host, features).unwrap(), &spec, None).unwrap();
        let pairs = values(2 * rows * spec.dim(), 2);
        let cotangent = rig.upload(&pairs);
        let g: Vec<_> = pairs.chunks(2).map(|pair| Complex::new(pair[0], pair[1])).collect();
        let mut slopes = vec![0.0; host.len()];
        let mut out = Gradient::rows(&mut slopes, features).unwrap();
        let (input, g) =
            (Input::rows(&host, features).unwrap(), Input::rows(&g, spec.dim()).unwrap());
        cpu.backward(&input, &spec, &g, &mut out, &EncodeOptions::default()).unwrap();
        let gradient = rig.upload(&vec![0.0; host.len()]);
        Self { spec, rows, features, host, device, want, cotangent, gradient, slopes }
    }

    /// Writes the gradient, reads it back, which may fail, and compares it, which must not.
    fn differentiate(&self, engine: &Engine, memory: &Memory) -> Result<()> {
        let stream = memory.stream.raw();
        self.gradient.memset(0..self.gradient.bytes(), 0xff, stream)?;
        let at = |buffer: &DeviceBuffer| {
            std::ptr::with_exposed_provenance_mut::<u8>(buffer.ptr() as usize)
        };
        let (device, dim) = (Device::Cuda(0), self.spec.dim());
        // SAFETY: the buffers hold as much, and are used in the order of `stream`.
        let (cotangent, mut out) = unsafe {
            let (shape, strides) = ((self.rows, dim), (dim as isize, 1));
            let g = Input::from_raw(at(&self.cotangent), DType::C128, device, shape, strides);
            let (shape, stride) = ((self.rows, self.features), self.features);
            (g, Gradient::from_raw(at(&self.gradient), DType::F64, device, shape, stride))
        };
        engine.backward(&self.on_device(), &self.spec, &cotangent, &mut out, &on(stream))?;
        let mut bytes = vec![0; self.gradient.bytes()];
        self.gradient.copy_to_host(0, &mut bytes, stream)?;
        for (got, want) in bytes.chunks(8).zip(&self.slopes) {
            let got = f64::from_ne_bytes(got.try_into().unwrap());
            let close = (got - want).abs() < 1e-9 * (1.0 + want.abs());
            assert!(close, "{:?}: {got} instead of {want}", self.spec);
        }
        Ok(())
    }

    fn on_host(&self) -> Input<'_> {
        Input::rows(&self.host, self.features).unwrap()
    }

    fn on_device(&self) -> Input<'_> {
        // SAFETY: the buffer holds these values, written and waited for, and nobody writes it.
        unsafe { values_on_device(&self.device, self.rows, self.features) }
    }

    /// Reads states back, which may fail, and compares them, which must not.
    fn verify(&self, states: &StateBatch) -> Result<()> {
        let host = states.to_host()?;
        let (got, want) = (host.as_slice::<f64>()?, self.want.as_slice::<f64>()?);
        assert_eq!(got.len(), want.len());
        let worst = got.iter().zip(want).map(|(a, b)| (a - b).norm()).fold(0.0, f64::max);
        assert!(worst < 1e-13, "{:?}: {worst:e}", self.spec);
        Ok(())
    }
}

/// # Safety
///
/// The buffer holds as many f64 values, ready on every stream.
unsafe fn values_on_device(buffer: &DeviceBuffer, rows: usize, features: usize) -> Input<'_> {
    let ptr = std::ptr::with_exposed_provenance(buffer.ptr() as usize);
    // SAFETY: passed on to the caller.
    unsafe {
        let strides = (features as isize, 1);
        Input::from_raw(ptr, DType::F64, Device::Cuda(0), (rows, features), strides)
    }
}

/// Device memory and a stream that are not the engine's.
struct Memory {
    pool: Arc<Pool>,
    stream: Arc<Stream>,
    context: Arc<Context>,
}

impl Memory {
    fn upload(&self, values: &[f64]) -> DeviceBuffer {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let buffer = self.pool.alloc(bytes.len(), &self.stream).unwrap();
        buffer.copy_from_host(0, &bytes, self.stream.raw()).unwrap();
        buffer
    }
}

/// What the paths work on.
struct Rig {
    small: Case,
    batch: Case,
    long: Case,
    diagonal: Case,
    product: Case,
    /// One sample of `small`'s shape with a NaN.
    bad: DeviceBuffer,
    /// Room for `batch`'s states.
    output: DeviceBuffer,
    /// To be kept for work on the device.
    token: Arc<()>,
    memory: Memory,
    /// Faults and live objects are the process's, so tests run one at a time.
    _serial: MutexGuard<'static, ()>,
}

#[allow(clippy::disallowed_methods)] // a test is told by the environment what to require
fn rig() -> Option<Rig> {
    static SERIAL: Mutex<()> = Mutex::new(());
    static PROBED: Once = Once::new();
    let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
    faults::disarm(); // where a test before this one ended early
    PROBED.call_once(fail_every_call_of_the_probe);
    if let Err(reason) = Engine::open(Device::Cuda(0)) {
        let required = std::env::var("QDP_REQUIRE_GPU").is_ok_and(|value| value == "1");
        assert!(!required, "QDP_REQUIRE_GPU=1, but {reason}");
        eprintln!("skipped: {reason}");
        return None;
    }
    let context = Context::open(0).unwrap();
    let stream = Stream::new(&context).unwrap();
    let pool = Pool::new(&context, None).unwrap();
    let memory = Memory { pool, stream, context };
    let batch = Case::new(Encoding::Amplitude, 10, 64, &memory);
    let small = Case::new(Encoding::Amplitude, 5, 3, &memory);
    let zz = Encoding::Zz { reps: 2, entanglement: Entanglement::Full };
    let mut bad = values(small.features, 1);
    bad[7] = f64::NAN;
    Some(Rig {
        long: Case::new(Encoding::Amplitude, 18, 1, &memory),
        diagonal: Case::new(zz, 14, 2, &memory),
        product: Case::new(Encoding::Phase, 15, 3, &memory),
        bad: memory.upload(&bad),
        output: memory.pool.alloc(batch.want.num_bytes(), &memory.stream).unwrap(),
        token: Arc::new(()),
        small,
        batch,
        memory,
        _serial: serial,
    })
}

/// Runs before anything else of this process asks the driver: what it answers is remembered.
fn fail_every_call_of_the_probe() {
    for k in 1.. {
        faults::fail_at(k);
        let probed = cuda::probe();
        let Some(failed) = faults::disarm() else { break };
        let text = probed.expect_err(failed).to_string();
        assert!(text.contains(failed) && text.contains("CUDA_ERROR_UNKNOWN"), "{text}");
    }
}

fn assert_injected(error: &Error, failed: &str, fault: Fault) {
    let is_it = match error {
        Error::Driver { call, name, .. } => *call == failed && name == fault.name(),
        Error::DeviceUnavailable { .. } => {
            let text = error.to_string();
            text.contains(failed) && text.contains(fault.name())
        }
        Error::OutOfMemory { .. } => fault == Fault::OutOfMemory && failed.contains("Alloc"),
        _ => false,
    };
    assert!(is_it, "{failed} was to fail with {}, but this came: {error}", fault.name());
}

type Path = fn(&Rig, &Engine) -> Result<()>;

/// What must be as before once everything that a path made is dropped, and the work done. Events
/// are left out, as the engine makes those of its slots as it comes to them.
fn holdings(rig: &Rig, engine: &Engine) -> (LiveObjects, u64, usize) {
    rig.memory.stream.synchronize().unwrap();
    engine.synchronize().unwrap();
    let objects = LiveObjects { events: 0, ..cuda::live_objects() };
    (objects, engine.memory_info().unwrap().used, Arc::strong_count(&rig.token))
}

/// Fails every call of a path in an engine that has run it before.
fn fail_every_call(name: &str, path: Path) {
    let Some(rig) = rig() else { return };
    let before = cuda::live_objects();
    // Few slots, so that they are all made soon and have to be waited for.
    let pipeline = PipelineConfig { slots: 2, ..PipelineConfig::default() };
    let engine = Engine::open_with(Device::Cuda(0), pipeline).unwrap();
    for _ in 0..3 {
        assert_eq!(path(&rig, &engine), Ok(()));
    }
    let held = holdings(&rig, &engine);
    let start = faults::count();
    assert_eq!(path(&rig, &engine), Ok(()));
    let calls = faults::count() - start;
    assert!(calls > 0);
    for fault in FAULTS {
        // How often a path asks whether something is done may differ from run to run.
        for k in 1.. {
            assert!(k < 4 * calls + 100, "{name}: there is no end to it");
            faults::fail_at_with(k, fault);
            let result = path(&rig, &engine);
            let Some(failed) = faults::disarm() else {
                assert_eq!(result, Ok(()), "{name}: nothing failed");
                if k > calls {
                    break;
                }
                continue;
            };
            eprintln!("{name}, call {k}, {failed}: {result:?}");
            let mut raised = 0;
            if let Err(error) = result {
                assert_injected(&error, failed, fault);
                raised += 1;
            }
            // An encode of bad input may have gone through before the failure.
            while let Err(error) = engine.check() {
                assert!(name == "check" && matches!(error, Error::NonFinite { .. }), "{error}");
            }
            let mut again = path(&rig, &engine);
            if let Err(error) = again {
                // A destructor's failure is raised by the call after it, and then over.
                assert_injected(&error, failed, fault);
                raised += 1;
                again = path(&rig, &engine);
            }
            assert_eq!(again, Ok(()), "after {failed}");
            assert!(raised <= 1, "{failed} was raised twice");
            assert_eq!(holdings(&rig, &engine), held, "after {failed}");
        }
    }
    drop(engine);
    assert_eq!(cuda::live_objects(), before);
}

const DOUBLE: EncodeOptions = EncodeOptions {
    precision: Some(Precision::Complex128),
    stream: None,
    validate_now: false,
    interrupt: None,
    leave_overdue: false,
};

fn on(stream: RawStream) -> EncodeOptions {
    EncodeOptions { stream: Some(stream), ..DOUBLE }
}

#[test]
fn host_batch() {
    fail_every_call("host batch", |rig, engine| {
        let Case { spec, .. } = &rig.batch;
        rig.batch.verify(&engine.encode_with(&rig.batch.on_host(), spec, &DOUBLE)?)
    });
}

#[test]
fn host_batch_on_a_stream() {
    fail_every_call("host batch on a stream", |rig, engine| {
        let options = on(rig.memory.stream.raw());
        let states = engine.encode_with(&rig.batch.on_host(), &rig.batch.spec, &options)?;
        rig.batch.verify(&states)
    });
}

#[test]
fn long_host_sample() {
    fail_every_call("long host sample", |rig, engine| {
        rig.long.verify(&engine.encode_with(&rig.long.on_host(), &rig.long.spec, &DOUBLE)?)
    });
}

#[test]
fn device_input() {
    fail_every_call("device input", |rig, engine| {
        for case in [&rig.small, &rig.long, &rig.diagonal] {
            case.verify(&engine.encode_with(&case.on_device(), &case.spec, &DOUBLE)?)?;
        }
        Ok(())
    });
}

#[test]
fn gradients() {
    fail_every_call("gradients", |rig, engine| {
        for case in [&rig.small, &rig.long, &rig.product, &rig.diagonal] {
            case.differentiate(engine, &rig.memory)?;
        }
        Ok(())
    });
}

#[test]
fn device_input_validated_now() {
    fail_every_call("device input validated now", |rig, engine| {
        let options = EncodeOptions { validate_now: true, ..on(rig.memory.stream.raw()) };
        let states = engine.encode_with(&rig.batch.on_device(), &rig.batch.spec, &options)?;
        rig.batch.verify(&states)
    });
}

#[test]
fn encode_into() {
    fail_every_call("encode_into", |rig, engine| {
        let Case { spec, rows, .. } = &rig.batch;
        let stream = rig.memory.stream.raw();
        rig.output.memset(0..rig.output.bytes(), 0xff, stream)?;
        for input in [rig.batch.on_device(), rig.batch.on_host()] {
            let ptr = std::ptr::with_exposed_provenance_mut(rig.output.ptr() as usize);
            let (precision, dim) = (Precision::Complex128, spec.dim());
            // SAFETY: the buffer has room for these states, and is used in the order of `stream`.
            let mut output =
                unsafe { Output::from_raw(ptr, precision, Device::Cuda(0), (*rows, dim), dim) };
            let encoded = engine.encode_into(&input, spec, &mut output, &on(stream))?;
            let n = spec.num_qubits();
            // SAFETY: the buffer outlives the states, which are dropped here.
            let states =
                unsafe { engine.adopt(&mut output, n, encoded, Some(stream), Box::new(())) };
            rig.batch.verify(&states)?;
        }
        Ok(())
    });
}

/// What exporting states does, and dropping them while another stream may use them.
#[test]
fn states_on_another_stream() {
    fail_every_call("states on another stream", |rig, engine| {
        let Case { spec, .. } = &rig.batch;
        let states = engine.encode_with(&rig.batch.on_device(), spec, &DOUBLE)?;
        states.make_ready_on(rig.memory.stream.raw())?;
        let copy = states.copy()?;
        let part = states.slice(1..3)?;
        drop(states);
        part.make_ready_on(RawStream::LEGACY)?;
        drop(part);
        rig.batch.verify(&copy)
    });
}

#[test]
fn check() {
    fail_every_call("check", |rig, engine| {
        let Case { spec, features, .. } = &rig.small;
        // SAFETY: one sample, written and waited for.
        let bad = unsafe { values_on_device(&rig.bad, 1, *features) };
        let states = engine.encode_with(&bad, spec, &on(rig.memory.stream.raw()))?;
        let expected = Error::NonFinite { sample: 0, position: 7, nan: true };
        for found in [engine.check(), states.check()] {
            match found {
                Err(error) if error == expected => {}
                Err(error) => return Err(error),
                Ok(()) => panic!("the NaN was not found"),
            }
        }
        Ok(())
    });
}

#[test]
fn keep_until_done() {
    fail_every_call("keep_until_done", |rig, engine| {
        let Case { spec, .. } = &rig.small;
        let stream = &rig.memory.stream;
        let states = engine.encode_with(&rig.small.on_device(), spec, &on(stream.raw()))?;
        engine.keep_until_done(stream.raw(), Box::new(Arc::clone(&rig.token)))?;
        stream.synchronize()?;
        rig.small.verify(&states)?;
        // Every call lets go of what is done with.
        rig.small.verify(&engine.encode_with(&rig.small.on_host(), spec, &DOUBLE)?)
    });
}

/// A graph of two encodings and two sizes, with an input beside the samples.
fn capture(rig: &Rig, engine: &Engine) -> Result<Graph> {
    let Case { spec, features, .. } = &rig.small;
    let wider = EncodeSpec::new(Encoding::Amplitude, spec.num_qubits() + 1)?;
    let numbers = InputSpec { name: "number".into(), shape: vec![None], dtype: DType::I64 };
    let spec = GraphSpec {
        encodings: vec![spec.clone(), wider],
        sizes: vec![2, 4],
        features: Some(*features),
        inputs: vec![numbers],
        ..GraphSpec::new(spec.clone(), 0)
    };
    let scale = InputSpec { name: "scale".into(), shape: vec![Some(2)], dtype: DType::F64 };
    engine.capture(spec, &[(scale, Input::sample(&[1.0, 2.0]))])
}

/// Replays from the host and from the device; what comes is right, or nothing comes.
fn replay(rig: &Rig, graph: &Graph) -> Result<()> {
    let bytes = |array: &Array| Ok::<_, Error>(array.to_host()?.as_bytes()?.to_vec());
    let numbers = [5_i64, 6, 7];
    for input in [rig.small.on_host(), rig.small.on_device()] {
        let stream = Some(rig.memory.stream.raw());
        let replay = graph.replay(&input, &[Input::sample(&numbers)], stream)?;
        rig.small.verify(&replay.states[0])?;
        assert_eq!(bytes(&replay.inputs[0])?, numbers.map(i64::to_ne_bytes).concat());
        replay.states[1].make_ready_on(rig.memory.stream.raw())?;
    }
    let scale = &graph.constants()[0].1;
    assert_eq!(bytes(scale)?, [1.0_f64, 2.0].map(f64::to_ne_bytes).concat());
    Ok(())
}

/// With states held, so that more memory is needed, and trimmed, so that graphs are updated. After
/// a failure the same graph works.
#[test]
fn capturing_and_replaying_a_graph() {
    fail_every_call("capturing and replaying a graph", |rig, engine| {
        let graph = capture(rig, engine)?;
        let numbers = [1_i64, 2, 3];
        let host = || graph.replay(&rig.small.on_host(), &[Input::sample(&numbers)], None);
        let steps = || -> Result<()> {
            replay(rig, &graph)?;
            let held = [host()?, host()?, host()?, host()?, host()?];
            for replay in &held {
                rig.small.verify(&replay.states[0])?;
            }
            assert!(graph.slots() >= 5);
            drop(held);
            graph.trim()?;
            assert_eq!(graph.slots(), 4);
            replay(rig, &graph)
        };
        let first = steps();
        if first.is_err() {
            // A destructor's failure, too, is over when it was raised.
            let _ = engine.check();
            steps().or_else(|_| steps()).expect("the graph works after a failure");
        }
        first
    });
}

/// What a capture may not hold, and captures that fail: the stream is as it was.
#[test]
fn captures_that_fail() {
    fail_every_call("captures that fail", |rig, _| {
        let Memory { pool, stream, .. } = &rig.memory;
        let allocating = cuda::Graph::capture(stream, |stream| {
            drop(pool.alloc_on(64, stream)?);
            Ok(())
        });
        match allocating {
            Err(error @ Error::Capturing { .. }) => {
                assert!(error.to_string().contains("allocating device memory"), "{error}");
            }
            Err(error) => return Err(error),
            Ok(_) => panic!("a graph that allocates"),
        }
        let gone = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cuda::Graph::capture(stream, |_| panic!("while capturing"))
        }));
        if let Ok(failed) = gone {
            drop(failed?);
            panic!("a graph of a panic");
        }
        assert!(!stream.is_capturing()?);
        let fill =
            |value| cuda::Graph::capture(stream, |stream| rig.output.memset(0..8, value, stream));
        let two = cuda::Graph::capture(stream, |stream| {
            rig.output.memset(0..8, 3, stream)?;
            rig.output.memset(8..16, 4, stream)
        });
        let mut executable = fill(1)?.instantiate()?;
        let read = |executable: &cuda::Executable| {
            let mut bytes = [0; 16];
            // SAFETY: the buffer outlives the launch, which is waited for, in one stream.
            unsafe { executable.launch(stream.raw())? };
            rig.output.copy_to_host(0, &mut bytes, stream.raw())?;
            Ok::<_, Error>(bytes)
        };
        assert_eq!(read(&executable)?[..8], [1; 8]);
        assert_eq!(executable.update(fill(2)?)?, cuda::Updated::InPlace);
        assert_eq!(read(&executable)?[..8], [2; 8]);
        assert_eq!(executable.update(two?)?, cuda::Updated::Reinstantiated);
        assert_eq!(read(&executable)?, [[3; 8], [4; 8]].concat()[..]);
        Ok(())
    });
}

#[test]
fn opening_and_dropping_an_engine() {
    /// How often an engine is opened with no fault between.
    const EVERY: u64 = 32;

    fn path(rig: &Rig) -> Result<()> {
        let engine = Engine::open(Device::Cuda(0))?;
        let Case { spec, .. } = &rig.small;
        rig.small.verify(&engine.encode_with(&rig.small.on_host(), spec, &DOUBLE)?)?;
        let states =
            engine.encode_with(&rig.small.on_device(), spec, &on(rig.memory.stream.raw()))?;
        drop(engine);
        rig.small.verify(&states)
    }

    let Some(rig) = rig() else { return };
    let _bound = rig.memory.context.bind().unwrap();
    let before = cuda::live_objects();
    let start = faults::count();
    assert_eq!(path(&rig), Ok(()));
    let calls = faults::count() - start;
    let mut tried = 0;
    // There are hundreds of them, so each fails in one way, and of those that look kernels up, which
    // are alike, some do.
    for (first, fault) in (1..).zip(FAULTS) {
        let mut k = first;
        loop {
            assert!(k < 4 * calls, "there is no end to it");
            faults::fail_at_with(k, fault);
            let result = path(&rig);
            let Some(failed) = faults::disarm() else {
                assert_eq!(result, Ok(()), "nothing failed");
                if k > calls {
                    break;
                }
                k += FAULTS.len() as u64;
                continue;
            };
            if let Err(error) = result {
                assert_injected(&error, failed, fault);
            }
            assert_eq!(cuda::live_objects(), before, "after {failed}, call {k}");
            tried += 1;
            if tried % EVERY == 0 {
                assert_eq!(path(&rig), Ok(()), "after {failed}, call {k}");
            }
            k += FAULTS.len() as u64 * if failed == "cuModuleGetFunction" { 16 } else { 1 };
        }
        assert_eq!(path(&rig), Ok(()));
        assert_eq!(cuda::live_objects(), before);
    }
}
