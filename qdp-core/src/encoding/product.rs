//! Encodings that entangle nothing: the state is a tensor product of one factor per qubit.

use super::Rotation;
use num_complex::Complex;

/// The single-qubit state that one feature gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Factor {
    /// A rotation of `|0>` by `scale * x` (half of the usual gate's angle).
    ///
    /// x: `(cos, -i sin)`, y: `(cos, sin)`, z: `(exp(-i scale x), 0)`, the phase that RZ leaves on
    /// `|0>`, as in PennyLane's `AngleEmbedding(rotation="Z")`.
    Rotation {
        /// Its axis.
        axis: Rotation,
        /// 1 for the full angle, 1/2 for the half angle.
        scale: f64,
    },
    /// `reps` layers of H, the phase `scale * x` on the one-branch and the phase `global * x` on
    /// both; then H once more if `final_hadamard`.
    Layers {
        /// Of the phase of the one-branch.
        scale: f64,
        /// Of the phase of both branches.
        global: f64,
        /// Number of layers.
        reps: u32,
        /// Whether a last H follows.
        final_hadamard: bool,
    },
    /// A bit: `(1, 0)` or `(0, 1)`.
    Bit,
}

impl Factor {
    /// The factor `(amplitude of 0, amplitude of 1)` for feature `x`.
    pub fn evaluate(self, x: f64) -> [Complex<f64>; 2] {
        let (scale, global) = self.scales();
        self.combine(x, Complex::cis(scale * x), Complex::cis(global * x))
    }

    /// What a feature is multiplied by in the two angles that [`Self::combine`] takes the phases
    /// of; 0 where it does not need them.
    pub fn scales(self) -> (f64, f64) {
        match self {
            Self::Rotation { scale, .. } => (scale, 0.0),
            Self::Layers { scale, global, .. } => (scale, global),
            Self::Bit => (0.0, 0.0),
        }
    }

    /// The factor for feature `x`, given `exp(i scale x)` and `exp(i global x)`.
    #[inline(always)] // into code for the processor's vectors
    #[allow(clippy::inline_always)]
    pub fn combine(self, x: f64, phase: Complex<f64>, common: Complex<f64>) -> [Complex<f64>; 2] {
        let zero = Complex::new(0.0, 0.0);
        match self {
            Self::Rotation { axis, .. } => match axis {
                Rotation::X => [Complex::new(phase.re, 0.0), Complex::new(0.0, -phase.im)],
                Rotation::Y => [Complex::new(phase.re, 0.0), Complex::new(phase.im, 0.0)],
                Rotation::Z => [phase.conj(), zero],
            },
            Self::Layers { reps, final_hadamard, .. } => {
                let h = std::f64::consts::FRAC_1_SQRT_2;
                let mut state = [Complex::new(1.0, 0.0), zero];
                for _ in 0..reps {
                    let [a, b] = state;
                    state = [(a + b) * h * common, (a - b) * h * common * phase];
                }
                if final_hadamard {
                    let [a, b] = state;
                    state = [(a + b) * h, (a - b) * h];
                }
                state
            }
            Self::Bit => {
                let one = Complex::new(1.0, 0.0);
                if x == 0.0 { [one, zero] } else { [zero, one] }
            }
        }
    }

    /// The derivative by the feature of what [`Self::combine`] gives for the same phases; of a bit,
    /// which has none, zero.
    pub fn derivative(self, phase: Complex<f64>, common: Complex<f64>) -> [Complex<f64>; 2] {
        let zero = Complex::new(0.0, 0.0);
        match self {
            Self::Rotation { axis, scale } => match axis {
                Rotation::X => {
                    [Complex::new(-scale * phase.im, 0.0), Complex::new(0.0, -scale * phase.re)]
                }
                Rotation::Y => {
                    [Complex::new(-scale * phase.im, 0.0), Complex::new(scale * phase.re, 0.0)]
                }
                Rotation::Z => [phase.conj() * Complex::new(0.0, -scale), zero],
            },
            Self::Layers { scale, global, reps, final_hadamard } => {
                let h = std::f64::consts::FRAC_1_SQRT_2;
                let (by_common, by_both) =
                    (Complex::new(0.0, global), Complex::new(0.0, global + scale));
                let (mut state, mut slope) = ([Complex::new(1.0, 0.0), zero], [zero; 2]);
                for _ in 0..reps {
                    let ([a, b], [da, db]) = (state, slope);
                    let (zero, one) = (h * common, h * common * phase);
                    state = [(a + b) * zero, (a - b) * one];
                    slope = [
                        (da + db) * zero + state[0] * by_common,
                        (da - db) * one + state[1] * by_both,
                    ];
                }
                if final_hadamard {
                    let [a, b] = slope;
                    slope = [(a + b) * h, (a - b) * h];
                }
                slope
            }
            Self::Bit => [zero; 2],
        }
    }
}

/// A tensor product of one [`Factor`] per qubit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Product {
    /// The factor.
    pub factor: Factor,
    /// Whether feature 0 belongs to the most significant bit.
    pub big_endian: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_unit_vectors() {
        let factors = [
            Factor::Rotation { axis: Rotation::X, scale: 1.0 },
            Factor::Rotation { axis: Rotation::Y, scale: 0.5 },
            Factor::Rotation { axis: Rotation::Z, scale: 0.5 },
            Factor::Layers { scale: 2.0, global: -0.5, reps: 3, final_hadamard: true },
            Factor::Bit,
        ];
        for factor in factors {
            let [a, b] = factor.evaluate(1.0);
            assert!((a.norm_sqr() + b.norm_sqr() - 1.0).abs() < 1e-14, "{factor:?}");
        }
    }

    #[test]
    fn derivatives_are_those_of_the_factors() {
        let layers = |scale, global, reps, final_hadamard| Factor::Layers {
            scale,
            global,
            reps,
            final_hadamard,
        };
        let rotation = |axis, scale| Factor::Rotation { axis, scale };
        for factor in [
            rotation(Rotation::X, 1.0),
            rotation(Rotation::Y, 0.5),
            rotation(Rotation::Z, 0.5),
            layers(1.0, 0.0, 1, false),
            layers(1.0, 0.0, 1, true),
            layers(2.0, 0.0, 3, false),
            layers(1.0, -0.5, 4, true),
        ] {
            let (x, step) = (0.7, 1e-5);
            let (scale, global) = factor.scales();
            let got = factor.derivative(Complex::cis(scale * x), Complex::cis(global * x));
            let (above, below) = (factor.evaluate(x + step), factor.evaluate(x - step));
            for branch in 0..2 {
                let want = (above[branch] - below[branch]) / (2.0 * step);
                assert!((got[branch] - want).norm() < 1e-8, "{factor:?} {branch}");
            }
        }
    }

    #[test]
    fn one_layer_is_the_phase_encoding() {
        let x = 0.7;
        let factor = Factor::Layers { scale: 1.0, global: 0.0, reps: 1, final_hadamard: false };
        let [a, b] = factor.evaluate(x);
        let h = std::f64::consts::FRAC_1_SQRT_2;
        assert!((a - h).norm() < 1e-15);
        assert!((b - Complex::cis(x) * h).norm() < 1e-15);
    }
}
