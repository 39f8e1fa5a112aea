//! Encodings that entangle: layers of a Walsh-Hadamard transform and a diagonal of phases.
//!
//! Every such diagonal has a phase that is quadratic in the bits of the index,
//! `c + sum_k s_k b_k + sum_{j<k} w_jk b_j b_k`. The three encodings differ only in how features
//! give the coefficients:
//!
//! - iqp: `s_k` and `w_jk` are the features themselves.
//! - zz: a pair adds `u (b_j xor b_k)`, `u = 2 (pi - x_j)(pi - x_k)`, and
//!   `b_j xor b_k = b_j + b_k - 2 b_j b_k`; single phases are `2 x_k` (Qiskit, `zz_feature_map`).
//! - iqp-embedding: RZ(x) is the phase `-x/2 + x b`, and MultiRZ(u) on two qubits, with
//!   `u = x_j x_k`, is `-u/2 + u b_j + u b_k - 2 u b_j b_k` (PennyLane, `IQPEmbedding`).
//!
//! Coefficients are kept in turns as 64-bit fixed point: adding them wraps modulo one turn and
//! loses nothing, however many terms there are and however large they are.

use std::f64::consts::PI;

/// How features become pair coefficients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum PairTerms {
    /// One feature per pair, after the singles: pairs (0,1), (0,2), ..., (n-2,n-1).
    Explicit = 0,
    /// `2 (pi - x_j)(pi - x_k)` on `b_j xor b_k`.
    Zz = 1,
    /// `MultiRZ` of `x_j x_k`.
    Multi = 2,
}

/// A layered diagonal encoding.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagonal {
    /// Number of qubits.
    pub num_qubits: u32,
    /// How features become coefficients.
    pub terms: PairTerms,
    /// How often each pair of features is coupled: entry `pair_index(n, j, k)`.
    pub multiplicity: Vec<u32>,
    /// How often H and the diagonal are repeated.
    pub reps: u32,
    /// Whether a last H follows.
    pub final_hadamard: bool,
    /// Whether feature 0 belongs to the most significant bit.
    pub big_endian: bool,
    /// For every pair of bits, in `pair_index` order, the position of its features among the pairs.
    positions: Vec<u32>,
    /// The multiplicity at each of these positions.
    by_bits: Vec<u64>,
}

const fn pairs_of(n: usize) -> usize {
    n * (n - 1) / 2
}

/// Position of pair `(j, k)`, `j < k`, in the order (0,1), (0,2), ..., (n-2,n-1).
pub const fn pair_index(n: usize, j: usize, k: usize) -> usize {
    j * (2 * n - j - 1) / 2 + k - j - 1
}

/// A phase in turns, as 64-bit fixed point modulo one turn.
pub type Turns = u64;

/// `phase` radians in turns: the fraction of a turn that is left, rounded as a double.
///
/// Without a branch, so that a loop over phases is vectorised.
#[inline(always)]
#[allow(clippy::inline_always)]
pub fn turns(phase: f64) -> Turns {
    // 1/(2 pi) in two doubles, so that the product keeps the bits below the first one's rounding.
    const HIGH: f64 = 0.159_154_943_091_895_35;
    const LOW: f64 = -9.839_338_337_591_243e-18;
    // Added to a small number, this rounds it to an integer, found in the lowest bits of the sum.
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    const TWO_32: f64 = (1u64 << 32) as f64;
    let high = phase * HIGH;
    let low = phase.mul_add(HIGH, -high) + phase * LOW;
    let fraction = (high - high.round_ties_even()) + low;
    // The upper and the lower 32 bits one after the other: all that is above a turn is shifted out.
    let upper = fraction * TWO_32 + ROUND;
    let lower = (fraction * TWO_32 - (upper - ROUND)) * TWO_32 + ROUND;
    (upper.to_bits() << 32).wrapping_add(lower.to_bits().wrapping_sub(ROUND.to_bits()))
}

/// A phase in turns as radians in (-pi, pi].
pub fn radians(turns: Turns) -> f64 {
    (turns as i64) as f64 * (PI * 2f64.powi(-63))
}

/// The quadratic phase of one sample.
#[derive(Debug, Clone, Default)]
pub struct QuadraticPhase {
    /// `c`.
    pub constant: Turns,
    /// `s_k`, by bit.
    pub singles: Vec<Turns>,
    /// `w_jk`, by pair of bits, `pair_index` order.
    pub pairs: Vec<Turns>,
    /// The angles that they were made of.
    angles: Vec<f64>,
}

/// The derivatives of a loss by the coefficients of a [`QuadraticPhase`], in its order: sums over
/// the indices of the derivative by the phase there, of all, of those with a bit set, and of those
/// with two.
#[derive(Debug, Clone, Default)]
pub struct QuadraticSlopes {
    /// By `c`.
    pub constant: f64,
    /// By `s_k`.
    pub singles: Vec<f64>,
    /// By `w_jk`.
    pub pairs: Vec<f64>,
}

impl Diagonal {
    pub(super) fn new(
        num_qubits: u32,
        terms: PairTerms,
        pairs: &[(u32, u32)],
        reps: u32,
        final_hadamard: bool,
        big_endian: bool,
    ) -> Self {
        let n = num_qubits as usize;
        let mut multiplicity = vec![0; pairs_of(n)];
        for &(j, k) in pairs {
            multiplicity[pair_index(n, j as usize, k as usize)] += 1;
        }
        let position = |(j, k)| {
            if big_endian { pair_index(n, n - 1 - k, n - 1 - j) } else { pair_index(n, j, k) }
        };
        let positions: Vec<u32> = (0..n)
            .flat_map(|j| (j + 1..n).map(move |k| (j, k)))
            .map(|bits| position(bits) as u32)
            .collect();
        let by_bits =
            positions.iter().map(|&pair| u64::from(multiplicity[pair as usize])).collect();
        Self {
            num_qubits,
            terms,
            multiplicity,
            reps,
            final_hadamard,
            big_endian,
            positions,
            by_bits,
        }
    }

    /// The coefficients for the features `x` of one sample, by bit of the index.
    pub fn quadratic_phase(&self, x: &[f64]) -> QuadraticPhase {
        let mut phase = QuadraticPhase::default();
        self.quadratic_phase_into(x, &mut phase);
        phase
    }

    /// [`Self::quadratic_phase`] into memory that is there already.
    #[inline(always)] // into code for the processor's vectors
    #[allow(clippy::inline_always)]
    pub fn quadratic_phase_into(&self, x: &[f64], phase: &mut QuadraticPhase) {
        let n = self.num_qubits as usize;
        let QuadraticPhase { constant, singles, pairs, angles } = phase;
        // Angles first: then all of them become turns in one loop.
        angles.clear();
        angles.extend_from_slice(&x[..n]);
        if self.big_endian {
            angles.reverse();
        }
        if self.terms == PairTerms::Explicit {
            if self.big_endian {
                angles.extend(self.positions.iter().map(|&pair| x[n + pair as usize]));
            } else {
                angles.extend_from_slice(&x[n..]);
            }
        } else {
            angles.resize(n + pairs_of(n), 0.0);
            let (x, mut rest) = angles.split_at_mut(n);
            for j in 0..n {
                let row;
                (row, rest) = rest.split_at_mut(n - 1 - j);
                for (angle, &b) in row.iter_mut().zip(&x[j + 1..]) {
                    *angle = match self.terms {
                        PairTerms::Zz => 2.0 * (PI - x[j]) * (PI - b),
                        _ => x[j] * b,
                    };
                }
            }
        }
        let factor = if self.terms == PairTerms::Zz { 2.0 } else { 1.0 };
        singles.resize(n, 0);
        for (single, &angle) in singles.iter_mut().zip(&angles[..n]) {
            *single = turns(factor * angle);
        }
        pairs.resize(pairs_of(n), 0);
        for (pair, &angle) in pairs.iter_mut().zip(&angles[n..]) {
            *pair = turns(angle);
        }
        *constant = 0;
        if self.terms == PairTerms::Explicit {
            return;
        }
        if self.terms == PairTerms::Multi {
            for &x in &angles[..n] {
                *constant = constant.wrapping_sub(turns(0.5 * x));
            }
            for (&angle, &times) in angles[n..].iter().zip(&self.by_bits) {
                *constant = constant.wrapping_sub(turns(0.5 * angle).wrapping_mul(times));
            }
        }
        // What a pair adds to each of its singles and takes twice from its own term.
        for (pair, &times) in pairs.iter_mut().zip(&self.by_bits) {
            *pair = pair.wrapping_mul(times);
        }
        let mut rest = &mut **pairs;
        for j in 0..n {
            let row;
            (row, rest) = rest.split_at_mut(n - 1 - j);
            let (below, above) = singles.split_at_mut(j + 1);
            for (pair, above) in row.iter_mut().zip(above) {
                below[j] = below[j].wrapping_add(*pair);
                *above = above.wrapping_add(*pair);
                *pair = pair.wrapping_mul(2).wrapping_neg();
            }
        }
    }

    /// The gradient of a loss by the features `x` of one sample, given that by the coefficients.
    pub fn chain_into(&self, x: &[f64], slopes: &QuadraticSlopes, gradient: &mut [f64]) {
        let n = self.num_qubits as usize;
        let bit = |feature| if self.big_endian { n - 1 - feature } else { feature };
        for (k, gradient) in gradient[..n].iter_mut().enumerate() {
            let single = slopes.singles[bit(k)];
            *gradient = match self.terms {
                PairTerms::Explicit => single,
                PairTerms::Zz => 2.0 * single,
                PairTerms::Multi => single - 0.5 * slopes.constant,
            };
        }
        let bits = (0..n).flat_map(|j| (j + 1..n).map(move |k| (j, k)));
        for (pair, (j, k)) in bits.enumerate() {
            let slope = slopes.pairs[pair];
            if self.terms == PairTerms::Explicit {
                gradient[n + self.positions[pair] as usize] = slope;
                continue;
            }
            // What a pair's angle adds to each of its singles and takes twice from its own term.
            let shared = slopes.singles[j] + slopes.singles[k] - 2.0 * slope;
            let times = self.by_bits[pair] as f64;
            let (a, b) = (bit(j), bit(k));
            if self.terms == PairTerms::Zz {
                gradient[a] -= 2.0 * times * shared * (PI - x[b]);
                gradient[b] -= 2.0 * times * shared * (PI - x[a]);
            } else {
                let by_angle = times * (shared - 0.5 * slopes.constant);
                gradient[a] += by_angle * x[b];
                gradient[b] += by_angle * x[a];
            }
        }
    }

    /// `2^(-n/2)` for each Hadamard layer that the diagonal of layer `rep` absorbs: its own, and
    /// after the last diagonal the final one's.
    pub fn scale(&self, rep: u32) -> f64 {
        let last = rep + 1 == self.reps && self.final_hadamard;
        let halvings = self.num_qubits * (1 + u32::from(last));
        let scale = 0.5f64.powi(halvings as i32 / 2);
        if halvings % 2 == 1 { scale * std::f64::consts::FRAC_1_SQRT_2 } else { scale }
    }
}

impl QuadraticPhase {
    /// The phase of one index.
    pub fn at(&self, index: usize) -> Turns {
        let n = self.singles.len();
        let mut total = self.constant;
        for k in (0..n).filter(|k| index >> k & 1 == 1) {
            total = total.wrapping_add(self.singles[k]);
            for j in (0..k).filter(|j| index >> j & 1 == 1) {
                total = total.wrapping_add(self.pairs[pair_index(n, j, k)]);
            }
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_wrap_and_keep_their_bits() {
        assert_eq!(turns(0.0), 0);
        for phase in [0.1, -0.1, 3.0, 100.0, -1e4, 12345.678] {
            let expected = Complex::cis(phase);
            let got = Complex::cis(radians(turns(phase)));
            assert!((expected - got).norm() < 7e-16, "{phase}: {}", (expected - got).norm());
        }
        let sum = turns(2.5).wrapping_add(turns(-1.5)).wrapping_add(turns(-1.0));
        assert!((sum as i64).abs() < 1 << 12, "{sum}");
    }

    use num_complex::Complex;

    #[test]
    fn zz_phase_is_the_exclusive_or() {
        let x = [0.3, 1.1, -0.4];
        let diagonal = Diagonal::new(3, PairTerms::Zz, &[(0, 1), (1, 2), (1, 2)], 1, false, false);
        let phase = diagonal.quadratic_phase(&x);
        for index in 0..8usize {
            let b = |k: usize| (index >> k & 1) as f64;
            let xor = |j, k| (b(j) - b(k)).abs();
            let u = |j: usize, k: usize| 2.0 * (PI - x[j]) * (PI - x[k]);
            let expected = (0..3).map(|k| 2.0 * x[k] * b(k)).sum::<f64>()
                + u(0, 1) * xor(0, 1)
                + 2.0 * u(1, 2) * xor(1, 2);
            let got = Complex::cis(radians(phase.at(index)));
            assert!((got - Complex::cis(expected)).norm() < 1e-14);
        }
    }

    #[test]
    fn multi_phase_is_the_rotation_gates() {
        let x = [0.3, 1.1, -0.4];
        let diagonal = Diagonal::new(3, PairTerms::Multi, &[(0, 2)], 1, false, true);
        let phase = diagonal.quadratic_phase(&x);
        for index in 0..8usize {
            let z = |k: usize| 1.0 - 2.0 * (index >> (2 - k) & 1) as f64;
            let expected =
                -(0..3).map(|k| x[k] * z(k)).sum::<f64>() / 2.0 - x[0] * x[2] * z(0) * z(2) / 2.0;
            let got = Complex::cis(radians(phase.at(index)));
            assert!((got - Complex::cis(expected)).norm() < 1e-14);
        }
    }

    /// By finite differences of a function that is linear in the phases of all indices, which keeps
    /// within a turn.
    #[test]
    fn the_chain_rule_reaches_the_features() {
        let n = 3;
        let pairs = [(0, 1), (1, 2), (1, 2), (0, 2)];
        let weights: Vec<f64> = (0..1 << n).map(|i| f64::from(i * i % 7) - 2.5).collect();
        for terms in [PairTerms::Explicit, PairTerms::Zz, PairTerms::Multi] {
            for big_endian in [false, true] {
                let diagonal = Diagonal::new(3, terms, &pairs, 1, false, big_endian);
                let count = if terms == PairTerms::Explicit { 6 } else { 3 };
                let x: Vec<f64> = (0..count).map(|k| 0.3 + 0.2 * f64::from(k)).collect();
                let phases = |x: &[f64]| -> Vec<Turns> {
                    let phase = diagonal.quadratic_phase(x);
                    (0..1 << n).map(|i| phase.at(i)).collect()
                };
                let sum = |bits: usize| -> f64 {
                    (0..1 << n).filter(|i| i & bits == bits).map(|i| weights[i]).sum()
                };
                let slopes = QuadraticSlopes {
                    constant: sum(0),
                    singles: (0..n).map(|k| sum(1 << k)).collect(),
                    pairs: [3, 5, 6].map(sum).to_vec(),
                };
                let mut gradient = vec![f64::NAN; count as usize];
                diagonal.chain_into(&x, &slopes, &mut gradient);
                for k in 0..x.len() {
                    let step = 1e-4;
                    let (mut above, mut below) = (x.clone(), x.clone());
                    above[k] += step;
                    below[k] -= step;
                    let change = phases(&above).into_iter().zip(phases(&below));
                    let change: f64 = change
                        .zip(&weights)
                        .map(|((a, b), weight)| weight * radians(a.wrapping_sub(b)))
                        .sum();
                    let want = change / (2.0 * step);
                    assert!((gradient[k] - want).abs() < 1e-8, "{terms:?} {big_endian} {k}");
                }
            }
        }
    }

    #[test]
    fn scale_counts_the_hadamard_layers() {
        let iqp = Diagonal::new(3, PairTerms::Explicit, &[(0, 1)], 1, true, false);
        assert!((iqp.scale(0) - 0.125).abs() < 1e-16);
        let zz = Diagonal::new(3, PairTerms::Zz, &[(0, 1)], 2, false, false);
        assert!((zz.scale(0) - 0.125f64.sqrt()).abs() < 1e-16);
    }
}
