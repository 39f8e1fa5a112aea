//! Amplitude encoding: `x_i / norm(x)`.
//!
//! Squares are summed in double for every input type, so a sum of float32 squares can neither
//! overflow nor lose a small value, and the bound below is the same everywhere.

use crate::error::{Error, Result};

/// Below this sum of squares (2^-960) a norm counts as zero: squares of values that small are
/// subnormal, and a quotient by their sum would be wrong in silence.
pub const MIN_NORM_SQUARED: f64 = f64::from_bits((1023 - 960) << 52);

/// The norm from a sum of squares whose values are all finite.
pub fn norm(sample: usize, sum_of_squares: f64) -> Result<f64> {
    if !sum_of_squares.is_finite() {
        return Err(Error::NormOverflow { sample });
    }
    if sum_of_squares < MIN_NORM_SQUARED {
        return Err(Error::ZeroNorm { sample });
    }
    Ok(sum_of_squares.sqrt())
}

/// The error for a value that is not finite.
pub fn non_finite(sample: usize, position: usize, value: f64) -> Error {
    Error::NonFinite { sample, position, nan: value.is_nan() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norm_has_a_range() {
        assert!((MIN_NORM_SQUARED.log2() + 960.0).abs() < 1e-12);
        assert!((norm(0, 4.0).unwrap() - 2.0).abs() < 1e-15);
        assert_eq!(norm(3, 0.0), Err(Error::ZeroNorm { sample: 3 }));
        assert_eq!(norm(3, f64::INFINITY), Err(Error::NormOverflow { sample: 3 }));
    }
}
