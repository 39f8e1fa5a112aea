//! The CPU backend against the definitions, and its promises.

#[allow(dead_code)] // each test binary uses its share
mod common;

use common::{CONVENTIONS, batch, encodings, feature_counts, reference, values};
use num_complex::Complex;
use proptest::prelude::*;
use qdp_core::{
    Convention, DType, Device, EncodeOptions, EncodeSpec, Encoding, Engine, Entanglement, Error,
    Input, Output, Precision,
};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

fn engine() -> Engine {
    Engine::open(Device::Cpu).expect("the CPU is always there")
}

#[test]
fn every_encoding_equals_its_definition() {
    let engine = engine();
    for encoding in encodings() {
        for convention in CONVENTIONS {
            for n in 1..=8 {
                let spec =
                    EncodeSpec::new(encoding.clone(), n).unwrap().with_convention(convention);
                for features in feature_counts(&spec) {
                    let data = batch(&spec, features, 2);
                    let input = Input::rows(&data, features).unwrap();
                    let double = engine.encode(&input, &spec, None).unwrap();
                    let single = engine.encode(&input, &spec, Some(Precision::Complex64)).unwrap();
                    for (row, x) in data.chunks(features).enumerate() {
                        let expected = reference(&spec, x);
                        for (i, want) in expected.iter().enumerate() {
                            let at = row * spec.dim() + i;
                            let got = double.as_slice::<f64>().unwrap()[at];
                            assert!((got - want).norm() < 2e-14, "{spec:?} row {row} index {i}");
                            let got = single.as_slice::<f32>().unwrap()[at];
                            let got = Complex::new(f64::from(got.re), f64::from(got.im));
                            assert!((got - want).norm() < 1e-6, "{spec:?} row {row} index {i}");
                        }
                    }
                }
            }
        }
    }
}

/// Sizes on both sides of the switch from one task a state to chunks of one state.
#[test]
fn large_states_equal_the_definition_at_sampled_indices() {
    let engine = engine();
    for n in [15, 16, 17] {
        for encoding in [Encoding::Phase, Encoding::Amplitude] {
            let spec = EncodeSpec::new(encoding, n).unwrap();
            let features = spec.num_features();
            let data = batch(&spec, features, 2);
            let state = engine.encode(&Input::rows(&data, features).unwrap(), &spec, None).unwrap();
            for (row, x) in data.chunks(features).enumerate() {
                let expected = reference(&spec, x);
                let got = &state.as_slice::<f64>().unwrap()[row * spec.dim()..][..spec.dim()];
                let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).norm());
                assert!(worst.fold(0.0, f64::max) < 1e-13);
            }
        }
    }
}

/// Sizes on both sides of the switch from one table of all phases to rows of a table.
#[test]
fn diagonals_of_several_chunks_equal_the_definition() {
    let engine = engine();
    let pairs = Entanglement::Pairs(vec![(0, 9), (2, 10), (10, 2), (4, 5)]);
    for encoding in [
        Encoding::Iqp,
        Encoding::Zz { reps: 2, entanglement: Entanglement::Full },
        Encoding::IqpEmbedding { reps: 1, entanglement: pairs.clone() },
        Encoding::IqpEmbedding { reps: 2, entanglement: pairs },
    ] {
        for (n, convention) in [(11, Convention::Qdp), (12, Convention::PennyLane)] {
            let spec = EncodeSpec::new(encoding.clone(), n).unwrap().with_convention(convention);
            let x = values(spec.num_features(), 5);
            let expected = reference(&spec, &x);
            let input = Input::sample(&x);
            let double = engine.encode(&input, &spec, None).unwrap();
            let single = engine.encode(&input, &spec, Some(Precision::Complex64)).unwrap();
            for (i, want) in expected.iter().enumerate() {
                let got = double.as_slice::<f64>().unwrap()[i];
                assert!((got - want).norm() < 1e-14, "{spec:?} index {i}");
                let got = single.as_slice::<f32>().unwrap()[i];
                let got = Complex::new(f64::from(got.re), f64::from(got.im));
                assert!((got - want).norm() < 1e-6, "{spec:?} index {i}");
            }
        }
    }
}

/// A state does not depend on what else is in the batch or on which thread made it, and rows of an
/// output with gaps leave the gaps alone.
#[test]
fn states_of_a_large_batch_equal_those_of_their_samples_alone() {
    let engine = engine();
    let gap = Complex::new(-7.0, 7.0);
    for encoding in encodings() {
        for n in [1, 3, 5, 8, 11] {
            let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
            let features = spec.num_features();
            let count = (1 << 18 >> n).min(3000) + 1;
            let mut data = batch(&spec, features, count);
            if matches!(encoding, Encoding::Angle { .. } | Encoding::Phase) {
                data[features] = 3e7; // takes another way to its sine than its neighbours
            }
            let input = Input::rows(&data, features).unwrap();
            let stride = spec.dim() + 3;
            let mut memory = vec![gap; count * stride];
            // SAFETY: the memory holds `count` rows of this stride and outlives the output.
            let mut output = unsafe {
                let ptr = memory.as_mut_ptr().cast();
                let shape = (count, spec.dim());
                Output::from_raw(ptr, Precision::Complex128, Device::Cpu, shape, stride)
            };
            let options = EncodeOptions::default();
            let _ = engine.encode_into(&input, &spec, &mut output, &options).unwrap();
            for row in (0..count).step_by(97).chain([1, count - 1]) {
                let sample = Input::sample(&data[row * features..][..features]);
                let alone = engine.encode(&sample, &spec, None).unwrap();
                let (state, rest) = memory[row * stride..][..stride].split_at(spec.dim());
                assert_eq!(state, alone.as_slice::<f64>().unwrap(), "{spec:?} row {row}");
                assert!(rest.iter().all(|&z| z == gap), "{spec:?} row {row}");
            }
        }
    }
}

#[test]
fn the_first_bad_sample_of_a_large_batch_is_named() {
    let engine = engine();
    for (encoding, n) in [(Encoding::Amplitude, 4), (Encoding::Phase, 4), (Encoding::Iqp, 10)] {
        let spec = EncodeSpec::new(encoding, n).unwrap();
        let features = spec.num_features();
        let mut data = batch(&spec, features, 9000);
        for sample in [8999, 4321, 700] {
            data[sample * features + 2] = f64::INFINITY;
            let error = engine.encode(&Input::rows(&data, features).unwrap(), &spec, None);
            let expected = Error::NonFinite { sample, position: 2, nan: false };
            assert_eq!(error.unwrap_err(), expected);
        }
    }
}

/// `iqp` twice with opposite phases in between is the identity, so the norm tells of any lost or
/// doubled amplitude of the transform.
#[test]
fn large_diagonal_states_are_unit_vectors() {
    let engine = engine();
    for n in [13, 15, 16, 17] {
        for encoding in encodings().into_iter().filter(|e| e.name() == "zz" || e.name() == "iqp") {
            let spec = EncodeSpec::new(encoding, n).unwrap();
            let x = values(spec.num_features(), 7);
            let state = engine.encode(&Input::sample(&x), &spec, None).unwrap();
            let norm: f64 = state.as_slice::<f64>().unwrap().iter().map(Complex::norm_sqr).sum();
            assert!((norm - 1.0).abs() < 1e-12, "{spec:?}: {norm}");
        }
    }
}

#[test]
fn bad_samples_are_named() {
    let engine = engine();
    let spec = EncodeSpec::new(Encoding::Amplitude, 2).unwrap();
    let mut data = values(12, 3);
    let run =
        |data: &[f64]| engine.encode(&Input::rows(data, 4).unwrap(), &spec, None).unwrap_err();
    data[9] = f64::NAN;
    data[10] = f64::INFINITY;
    assert_eq!(run(&data), Error::NonFinite { sample: 2, position: 1, nan: true });
    data[4..8].fill(0.0);
    assert_eq!(run(&data), Error::ZeroNorm { sample: 1 });
    data[0] = 1e300;
    assert_eq!(run(&data), Error::NormOverflow { sample: 0 });
}

#[test]
fn complex_input_is_for_amplitudes_only() {
    let engine = engine();
    let data = [Complex::new(3.0, 0.0), Complex::new(0.0, 4.0)];
    let spec = EncodeSpec::new(Encoding::Amplitude, 1).unwrap();
    let state = engine.encode(&Input::sample(&data), &spec, None).unwrap();
    let [a, b] = state.as_slice::<f64>().unwrap() else { panic!("two amplitudes") };
    assert!((a - Complex::new(0.6, 0.0)).norm() + (b - Complex::new(0.0, 0.8)).norm() < 1e-15);
    let spec = EncodeSpec::new(Encoding::Phase, 2).unwrap();
    let error = engine.encode(&Input::sample(&data), &spec, None).unwrap_err();
    assert!(matches!(error, Error::DType { argument: "data", .. }), "{error}");
}

#[test]
fn out_is_written_and_checked() {
    let engine = engine();
    let spec = EncodeSpec::new(Encoding::Phase, 3).unwrap();
    let data = values(6, 1);
    let input = Input::rows(&data, 3).unwrap();
    let expected = engine.encode(&input, &spec, Some(Precision::Complex64)).unwrap();
    let mut memory = vec![Complex::new(f32::NAN, f32::NAN); 16];
    let mut output = Output::rows(&mut memory, 8).unwrap();
    let options = EncodeOptions::default();
    let _ = engine.encode_into(&input, &spec, &mut output, &options).unwrap();
    assert_eq!(memory, expected.as_slice::<f32>().unwrap());
    let mut memory = vec![Complex::new(0.0f32, 0.0); 8];
    let mut output = Output::rows(&mut memory, 8).unwrap();
    let error = engine.encode_into(&input, &spec, &mut output, &options).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "out", .. }));
}

#[test]
fn views_share_memory_and_have_bounds() {
    let spec = EncodeSpec::new(Encoding::Basis, 2).unwrap();
    let state = engine().encode(&Input::rows(&[0i64, 1, 2, 3], 1).unwrap(), &spec, None).unwrap();
    let view = state.slice(1..3).unwrap();
    assert_eq!(view.batch(), 2);
    assert_eq!(view.as_ptr() as usize, state.as_ptr() as usize + 4 * 16);
    assert_eq!(view.slice(1..2).unwrap().as_slice::<f64>().unwrap()[2], Complex::from(1.0));
    assert!(state.slice(3..5).is_err());
    assert!(view.as_slice::<f32>().is_err());
}

fn strided(
    values: &[f64],
    shape: (usize, usize),
    strides: (isize, isize),
    offset: isize,
) -> Input<'_> {
    let last = |n: usize, s: isize| (n as isize - 1) * s;
    let (a, b) = (last(shape.0, strides.0), last(shape.1, strides.1));
    let (low, high) = (offset + a.min(0) + b.min(0), offset + a.max(0) + b.max(0));
    assert!(low >= 0 && (high as usize) < values.len());
    // SAFETY: the assertion keeps every element inside `values`.
    unsafe {
        let start = values.as_ptr().offset(offset).cast();
        Input::from_raw(start, DType::F64, Device::Cpu, shape, strides)
    }
}

/// Enough work for several rounds, each of them longer than it takes to be asked again.
#[test]
fn a_long_call_is_interrupted_and_the_next_one_is_right() {
    static STOP: AtomicBool = AtomicBool::new(true);
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let answer = || {
        ASKED.fetch_add(1, Ordering::Relaxed);
        if STOP.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    };
    let spec = EncodeSpec::new(Encoding::Zz { reps: 8, entanglement: Entanglement::Full }, 14);
    let spec = spec.unwrap();
    let data = batch(&spec, 14, 4 * 512);
    let input = Input::rows(&data, 14).unwrap();
    let engine = engine();
    let options = EncodeOptions {
        precision: Some(Precision::Complex64),
        interrupt: Some(answer),
        ..EncodeOptions::default()
    };
    assert_eq!(engine.encode_with(&input, &spec, &options).unwrap_err(), Error::Interrupted);
    assert_eq!(ASKED.load(Ordering::Relaxed), 1);
    STOP.store(false, Ordering::Relaxed);
    let rounds = engine.encode_with(&input, &spec, &options).unwrap();
    assert!(ASKED.load(Ordering::Relaxed) > 1);
    let whole = engine.encode(&input, &spec, options.precision).unwrap();
    assert!(rounds.as_slice::<f32>().unwrap() == whole.as_slice::<f32>().unwrap());
    // The first bad sample is named by its place in the batch.
    let mut bad = data.clone();
    bad[1800 * 14 + 3] = f64::NAN;
    let error = engine.encode_with(&Input::rows(&bad, 14).unwrap(), &spec, &options).unwrap_err();
    assert_eq!(error, Error::NonFinite { sample: 1800, position: 3, nan: true });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any strides give what the gathered values give.
    #[test]
    fn strides_do_not_matter(
        rows in 1usize..5,
        features in 1usize..9,
        row_stride in -12isize..13,
        col_stride in -3isize..4,
        encoding in prop::sample::select(encodings()),
    ) {
        let spec = EncodeSpec::new(encoding, 3).unwrap();
        let features = if *spec.encoding() == Encoding::Amplitude { features.min(8) } else { spec.num_features() };
        let memory: Vec<f64> = if *spec.encoding() == Encoding::Basis {
            (0..200).map(|i| f64::from(i % 2)).collect()
        } else {
            values(200, 5)
        };
        let input = strided(&memory, (rows, features), (row_stride, col_stride), 100);
        let gathered: Vec<f64> = (0..rows as isize)
            .flat_map(|i| (0..features as isize).map(move |j| 100 + i * row_stride + j * col_stride))
            .map(|at| memory[at as usize])
            .collect();
        let engine = engine();
        let got = engine.encode(&input, &spec, None).unwrap();
        let want = engine.encode(&Input::rows(&gathered, features).unwrap(), &spec, None).unwrap();
        prop_assert_eq!(got.as_slice::<f64>().unwrap(), want.as_slice::<f64>().unwrap());
    }

    /// A sample's state does not depend on the batch it is in.
    #[test]
    fn a_batch_is_its_samples(rows in 1usize..40, n in 1u32..12, encoding in prop::sample::select(encodings())) {
        let spec = EncodeSpec::new(encoding, n).unwrap();
        let features = *feature_counts(&spec).last().unwrap();
        let data = batch(&spec, features, rows);
        let engine = engine();
        let all = engine.encode(&Input::rows(&data, features).unwrap(), &spec, None).unwrap();
        let last = engine.encode(&Input::sample(&data[(rows - 1) * features..]), &spec, None).unwrap();
        let view = all.slice(rows - 1..rows).unwrap();
        prop_assert_eq!(view.as_slice::<f64>().unwrap(), last.as_slice::<f64>().unwrap());
    }
}
