//! Every encoding on the CPU, and on the first GPU where one opens: `cargo bench`.
//!
//! Output goes to memory of the caller's (`out`), so that what is timed is the encode, and not how
//! fast somebody hands out fresh memory; the allocating call is timed beside it. Throughput is in
//! bytes that have to move, so that it compares with the rates of the `memory` groups: input and
//! states for amplitude, states for the others, whose input is small. On the GPU both lie there,
//! and calls are pipelined: one synchronisation after many of them.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use num_complex::Complex;
use qdp_core::cuda::{Context, DeviceBuffer, Pool, RawStream};
use qdp_core::element::{Element, Real};
use qdp_core::{
    Device, EncodeOptions, EncodeSpec, Encoding, Engine, Entanglement, Input, Output, Rotation,
};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BATCH: usize = 64;
const GPU_STATE_BYTES: usize = 256 << 20;

fn encodings() -> [Encoding; 8] {
    let entanglement = Entanglement::Full;
    [
        Encoding::Amplitude,
        Encoding::Angle { rotation: Rotation::Y },
        Encoding::Phase,
        Encoding::Basis,
        Encoding::Iqp,
        Encoding::IqpZ,
        Encoding::Zz { reps: 2, entanglement: entanglement.clone() },
        Encoding::IqpEmbedding { reps: 1, entanglement },
    ]
}

/// A batch of valid features; of `Basis` bits.
fn samples<R: Real>(encoding: &Encoding, count: usize) -> Vec<R> {
    let bits = *encoding == Encoding::Basis;
    (0..count)
        .map(|i| R::from_f64(if bits { (i % 2) as f64 } else { 0.1 + (i % 31) as f64 }))
        .collect()
}

/// Bytes that one call has to move.
fn traffic<R>(spec: &EncodeSpec, batch: usize) -> Throughput {
    let values = if *spec.encoding() == Encoding::Amplitude { 3 } else { 2 };
    Throughput::Bytes((values * batch * spec.dim() * size_of::<R>()) as u64)
}

fn bench_cpu<R: Real + Element>(criterion: &mut Criterion) {
    let engine = Engine::open(Device::Cpu).expect("the CPU is always there");
    let mut group = criterion.benchmark_group(format!("cpu/{}", R::PRECISION));
    for encoding in encodings() {
        for n in [4, 10, 16] {
            let spec = EncodeSpec::new(encoding.clone(), n).expect("a valid size");
            let features = spec.num_features();
            let data: Vec<R> = samples(&encoding, BATCH * features);
            let input = Input::rows(&data, features).expect("whole rows");
            let mut memory = vec![Complex::new(R::zero(), R::zero()); BATCH * spec.dim()];
            group.throughput(traffic::<R>(&spec, BATCH));
            group.bench_function(BenchmarkId::new(encoding.name(), n), |bencher| {
                bencher.iter(|| {
                    let mut output = Output::rows(&mut memory, spec.dim()).expect("whole rows");
                    let options = EncodeOptions::default();
                    engine
                        .encode_into(black_box(&input), &spec, &mut output, &options)
                        .expect("valid data")
                });
            });
        }
    }
    group.finish();
}

/// One sample at a time: what a call costs.
fn bench_cpu_allocating(criterion: &mut Criterion) {
    let engine = Engine::open(Device::Cpu).expect("the CPU is always there");
    let mut group = criterion.benchmark_group("cpu/one sample, allocating");
    for n in [2, 6, 10, 16] {
        let spec = EncodeSpec::new(Encoding::Amplitude, n).expect("a valid size");
        let data: Vec<f64> = (0..spec.dim()).map(|i| 1.0 + i as f64).collect();
        group.throughput(traffic::<f64>(&spec, 1));
        group.bench_function(BenchmarkId::new("amplitude", n), |bencher| {
            let input = Input::sample(&data);
            bencher.iter(|| engine.encode(black_box(&input), &spec, None).expect("valid data"));
        });
    }
    group.finish();
}

fn bench_cpu_memory(criterion: &mut Criterion) {
    let source = vec![1.0f64; 8 << 20];
    let mut target = vec![0.0f64; source.len()];
    let mut group = criterion.benchmark_group("cpu/memory, one thread");
    group.throughput(Throughput::Bytes(2 * size_of_val(&*source) as u64));
    group.bench_function("copy", |bencher| {
        bencher.iter(|| target.copy_from_slice(black_box(&source)));
    });
    group.throughput(Throughput::Bytes(size_of_val(&*source) as u64));
    group.bench_function("write", |bencher| {
        bencher.iter(|| black_box(&mut target).fill(1.0));
    });
    group.finish();
}

/// The first GPU, with an engine on it and memory for its inputs and states.
struct Gpu {
    engine: Engine,
    pool: Arc<Pool>,
    stream: RawStream,
}

impl Gpu {
    fn open() -> Option<Self> {
        let engine = Engine::open(Device::Cuda(0)).ok()?;
        let stream = engine.stream().expect("a GPU's engine has a stream");
        let context = Context::open(0).expect("the engine has opened it");
        let pool = Pool::new(&context, None).expect("a pool");
        Some(Self { engine, pool, stream })
    }

    /// Zeroed memory.
    fn memory(&self, bytes: usize) -> DeviceBuffer {
        let buffer = self.pool.alloc_on(bytes, self.stream).expect("enough memory");
        buffer.memset(0..bytes, 0, self.stream).expect("within the buffer");
        buffer
    }

    fn upload<R: Real>(&self, data: &[R]) -> DeviceBuffer {
        let buffer = self.memory(size_of_val(data));
        // SAFETY: floats have no padding, so all bytes of the slice are initialised.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) };
        buffer.copy_from_host(0, bytes, self.stream).expect("a copy of the same length");
        buffer
    }

    /// Time of `calls` calls, enqueued one after another and waited for at the end.
    fn time(&self, calls: u64, mut enqueue: impl FnMut()) -> Duration {
        self.engine.synchronize().expect("a working device");
        let began = Instant::now();
        for _ in 0..calls {
            enqueue();
        }
        self.engine.synchronize().expect("a working device");
        began.elapsed()
    }
}

fn bench_cuda<R: Real + Element>(criterion: &mut Criterion) {
    let Some(gpu) = Gpu::open() else { return };
    let mut group = criterion.benchmark_group(format!("cuda/{}", R::PRECISION));
    for encoding in encodings() {
        for n in [4, 10, 13, 16, 20] {
            let spec = EncodeSpec::new(encoding.clone(), n).expect("a valid size");
            let (features, dim) = (spec.num_features(), spec.dim());
            // A small one says what a call costs, the others how fast the bytes move.
            let batch = if n == 4 { BATCH } else { GPU_STATE_BYTES / (2 * size_of::<R>() * dim) };
            let source = gpu.upload::<R>(&samples(&encoding, batch * features));
            let states = gpu.memory(2 * size_of::<R>() * batch * dim);
            let strides = (features as isize, 1);
            // SAFETY: `source` holds this many values, ready on the stream that encodes use, and
            // nobody writes it.
            let input = unsafe {
                let ptr = source.ptr() as *const u8;
                Input::from_raw(ptr, R::DTYPE, Device::Cuda(0), (batch, features), strides)
            };
            let options = EncodeOptions { stream: Some(gpu.stream), ..EncodeOptions::default() };
            group.throughput(traffic::<R>(&spec, batch));
            group.bench_function(BenchmarkId::new(encoding.name(), n), |bencher| {
                bencher.iter_custom(|calls| {
                    gpu.time(calls, || {
                        // SAFETY: `states` is zeroed, as large as this, aligned by the driver, and
                        // touched by nothing but these calls, one after another on one stream.
                        let mut output = unsafe {
                            let ptr = states.ptr() as *mut u8;
                            Output::from_raw(ptr, R::PRECISION, Device::Cuda(0), (batch, dim), dim)
                        };
                        let _ = gpu
                            .engine
                            .encode_into(black_box(&input), &spec, &mut output, &options)
                            .expect("a valid call");
                    })
                });
            });
            gpu.engine.check().expect("valid data");
        }
    }
    group.finish();
}

/// What the driver's own copy and fill reach on this device.
fn bench_cuda_memory(criterion: &mut Criterion) {
    let Some(gpu) = Gpu::open() else { return };
    let (source, target) = (gpu.memory(GPU_STATE_BYTES), gpu.memory(GPU_STATE_BYTES));
    let mut group = criterion.benchmark_group("cuda/memory");
    group.throughput(Throughput::Bytes(2 * GPU_STATE_BYTES as u64));
    group.bench_function("copy", |bencher| {
        bencher.iter_custom(|calls| {
            gpu.time(calls, || {
                let copied = target.copy_from_device(0, &source, 0..GPU_STATE_BYTES, gpu.stream);
                copied.expect("buffers of one length");
            })
        });
    });
    group.throughput(Throughput::Bytes(GPU_STATE_BYTES as u64));
    group.bench_function("write", |bencher| {
        bencher.iter_custom(|calls| {
            gpu.time(calls, || {
                target.memset(0..GPU_STATE_BYTES, 1, gpu.stream).expect("within the buffer");
            })
        });
    });
    group.finish();
}

fn cpu(criterion: &mut Criterion) {
    bench_cpu_memory(criterion);
    bench_cpu::<f32>(criterion);
    bench_cpu::<f64>(criterion);
    bench_cpu_allocating(criterion);
}

fn cuda(criterion: &mut Criterion) {
    bench_cuda_memory(criterion);
    bench_cuda::<f32>(criterion);
    bench_cuda::<f64>(criterion);
}

/// Short, for many benchmarks; `--measurement-time` and `--sample-size` make it longer.
fn settings() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
}

criterion_group!(name = all; config = settings(); targets = cpu, cuda);
criterion_main!(all);
