//! The CUDA backend against the CPU backend, and its promises. Without a GPU these tests skip,
//! unless `QDP_REQUIRE_GPU=1` asks for one.

#[allow(dead_code)] // each test binary uses its share
mod common;

use common::{CONVENTIONS, batch, encodings, feature_counts, values};
use num_complex::Complex;
use qdp_core::{
    Convention, Device, EncodeSpec, Encoding, Engine, Entanglement, Error, GraphSpec, Input,
    Precision, Rotation, StateBatch, cuda,
};
use std::sync::{Mutex, MutexGuard};

/// Live objects are counted per process, so tests run one at a time.
static SERIAL: Mutex<()> = Mutex::new(());

#[allow(clippy::disallowed_methods)] // a test is told by the environment what to require
fn gpu() -> Option<(MutexGuard<'static, ()>, Engine)> {
    // The guard first: bindings are dropped in reverse, so an engine goes before the next test.
    let guard = SERIAL.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match Engine::open(Device::Cuda(0)) {
        Ok(engine) => Some((guard, engine)),
        Err(reason) => {
            let required = std::env::var("QDP_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "QDP_REQUIRE_GPU=1, but {reason}");
            eprintln!("skipped: {reason}");
            None
        }
    }
}

fn worst_difference(got: &StateBatch, want: &StateBatch) -> f64 {
    let got = got.to_host().expect("states are readable");
    match got.precision() {
        Precision::Complex64 => {
            let pairs = got.as_slice::<f32>().unwrap().iter().zip(want.as_slice::<f32>().unwrap());
            pairs.map(|(a, b)| f64::from((a - b).norm())).fold(0.0, f64::max)
        }
        Precision::Complex128 => {
            let pairs = got.as_slice::<f64>().unwrap().iter().zip(want.as_slice::<f64>().unwrap());
            pairs.map(|(a, b)| (a - b).norm()).fold(0.0, f64::max)
        }
    }
}

fn compare(gpu: &Engine, spec: &EncodeSpec, features: usize, rows: usize) {
    let cpu = Engine::open(Device::Cpu).unwrap();
    let data = batch(spec, features, rows);
    let input = Input::rows(&data, features).unwrap();
    for (precision, tolerance) in [(Precision::Complex64, 2e-6), (Precision::Complex128, 1e-13)] {
        let got = gpu.encode(&input, spec, Some(precision)).unwrap();
        let again = gpu.encode(&input, spec, Some(precision)).unwrap();
        let want = cpu.encode(&input, spec, Some(precision)).unwrap();
        let worst = worst_difference(&got, &want);
        assert!(worst < tolerance, "{spec:?} {features} features {precision}: {worst:e}");
        let again = worst_difference(&again, &got.to_host().unwrap());
        assert!(again == 0.0, "{spec:?} {precision} differs from run to run by {again:e}");
    }
}

#[test]
fn equals_the_cpu_backend() {
    let Some((_guard, gpu)) = gpu() else { return };
    for encoding in encodings() {
        for convention in CONVENTIONS {
            for n in [1, 2, 3, 5, 8, 11, 12] {
                let spec =
                    EncodeSpec::new(encoding.clone(), n).unwrap().with_convention(convention);
                for features in feature_counts(&spec) {
                    compare(&gpu, &spec, features, 3);
                }
            }
        }
    }
}

/// Sizes on both sides of every threshold: rows in registers or in chunks, added up by each block
/// or by one, one chunk or several, one tile or passes, one strided pass or two.
#[test]
fn equals_the_cpu_backend_around_thresholds() {
    let Some((_guard, gpu)) = gpu() else { return };
    let full = Entanglement::Full;
    for n in [12, 13, 14, 15, 20, 21, 22] {
        for encoding in [
            Encoding::Amplitude,
            Encoding::Phase,
            Encoding::Iqp,
            Encoding::Zz { reps: 2, entanglement: full.clone() },
            Encoding::Zz { reps: 3, entanglement: Entanglement::Linear },
            Encoding::IqpEmbedding { reps: 1, entanglement: full.clone() },
        ] {
            let spec = EncodeSpec::new(encoding, n).unwrap();
            let rows = if n > 15 { 1 } else { 3 };
            for features in feature_counts(&spec) {
                compare(&gpu, &spec, features, rows);
            }
        }
    }
}

/// Several short rows to a block with the last block not full, one row, and chunks of one.
#[test]
fn equals_the_cpu_backend_around_tiles() {
    let Some((_guard, gpu)) = gpu() else { return };
    let angle = Encoding::Angle { rotation: Rotation::X };
    for (n, rows) in [(1, 20_001), (2, 63), (2, 64), (5, 4099), (8, 700), (9, 131), (10, 65)]
        .into_iter()
        .chain([(11, 64), (11, 95), (12, 33), (16, 2)])
    {
        for encoding in [angle.clone(), Encoding::Phase, Encoding::IqpZ, Encoding::Basis] {
            for convention in [Convention::Qdp, Convention::PennyLane] {
                let spec =
                    EncodeSpec::new(encoding.clone(), n).unwrap().with_convention(convention);
                for features in feature_counts(&spec) {
                    compare(&gpu, &spec, features, rows);
                }
            }
        }
    }
}

#[test]
fn a_state_is_the_same_in_every_batch() {
    let Some((_guard, gpu)) = gpu() else { return };
    for n in [3, 9, 13, 14, 17] {
        let spec = EncodeSpec::new(Encoding::Amplitude, n).unwrap();
        let features = spec.num_features();
        let data = batch(&spec, features, 11);
        let states = gpu.encode(&Input::rows(&data, features).unwrap(), &spec, None).unwrap();
        for (sample, row) in data.chunks(features).enumerate() {
            let alone = gpu.encode(&Input::sample(row), &spec, None).unwrap().to_host().unwrap();
            let together = states.slice(sample..sample + 1).unwrap();
            assert!(worst_difference(&together, &alone) == 0.0, "n={n}, sample {sample}");
        }
    }
}

/// Diagonal forms on both sides of every threshold: bits in registers and states to a block (which
/// follow from the batch), folded bits, passes over memory and how many.
#[test]
fn diagonals_equal_the_cpu_backend_around_thresholds() {
    let Some((_guard, gpu)) = gpu() else { return };
    let full = Entanglement::Full;
    let encodings = [
        Encoding::Iqp,
        Encoding::Zz { reps: 1, entanglement: full.clone() },
        Encoding::Zz { reps: 2, entanglement: Entanglement::Circular },
        Encoding::Zz { reps: 4, entanglement: full.clone() },
        Encoding::IqpEmbedding { reps: 2, entanglement: full.clone() },
        Encoding::IqpEmbedding { reps: 3, entanglement: full },
    ];
    let sizes = (2..=11).flat_map(|n| [(n, 1), (n, 67), (n, 9000 >> n << 4 | 1)]);
    let sizes = sizes.chain((12..=19).map(|n| (n, 2))).chain([(23, 1), (24, 1)]);
    for (n, rows) in sizes {
        for encoding in &encodings {
            let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
            compare(&gpu, &spec, spec.num_features(), rows);
        }
    }
}

/// A small copy of the above for compute-sanitizer: every kernel, small sizes.
#[test]
fn sanitize_every_kernel() {
    let Some((_guard, gpu)) = gpu() else { return };
    for encoding in encodings() {
        for n in [1, 4, 9] {
            let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
            for features in feature_counts(&spec) {
                compare(&gpu, &spec, features, 2);
            }
        }
    }
    for encoding in [Encoding::Amplitude, Encoding::Iqp, Encoding::Phase] {
        let spec = EncodeSpec::new(encoding, 14).unwrap();
        compare(&gpu, &spec, spec.num_features(), 1);
    }
    for encoding in [Encoding::Basis, Encoding::Phase] {
        let spec = EncodeSpec::new(encoding, 3).unwrap();
        compare(&gpu, &spec, spec.num_features(), 133); // several rows to a block
    }
}

fn check_type<T: qdp_core::element::Element>(gpu: &Engine, cpu: &Engine, from: impl Fn(u8) -> T) {
    for (encoding, n, features) in
        [(Encoding::Amplitude, 5, 29), (Encoding::Amplitude, 14, 12_000), (Encoding::Phase, 5, 5)]
    {
        if T::DTYPE.is_complex() && encoding == Encoding::Phase {
            continue;
        }
        let data: Vec<T> = (0..2 * features).map(|i| from((i % 100) as u8 + 1)).collect();
        let input = Input::rows(&data, features).unwrap();
        let spec = EncodeSpec::new(encoding, n).unwrap();
        let got = gpu.encode(&input, &spec, Some(Precision::Complex128)).unwrap();
        let want = cpu.encode(&input, &spec, Some(Precision::Complex128)).unwrap();
        let worst = worst_difference(&got, &want);
        assert!(worst < 1e-13, "{} {spec:?}: {worst:e}", T::DTYPE);
    }
}

#[test]
fn every_element_type_gives_the_same_states() {
    use half::{bf16, f16};
    let Some((_guard, gpu)) = gpu() else { return };
    let cpu = Engine::open(Device::Cpu).unwrap();
    check_type(&gpu, &cpu, |x| x);
    check_type(&gpu, &cpu, |x| u16::from(x) * 300);
    check_type(&gpu, &cpu, |x| u32::from(x) * 70_000);
    check_type(&gpu, &cpu, |x| u64::from(x) << 40);
    check_type(&gpu, &cpu, |x| (x as i8) - 50);
    check_type(&gpu, &cpu, |x| i16::from(x) - 50);
    check_type(&gpu, &cpu, |x| i32::from(x) - 50);
    check_type(&gpu, &cpu, |x| i64::from(x) - 50);
    check_type(&gpu, &cpu, |x| f16::from_f32(f32::from(x) / 7.0));
    check_type(&gpu, &cpu, |x| bf16::from_f32(f32::from(x) / 7.0));
    check_type(&gpu, &cpu, |x| f32::from(x) / 7.0);
    check_type(&gpu, &cpu, |x| f64::from(x) / 7.0);
    check_type(&gpu, &cpu, |x| Complex::new(f32::from(x) / 7.0, 1.0));
    check_type(&gpu, &cpu, |x| Complex::new(1.0, f64::from(x) / 7.0));
}

#[test]
fn bad_host_input_raises_at_the_call_and_the_engine_lives() {
    let Some((_guard, gpu)) = gpu() else { return };
    let spec = EncodeSpec::new(Encoding::Amplitude, 16).unwrap();
    let features = spec.num_features();
    let mut data = values(3 * features, 1);
    data[features + 40_000] = f64::NAN;
    let error = gpu.encode(&Input::rows(&data, features).unwrap(), &spec, None).unwrap_err();
    assert_eq!(error, Error::NonFinite { sample: 1, position: 40_000, nan: true });
    compare(&gpu, &spec, features, 2);
    assert_eq!(gpu.check(), Ok(()));
}

#[test]
fn what_cannot_fit_is_refused() {
    let Some((_guard, gpu)) = gpu() else { return };
    let spec = EncodeSpec::new(Encoding::Phase, 45).unwrap();
    let error = gpu.encode(&Input::sample(&values(45, 1)), &spec, None).unwrap_err();
    assert!(
        matches!(error, Error::OutOfMemory { needed, free, total, .. }
            if needed == 1 << 49 && free > 0 && free <= total),
        "{error}"
    );
    compare(&gpu, &EncodeSpec::new(Encoding::Phase, 5).unwrap(), 5, 2);
}

#[test]
fn nothing_leaks() {
    let before = {
        let Some((_guard, gpu)) = gpu() else { return };
        drop(gpu);
        cuda::live_objects()
    };
    let Some((_guard, gpu)) = gpu() else { return };
    let mut states = Vec::new();
    for n in [1, 6, 12, 14, 17] {
        for encoding in encodings() {
            let spec = EncodeSpec::new(encoding, n).unwrap();
            let features = spec.num_features();
            let data = batch(&spec, features, 1);
            states.push(gpu.encode(&Input::sample(&data), &spec, None).unwrap());
            let bad = vec![f64::NAN; features];
            assert!(gpu.encode(&Input::sample(&bad), &spec, None).is_err());
        }
    }
    let views: Vec<_> = states.iter().map(|state| state.slice(0..1).unwrap()).collect();
    drop(states);
    drop(gpu);
    assert!(views.iter().all(|view| view.to_host().is_ok()), "views outlive the engine");
    drop(views);
    assert_eq!(cuda::live_objects(), before);
}

#[test]
fn graphs_replay_what_encode_gives() {
    let before = {
        let Some((_guard, gpu)) = gpu() else { return };
        drop(gpu);
        cuda::live_objects()
    };
    let Some((_guard, gpu)) = gpu() else { return };
    let cpu = Engine::open(Device::Cpu).unwrap();
    let mut held = Vec::new();
    for n in [1, 6, 12, 14, 17] {
        for encoding in encodings() {
            let spec = EncodeSpec::new(encoding, n).unwrap();
            let features = spec.num_features();
            let captured = GraphSpec { sizes: vec![1, 4], ..GraphSpec::new(spec.clone(), 0) };
            let graph = gpu.capture(captured, &[]).unwrap();
            for rows in [4, 1, 3, 2] {
                let data = batch(&spec, features, rows);
                let input = Input::rows(&data, features).unwrap();
                let want = cpu.encode(&input, &spec, None).unwrap();
                let replay = graph.replay(&input, &[], None).unwrap();
                let worst = worst_difference(&replay.states[0], &want);
                assert!(worst < 1e-13, "{spec:?} {rows} rows: {worst:e}");
                if rows == 3 {
                    held.push((replay, want));
                }
            }
            let bad = vec![f64::NAN; features];
            assert!(graph.replay(&Input::sample(&bad), &[], None).is_err());
            assert!(graph.slots() <= 4);
        }
    }
    drop(gpu);
    for (replay, want) in &held {
        assert!(
            worst_difference(&replay.states[0], want) < 1e-13,
            "states outlive graph and engine"
        );
    }
    drop(held);
    assert_eq!(cuda::live_objects(), before);
}

#[test]
fn threads_share_an_engine() {
    let Some((_guard, gpu)) = gpu() else { return };
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let gpu = &gpu;
            scope.spawn(move || {
                let spec = EncodeSpec::new(Encoding::Amplitude, 6 + thread % 4).unwrap();
                for _ in 0..50 {
                    compare(gpu, &spec, spec.num_features(), 5);
                }
            });
        }
    });
}
