//! The CPU backend, encode by encode: `cargo bench`. Throughput is in amplitudes per second.
//!
//! Output goes to memory of the caller's (`out`), so that what is timed is the encode, and not how
//! fast the operating system hands out fresh pages; the allocating call is timed beside it.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use num_complex::Complex;
use qdp_core::element::Real;
use qdp_core::{
    Device, EncodeOptions, EncodeSpec, Encoding, Engine, Entanglement, Input, Output, Rotation,
};
use std::hint::black_box;

const BATCH: usize = 64;

fn encodings() -> [Encoding; 6] {
    let entanglement = Entanglement::Full;
    [
        Encoding::Amplitude,
        Encoding::Angle { rotation: Rotation::Y },
        Encoding::Phase,
        Encoding::Iqp,
        Encoding::Zz { reps: 2, entanglement: entanglement.clone() },
        Encoding::IqpEmbedding { reps: 1, entanglement },
    ]
}

fn bench_into<R: Real>(criterion: &mut Criterion, precision: &str) {
    let engine = Engine::open(Device::Cpu).expect("the CPU is always there");
    let mut group = criterion.benchmark_group(format!("encode_into/{precision}"));
    group.sample_size(10);
    for encoding in encodings() {
        for n in [4, 10, 16] {
            let spec = EncodeSpec::new(encoding.clone(), n).expect("a valid size");
            let features = spec.num_features();
            let data: Vec<f64> = (0..BATCH * features).map(|i| 0.1 + (i % 31) as f64).collect();
            let input = Input::rows(&data, features).expect("whole rows");
            let mut memory = vec![Complex::new(R::zero(), R::zero()); BATCH * spec.dim()];
            group.throughput(Throughput::Elements((BATCH * spec.dim()) as u64));
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

fn bench_allocating(criterion: &mut Criterion) {
    let engine = Engine::open(Device::Cpu).expect("the CPU is always there");
    let mut group = criterion.benchmark_group("encode");
    group.sample_size(10);
    for n in [2, 6, 10, 16] {
        let spec = EncodeSpec::new(Encoding::Amplitude, n).expect("a valid size");
        let data: Vec<f64> = (0..spec.dim()).map(|i| 1.0 + i as f64).collect();
        group.throughput(Throughput::Elements(spec.dim() as u64));
        group.bench_function(BenchmarkId::new("amplitude, one sample", n), |bencher| {
            let input = Input::sample(&data);
            bencher.iter(|| engine.encode(black_box(&input), &spec, None).expect("valid data"));
        });
    }
    group.finish();
}

fn benches(criterion: &mut Criterion) {
    bench_into::<f32>(criterion, "complex64");
    bench_into::<f64>(criterion, "complex128");
    bench_allocating(criterion);
}

criterion_group!(all, benches);
criterion_main!(all);
