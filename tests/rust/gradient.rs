//! Gradients on the CPU against finite differences of the states, and their promises.

#[allow(dead_code)] // each test binary uses its share
mod common;

use common::{CONVENTIONS, batch, encodings, feature_counts, values};
use half::{bf16, f16};
use num_complex::Complex;
use qdp_core::{
    Affine, DType, Device, EncodeOptions, EncodeSpec, Encoding, Engine, Entanglement, Error,
    Gradient, Input, Precision, Rotation, Vector,
};

type C64 = Complex<f64>;

fn engine() -> Engine {
    Engine::open(Device::Cpu).expect("the CPU is always there")
}

fn cotangent(count: usize, seed: u64) -> Vec<C64> {
    let values = values(2 * count, seed);
    values.chunks_exact(2).map(|pair| Complex::new(pair[0], pair[1])).collect()
}

/// `Re sum_i conj(g_i) psi_i`, whose gradient by psi is `g`.
fn loss(engine: &Engine, spec: &EncodeSpec, x: &[f64], g: &[C64]) -> f64 {
    let states = engine.encode(&Input::sample(x), spec, Some(Precision::Complex128)).unwrap();
    states.as_slice::<f64>().unwrap().iter().zip(g).map(|(z, g)| (g.conj() * z).re).sum()
}

fn backward(engine: &Engine, spec: &EncodeSpec, x: &[f64], features: usize, g: &[C64]) -> Vec<f64> {
    let mut gradient = vec![f64::NAN; x.len()];
    let (input, cotangent) =
        (Input::rows(x, features).unwrap(), Input::rows(g, spec.dim()).unwrap());
    let mut out = Gradient::rows(&mut gradient, features).unwrap();
    engine.backward(&input, spec, &cotangent, &mut out, &EncodeOptions::default()).unwrap();
    gradient
}

fn differentiable() -> impl Iterator<Item = Encoding> {
    let pairs = vec![(2, 0), (1, 2), (1, 2)];
    let listed = [
        Encoding::Zz { reps: 2, entanglement: Entanglement::Pairs(pairs.clone()) },
        Encoding::IqpEmbedding { reps: 4, entanglement: Entanglement::Pairs(pairs) },
    ];
    encodings().into_iter().filter(|encoding| *encoding != Encoding::Basis).chain(listed)
}

fn spec_of(encoding: &Encoding, n: u32) -> Option<EncodeSpec> {
    EncodeSpec::new(encoding.clone(), n).ok() // a listed pair needs its qubits
}

#[test]
fn every_derivative_is_that_of_the_states() {
    let engine = engine();
    for encoding in differentiable() {
        for convention in CONVENTIONS {
            for n in 1..=5 {
                let Some(spec) = spec_of(&encoding, n) else { continue };
                let spec = spec.with_convention(convention);
                for features in feature_counts(&spec) {
                    let x = batch(&spec, features, 2);
                    let g = cotangent(2 * spec.dim(), 7);
                    let gradient = backward(&engine, &spec, &x, features, &g);
                    for (i, got) in gradient.iter().enumerate() {
                        let (row, step) = (i / features, 1e-4);
                        let shifted = |by| {
                            let mut x = x[row * features..][..features].to_vec();
                            x[i % features] += by;
                            loss(&engine, &spec, &x, &g[row * spec.dim()..][..spec.dim()])
                        };
                        let slope = |step: f64| (shifted(step) - shifted(-step)) / (2.0 * step);
                        let want = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
                        let scale = (spec.dim() as f64).sqrt() * 10.0;
                        assert!(
                            (got - want).abs() < 1e-8 * scale,
                            "{spec:?} {i}: {got} instead of {want}"
                        );
                    }
                }
            }
        }
    }
}

/// On both sides of every size at which states are cut, in a direction of all features at once.
#[test]
fn large_states_have_the_derivative_in_a_direction() {
    let engine = engine();
    for encoding in [
        Encoding::Amplitude,
        Encoding::Angle { rotation: Rotation::X },
        Encoding::IqpZ,
        Encoding::Iqp,
        Encoding::Zz { reps: 1, entanglement: Entanglement::Circular },
        Encoding::Zz { reps: 2, entanglement: Entanglement::Linear },
        Encoding::IqpEmbedding { reps: 3, entanglement: Entanglement::Full },
    ] {
        for n in [9, 10, 11, 14, 15, 16, 17, 18] {
            let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
            let features = spec.num_features();
            let (x, direction) = (values(features, 3), values(features, 4));
            let g = cotangent(spec.dim(), 5);
            let gradient = backward(&engine, &spec, &x, features, &g);
            let got: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
            let step = 1e-5;
            let moved = |by: f64| -> f64 {
                let x: Vec<f64> = x.iter().zip(&direction).map(|(x, d)| x + by * d).collect();
                loss(&engine, &spec, &x, &g)
            };
            let want = (moved(step) - moved(-step)) / (2.0 * step);
            let scale = (spec.dim() as f64).sqrt() * f64::from(n);
            assert!((got - want).abs() < 1e-6 * scale, "{spec:?}: {got} instead of {want}");
        }
    }
}

/// A complex sample's gradient is that by its real and by its imaginary parts.
#[test]
fn complex_amplitudes() {
    let engine = engine();
    for (n, features) in [(1, 1), (2, 4), (5, 19), (15, 1 << 15), (17, (1 << 17) - 3)] {
        let spec = EncodeSpec::new(Encoding::Amplitude, n).unwrap();
        let x: Vec<C64> = cotangent(features, 11);
        let g = cotangent(spec.dim(), 12);
        let mut gradient = vec![C64::default(); features];
        let mut out = Gradient::rows(&mut gradient, features).unwrap();
        let (input, cotangent) = (Input::sample(&x), Input::sample(&g));
        engine.backward(&input, &spec, &cotangent, &mut out, &EncodeOptions::default()).unwrap();
        let norm = x.iter().map(C64::norm_sqr).sum::<f64>().sqrt();
        let inner: f64 = x.iter().zip(&g).map(|(x, g)| (x.conj() * g).re).sum();
        for ((got, x), g) in gradient.iter().zip(&x).zip(&g) {
            let want = (g - x * (inner / norm / norm)) / norm;
            assert!((got - want).norm() < 1e-13, "{n}: {got} instead of {want}");
        }
    }
}

/// Every element type and layout gives what contiguous doubles give, to the type's rounding.
#[test]
fn types_and_strides_change_nothing_but_roundings() {
    fn check<T: qdp_core::element::Floating>(convert: impl Fn(f64) -> T, tolerance: f64) {
        let engine = engine();
        for encoding in [
            Encoding::Amplitude,
            Encoding::Phase,
            Encoding::Iqp,
            Encoding::Zz { reps: 2, entanglement: Entanglement::Full },
        ] {
            for (n, rows) in [(3, 5), (6, 70), (12, 3)] {
                let spec = EncodeSpec::new(encoding.clone(), n).unwrap();
                let (features, dim) = (spec.num_features(), spec.dim());
                let x: Vec<T> = values(rows * features, 8).into_iter().map(&convert).collect();
                let exact: Vec<f64> = x.iter().map(|x| x.to_f64()).collect();
                let g: Vec<Complex<f32>> = cotangent(rows * dim, 9)
                    .iter()
                    .map(|g| Complex::new(g.re as f32, g.im as f32))
                    .collect();
                let wide: Vec<C64> =
                    g.iter().map(|g| Complex::new(g.re.into(), g.im.into())).collect();
                let want = backward(&engine, &spec, &exact, features, &wide);
                let transposed = |values: &[Complex<f32>]| -> Vec<Complex<f32>> {
                    (0..rows * dim).map(|i| values[i % rows * dim + i / rows]).collect()
                };
                let columns = transposed(&g);
                // SAFETY: shape and strides name elements of `columns`.
                let strided = unsafe {
                    let strides = (1, rows as isize);
                    let dtype = qdp_core::DType::C64;
                    let ptr = columns.as_ptr().cast();
                    Input::from_raw(ptr, dtype, Device::Cpu, (rows, dim), strides)
                };
                let input = Input::rows(&x, features).unwrap();
                let mut bits = Vec::new();
                for cotangent in [Input::rows(&g, dim).unwrap(), strided] {
                    let mut gradient = vec![convert(7.0); rows * features];
                    let mut out = Gradient::rows(&mut gradient, features).unwrap();
                    let options = EncodeOptions::default();
                    engine.backward(&input, &spec, &cotangent, &mut out, &options).unwrap();
                    let got: Vec<f64> = gradient.iter().map(|x| x.to_f64()).collect();
                    let scale = (dim as f64).sqrt();
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        let error = (got - want).abs();
                        assert!(
                            error < tolerance * (scale + want.abs()),
                            "{spec:?} {i}: {got} instead of {want}"
                        );
                    }
                    bits.push(got);
                }
                assert_eq!(bits[0], bits[1], "{spec:?}");
            }
        }
    }
    check(|x| x, 3e-6);
    check(|x| x as f32, 3e-6);
    check(f16::from_f64, 1e-3);
    check(bf16::from_f64, 8e-3);
}

#[test]
fn samples_without_a_state_have_no_gradient() {
    let engine = engine();
    for (encoding, bad) in [
        (Encoding::Amplitude, [0.0, 0.0, 0.0]),
        (Encoding::Amplitude, [1.0, f64::INFINITY, 0.0]),
        (Encoding::Angle { rotation: Rotation::Z }, [1.0, f64::NAN, 0.0]),
        (Encoding::Zz { reps: 2, entanglement: Entanglement::Full }, [f64::INFINITY, 1.0, 0.0]),
    ] {
        let spec = EncodeSpec::new(encoding, 3).unwrap();
        let mut x = vec![0.5; 9];
        x[3..6].copy_from_slice(&bad);
        let gradient = backward(&engine, &spec, &x, 3, &cotangent(24, 3));
        for (i, value) in gradient.iter().enumerate() {
            assert_eq!(value.is_nan(), (3..6).contains(&i), "{spec:?} {i}");
        }
    }
}

#[test]
fn what_has_no_gradient_is_refused() {
    let engine = engine();
    let spec = |encoding| EncodeSpec::new(encoding, 2).unwrap();
    let options = EncodeOptions::default();
    let g = cotangent(4, 1);
    let g = Input::sample(&g);
    let run = |spec: &EncodeSpec, input: &Input<'_>, g: &Input<'_>, features| {
        let mut memory = vec![0.0; features];
        let mut out = Gradient::rows(&mut memory, features).unwrap();
        engine.backward(input, spec, g, &mut out, &options).unwrap_err()
    };
    let x = Input::sample(&[0.5, 0.25]);
    let error = run(&spec(Encoding::Basis), &x, &g, 2);
    assert!(matches!(error, Error::InvalidArgument { argument: "encoding", .. }), "{error}");
    let integers = Input::sample(&[1i32, 2]);
    let error = run(&spec(Encoding::Phase), &integers, &g, 2);
    assert!(matches!(error, Error::DType { argument: "data", .. }), "{error}");
    let error = run(&spec(Encoding::Phase), &x, &Input::sample(&[1.0; 4]), 2);
    assert!(matches!(error, Error::DType { argument: "grad", .. }), "{error}");
    let short = cotangent(3, 1);
    let error = run(&spec(Encoding::Phase), &x, &Input::sample(&short), 2);
    assert!(matches!(error, Error::Shape { argument: "grad", .. }), "{error}");
    let error = run(&spec(Encoding::Phase), &x, &g, 1);
    assert!(matches!(error, Error::Shape { argument: "out", .. }), "{error}");
    let error = run(&spec(Encoding::Phase), &Input::sample(&[0.5f32, 0.25]), &g, 2);
    assert!(matches!(error, Error::DType { argument: "out", .. }), "{error}");
    let error = run(&spec(Encoding::Phase), &Input::sample(&[0.5; 3]), &g, 3);
    assert!(matches!(error, Error::FeatureCount { .. }), "{error}");
}

#[test]
fn features_are_mapped_where_they_are_read() {
    let engine = engine();
    let options = EncodeOptions::default();
    for encoding in differentiable() {
        let Some(spec) = spec_of(&encoding, 3) else { continue };
        for features in feature_counts(&spec) {
            let x = batch(&spec, features, 2);
            let (weight, bias) = (values(features, 3), values(features, 4));
            let narrow: Vec<f32> = weight.iter().map(|&w| w as f32).collect();
            let affine =
                Affine { weight: Some(Vector::values(&narrow)), bias: Some(Vector::values(&bias)) };
            let input = Input::rows(&x, features).unwrap().with_affine(affine).unwrap();
            if !encoding.takes_affine() {
                let refused = engine.encode(&input, &spec, None);
                assert!(matches!(refused, Err(Error::InvalidArgument { argument: "weight", .. })));
                continue;
            }
            let map = |(i, &x): (usize, &f64)| {
                x.mul_add(f64::from(narrow[i % features]), bias[i % features])
            };
            let mapped: Vec<f64> = x.iter().enumerate().map(map).collect();
            let states = engine.encode(&input, &spec, None).unwrap();
            let want = engine.encode(&Input::rows(&mapped, features).unwrap(), &spec, None);
            assert_eq!(states.as_slice::<f64>().unwrap(), want.unwrap().as_slice::<f64>().unwrap());
            let g = cotangent(2 * spec.dim(), 7);
            let mut gradient = vec![f64::NAN; x.len()];
            let mut out = Gradient::rows(&mut gradient, features).unwrap();
            let states = Input::rows(&g, spec.dim()).unwrap();
            engine.backward(&input, &spec, &states, &mut out, &options).unwrap();
            assert_eq!(gradient, backward(&engine, &spec, &mapped, features, &g));
        }
    }
}

#[test]
fn a_map_has_a_value_for_every_feature() {
    let (x, short, integers) = ([0.0; 4], [1.0; 3], [1_i32; 4]);
    let take = |weight| {
        let affine = Affine { weight: None, bias: Some(weight) };
        Input::sample(&x).with_affine(affine).map(|_| ())
    };
    assert!(matches!(take(Vector::values(&short)), Err(Error::Shape { argument: "bias", .. })));
    let (ptr, device) = (integers.as_ptr().cast(), Device::Cpu);
    // SAFETY: the values are borrowed for as long as they are described.
    let of_type = |dtype, device| unsafe { Vector::from_raw(ptr, dtype, device, 4) };
    let refused = take(of_type(DType::I32, device));
    assert!(matches!(refused, Err(Error::DType { argument: "bias", .. })));
    let refused = take(of_type(DType::F32, Device::Cuda(0)));
    assert!(matches!(refused, Err(Error::DeviceMismatch { argument: "bias", .. })));
}
