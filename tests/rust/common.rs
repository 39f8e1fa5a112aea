//! What the CPU and GPU tests share: samples, and the states that the definitions give.

use num_complex::Complex;
use qdp_core::encoding::diagonal::radians;
use qdp_core::encoding::{Form, product::Factor};
use qdp_core::{Convention, EncodeSpec, Encoding, Entanglement, Rotation};

/// Every encoding with every option that changes a kernel's path.
pub(crate) fn encodings() -> Vec<Encoding> {
    let entanglements = [Entanglement::Full, Entanglement::Circular, Entanglement::Pairs(vec![])];
    let mut all = vec![Encoding::Amplitude, Encoding::Basis, Encoding::Phase, Encoding::Iqp];
    all.push(Encoding::IqpZ);
    all.extend(
        [Rotation::X, Rotation::Y, Rotation::Z].map(|rotation| Encoding::Angle { rotation }),
    );
    for entanglement in entanglements {
        for reps in [1, 2, 3] {
            all.push(Encoding::Zz { reps, entanglement: entanglement.clone() });
            all.push(Encoding::IqpEmbedding { reps, entanglement: entanglement.clone() });
        }
    }
    all
}

/// Deterministic values in (-2, 2), never zero.
pub(crate) fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 11) as f64 / (1u64 << 53) as f64;
            if unit < 0.5 { -2.0 + 3.9 * unit } else { 0.05 + 3.9 * (unit - 0.5) }
        })
        .collect()
}

/// A valid batch for `spec`, row by row.
pub(crate) fn batch(spec: &EncodeSpec, features: usize, batch: usize) -> Vec<f64> {
    let values = values(batch * features, u64::from(spec.num_qubits()) + 1);
    if *spec.encoding() != Encoding::Basis {
        return values;
    }
    let most = if features == 1 { spec.dim() as f64 } else { 2.0 };
    values.iter().map(|x| (x.abs() / 2.0 * most).floor()).collect()
}

/// One state from the definition: no tables, no fast transform.
pub(crate) fn reference(spec: &EncodeSpec, x: &[f64]) -> Vec<Complex<f64>> {
    let dim = spec.dim();
    match spec.form(x.len()).expect("a valid feature count") {
        Form::Amplitude => {
            let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
            (0..dim).map(|i| Complex::from(x.get(i).map_or(0.0, |x| x / norm))).collect()
        }
        Form::Basis => (0..dim).map(|i| Complex::from(f64::from(i == x[0] as usize))).collect(),
        Form::Product(product) => (0..dim)
            .map(|i| {
                (0..x.len())
                    .map(|k| {
                        let bit = if product.big_endian { x.len() - 1 - k } else { k };
                        let factor: Factor = product.factor;
                        factor.evaluate(x[k])[i >> bit & 1]
                    })
                    .product()
            })
            .collect(),
        Form::Diagonal(diagonal) => {
            let phase = diagonal.quadratic_phase(x);
            let scale = Complex::from((dim as f64).sqrt().recip());
            let hadamard = |state: &[Complex<f64>]| -> Vec<Complex<f64>> {
                (0..dim)
                    .map(|i| {
                        let sign = |j: usize| {
                            if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 }
                        };
                        (0..dim).map(|j| state[j] * sign(j)).sum::<Complex<f64>>() * scale
                    })
                    .collect()
            };
            let mut state = vec![Complex::from(0.0); dim];
            state[0] = Complex::from(1.0);
            for _ in 0..diagonal.reps {
                state = hadamard(&state);
                for (i, z) in state.iter_mut().enumerate() {
                    *z *= Complex::cis(radians(phase.at(i)));
                }
            }
            if diagonal.final_hadamard { hadamard(&state) } else { state }
        }
    }
}

/// Numbers of features to try for an encoding.
pub(crate) fn feature_counts(spec: &EncodeSpec) -> Vec<usize> {
    let most = spec.num_features();
    match spec.encoding() {
        Encoding::Amplitude => {
            let mut counts = vec![most, most - 1, most / 2 + 1, 1];
            counts.sort_unstable();
            counts.dedup();
            counts
        }
        Encoding::Basis if most > 1 => vec![1, most],
        _ => vec![most],
    }
}

/// Every convention.
pub(crate) const CONVENTIONS: [Convention; 3] =
    [Convention::Qdp, Convention::Qiskit, Convention::PennyLane];
