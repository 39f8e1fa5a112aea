//! Layers of Hadamards and quadratic phases.
//!
//! The phase splits over the index's low and high bits: pairs within the low bits give one table
//! per sample; for one value of the high bits, everything else is linear in the low bits, so it is
//! a product of single-bit phases. The high bits' share is summed in exact fixed point.

use super::product::{round, table};
use super::walsh_hadamard::walsh_hadamard;
use super::{Within, for_chunks};
use crate::element::Real;
use crate::encoding::Diagonal;
use crate::encoding::diagonal::{QuadraticPhase, Turns, pair_index, radians};
use num_complex::Complex;

const LOW_BITS: usize = 10;

pub(super) fn encode<R: Real>(
    diagonal: &Diagonal,
    x: &[f64],
    state: &mut [Complex<R>],
    within: Within,
) {
    let phase = diagonal.quadratic_phase(x);
    let low_pairs: Vec<Complex<R>> = round(&low_pair_table(&phase));
    for rep in 0..diagonal.reps {
        let scale = diagonal.scale(rep);
        if rep > 0 {
            walsh_hadamard(state, within);
        }
        for_chunks(state, low_pairs.len(), within, |first, chunk| {
            let linear: Vec<Complex<R>> = round(&linear_table(&phase, first, chunk.len(), scale));
            if rep == 0 {
                // The first Hadamard of |0> is the uniform state, which is in the scale.
                for ((value, &pairs), &linear) in chunk.iter_mut().zip(&low_pairs).zip(&linear) {
                    *value = pairs * linear;
                }
            } else {
                for ((value, &pairs), &linear) in chunk.iter_mut().zip(&low_pairs).zip(&linear) {
                    *value *= pairs * linear;
                }
            }
        });
    }
    if diagonal.final_hadamard {
        walsh_hadamard(state, within);
    }
}

fn cis(turns: Turns) -> Complex<f64> {
    Complex::cis(radians(turns))
}

/// `exp(i sum_{j<k} w_jk b_j b_k)` over the low bits, by doubling.
fn low_pair_table(phase: &QuadraticPhase) -> Vec<Complex<f64>> {
    let n = phase.singles.len();
    let mut pairs = vec![Complex::new(1.0, 0.0)];
    for k in 0..n.min(LOW_BITS) {
        let couplings: Vec<_> = (0..k)
            .map(|j| [Complex::new(1.0, 0.0), cis(phase.pairs[pair_index(n, j, k)])])
            .collect();
        let with_k = table(&couplings, Complex::new(1.0, 0.0));
        let half = pairs.len();
        pairs.extend_from_within(..);
        pairs[half..].iter_mut().zip(&with_k).for_each(|(z, &u)| *z *= u);
    }
    pairs
}

/// The share of the phase that is linear in the low bits, for the high bits of `first`.
fn linear_table(phase: &QuadraticPhase, first: usize, len: usize, scale: f64) -> Vec<Complex<f64>> {
    let n = phase.singles.len();
    let low_bits = len.trailing_zeros() as usize;
    let factors: Vec<_> = (0..low_bits)
        .map(|j| {
            let single =
                (low_bits..n).filter(|k| first >> k & 1 == 1).fold(phase.singles[j], |sum, k| {
                    sum.wrapping_add(phase.pairs[pair_index(n, j, k)])
                });
            [Complex::new(1.0, 0.0), cis(single)]
        })
        .collect();
    table(&factors, cis(phase.at(first)) * scale)
}
